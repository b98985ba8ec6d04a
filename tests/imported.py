"""What most commands import: it takes seconds, so `tests.processes` and `benchmarks/kill.py` do it once."""

import accelerate  # noqa: F401
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

import genkit.cli.app
import genkit.distill.trainer
import genkit.features
import genkit.pipelines
import genkit.runner  # noqa: F401
