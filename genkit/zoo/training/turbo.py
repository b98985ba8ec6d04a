"""Trains `digits-turbo`, the few-step student of `digits`, with what the commands are made of: synth, distill ladd, export.

1. 16,000 samples of the teacher with classifier-free guidance 2 by a deterministic sampler, so that each has its own initial noise.
2. Reconstruction alone: at level 1 of the teacher's sample of the same noise, at the others of the noised sample itself. It brings
   the student near the teacher in half the time of an adversarial round.
3. LADD from there, with reconstruction still on: the adversarial loss puts back what means of many samples lack.

It samples on the probability-flow ODE ("ode"), which keeps the noise that reconstruction paired with a sample.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from genkit.console import progress
from genkit.data.source import open_source
from genkit.distill.config import DistillConfig
from genkit.distill.export import export_pipeline
from genkit.distill.synth import SynthConfig, synthesize
from genkit.distill.trained import TrainedRun, load_network
from genkit.distill.trainer import DistillTrainer
from genkit.pipelines import GuidedPipeline

COUNT = 16_000
SYNTH = SynthConfig(guidance_scale=2.0, steps=10, sampler="dpm++", storage="float32", shard_size=1000)
_BOTH = DistillConfig(teacher="digits", level_probs=(0.4, 0.2, 0.2, 0.2), ema=0.99, seed=0)
FIRST = dataclasses.replace(
    _BOTH, adversarial=0.0, reconstruction=1.0, disc_noise="logit-normal:0,1", batch_size=128, lr=3e-4, lr_scheduler="cosine",
    lr_warmup=20, steps=1200, checkpoint_every=200, preview_every=400,
)  # fmt: skip
# The student is so near the teacher by then that the discriminator has to look through little noise to see a difference.
SECOND = dataclasses.replace(
    _BOTH, adversarial=0.2, reconstruction=2.0, disc_noise="logit-normal:-2,1", taps="all", head_width=128, mismatched=False,
    lr=3e-5, disc_lr=1e-3, steps=300, checkpoint_every=100, preview_every=100,
)  # fmt: skip
SAMPLER = "ode"


def train(folder: Path, *, steps: int | None = None, resume: bool = False, device: str = "cpu") -> None:
    """Train the student into `folder`: data/, first/, second/ and, at the end, model/, the exported pipeline.

    Args:
        steps: rounds of each of the two stages; by default those of the embedded model.
        resume: go on with what is in the folder.
    """
    pipe = GuidedPipeline.from_pretrained("digits").to(device)
    prompts = open_source("digits", COUNT).captions
    with progress() as bar:
        task = bar.add_task("samples of the teacher", total=COUNT)
        data = synthesize(
            pipe, folder / "data", SYNTH, prompts=prompts, batch_size=100, resume=resume,
            progress=lambda items: bar.update(task, advance=items),
        )  # fmt: skip
    stages = {"first": FIRST, "second": dataclasses.replace(SECOND, init=str(folder / "first"))}
    for name, stage in stages.items():
        config = stage if steps is None else dataclasses.replace(stage, steps=steps)
        begun = resume and (folder / name / "config.json").is_file()
        trainer = DistillTrainer(pipe.denoiser, data, config, folder / name)
        trainer.fit("latest" if begun and trainer.run.checkpoints() else None)
        if trainer.interrupted:
            raise KeyboardInterrupt
    run = TrainedRun(folder / "second")
    network = load_network(run.weights(), pipe.denoiser.network)
    export_pipeline(pipe, network, run.spec(sampler=SAMPLER), folder / "model", dtype=torch.float16)
