"""Runs recipes on a pipeline, in batches. Each image is a function of its recipe alone, whatever the batch.

(To rounding: libraries sum in another order for another batch size, which moves about one value in 30,000 by one grey level.)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from genkit import samplers, zoo
from genkit.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from genkit.attention import HeatMaps, ImageMaps, Sharpness
    from genkit.guidance import Guidance
    from genkit.pipelines import GuidedPipeline

Progress = Callable[[float], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What is recorded of attention while images are made; it changes none of their bits.

    Args:
        heatmaps: where the image looks at each word of its prompt, see `genkit.attention.record`.
        words: of which words; None for all.
        entropy: how sharp attention is, see `genkit.attention.measure_sharpness`.
    """

    heatmaps: bool = False
    words: tuple[str, ...] | None = None
    entropy: bool = False


NOTHING = Watch()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a recipe: an image, or an error.

    Args:
        seconds: time for the image (that of its batch, divided by the batch's size).
        scheduler: class and configuration of the scheduler that was used.
        attention: what its attention was computed with, see `genkit.attention.proof.Proof.to_dict`.
        heatmaps, entropy: what was recorded, where it was wanted; entropy as of `genkit.attention.Sharpness.of`.
    """

    recipe: Recipe
    image: Image | None
    error: str | None
    seconds: float
    scheduler: dict[str, Any]
    attention: dict[str, Any] | None = None
    heatmaps: ImageMaps | None = None
    entropy: dict[str, Any] | None = None


def load(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    tokens: Sequence[Path] = (),
    allow_pickle: bool = False,
    quiet: bool = False,
    text_encoders: bool = True,
) -> GuidedPipeline:
    """The pipeline for recipes of a model, on a device. An embedded name wins over a folder of the same name.

    Args:
        tokens: token files to load.
        quiet: silence the libraries' warnings too, from now on.
        text_encoders: False loads none, for a model that only gets conditions which are encoded already.

    Raises:
        ValueError, OSError: see `GuidedPipeline.from_pretrained` and `GuidedPipeline.load_tokens`.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from genkit.pipelines import GuidedPipeline

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if quiet:
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
    folder = zoo.path(model) if model in zoo.names() else model
    try:
        names = [] if text_encoders else DiffusionPipeline.load_config(str(folder))
        absent = {name: None for name in names if name.startswith("text_encoder")}
        pipe = GuidedPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), allow_pickle=allow_pickle, **absent)
    except OSError as error:
        if Path(folder).is_dir():
            raise
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"The model {model!r} is no folder here, and the Hub does not give it ({reason}). Check its name.") from error
    pipe.host.set_progress_bar_config(disable=True)
    if tokens:
        pipe.load_tokens(*tokens)
    return pipe.to(device)


def run(
    pipe: GuidedPipeline,
    recipes: Sequence[Recipe],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    watch: Watch = NOTHING,
) -> Iterator[Outcome]:
    """Run recipes of one model; yields each outcome as soon as it is there, settings by settings.

    A batch that fails with NaN or infinity is repeated one by one, so that one bad image costs no other.

    Args:
        progress: called with the number of images (a fraction) that was done since the last call.
        watch: what to record of attention.

    Raises:
        ValueError: a recipe does not fit the model, or has no such words. What was yielded before is good.
    """
    groups: dict[Recipe, list[Recipe]] = {}
    for recipe in recipes:
        groups.setdefault(_settings(recipe), []).append(recipe)
    for settings, members in groups.items():
        guidance = _guidance(pipe, settings)
        for start in range(0, len(members), batch_size):
            yield from _run_or_split(pipe, members[start : start + batch_size], guidance, progress, watch)


def run_batch(pipe: GuidedPipeline, recipes: Sequence[Recipe]) -> list[Image]:
    """The images of recipes that differ only in seed, prompt and label, as one batch.

    Raises:
        ValueError: the recipes differ elsewhere, or do not fit the model.
        FloatingPointError: the run became NaN or infinite.
    """
    settings = {_settings(recipe) for recipe in recipes}
    if len(settings) != 1:
        raise ValueError(f"Recipes of a batch may differ in seed, prompt and label only; got {len(settings)} kinds of settings.")
    return _sample(pipe, recipes, _guidance(pipe, settings.pop()), None, NOTHING).images


def _settings(recipe: Recipe) -> Recipe:
    """What recipes of one batch must share."""
    return dataclasses.replace(
        recipe,
        seed=0,
        prompt=None if recipe.prompt is None else "",
        label=None if recipe.label is None else 0,
    )


def _guidance(pipe: GuidedPipeline, settings: Recipe) -> Guidance | None:
    from genkit.guidance.registry import parse_all

    return parse_all(settings.guidance, pipe)


def _run_or_split(
    pipe: GuidedPipeline, recipes: list[Recipe], guidance: Guidance | None, progress: Progress | None, watch: Watch
) -> Iterator[Outcome]:
    began = time.perf_counter()
    try:
        made = _sample(pipe, recipes, guidance, progress, watch)
        attention = pipe.attention
    except FloatingPointError as error:
        if len(recipes) > 1:
            for recipe in recipes:
                yield from _run_or_split(pipe, [recipe], guidance, None, watch)
        else:
            yield Outcome(recipes[0], None, str(error), time.perf_counter() - began, {})
        return
    seconds = (time.perf_counter() - began) / len(recipes)
    for i, (recipe, image) in enumerate(zip(recipes, made.images, strict=True)):
        maps, sharpness = made.maps, made.sharpness
        yield Outcome(
            recipe, image, None, seconds, made.scheduler, attention,
            None if maps is None else maps[i], None if sharpness is None else sharpness.of(i),
        )  # fmt: skip


class _Made(NamedTuple):
    """A batch of images, the scheduler's description, and what was recorded."""

    images: list[Image]
    scheduler: dict[str, Any]
    maps: HeatMaps | None
    sharpness: Sharpness | None


def _sample(
    pipe: GuidedPipeline, recipes: Sequence[Recipe], guidance: Guidance | None, progress: Progress | None, watch: Watch
) -> _Made:
    """Make a batch; the pipeline keeps its own scheduler."""
    from genkit.attention import measure_sharpness, record

    first, own = recipes[0], pipe.scheduler
    missing = [token for token in first.tokens if token not in pipe.tokens]
    if missing:
        raise ValueError(f"The recipe uses the token {missing[0]!r}. Load its file: pipe.load_tokens(FILE), --token FILE.")

    def advance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        if progress is not None:
            progress(len(recipes) / len(pipe.scheduler.timesteps))

    with ExitStack() as stack:
        stack.callback(setattr, pipe, "scheduler", own)
        maps = stack.enter_context(record(pipe, watch.words)) if watch.heatmaps else None
        sharpness = stack.enter_context(measure_sharpness(pipe)) if watch.entropy else None
        if first.sampler is not None:
            pipe.scheduler = samplers.build(first.sampler, own)
        images = pipe(
            prompt=None if first.prompt is None else [recipe.prompt or "" for recipe in recipes],
            negative_prompt=None if first.negative is None else [first.negative] * len(recipes),
            class_labels=None if first.label is None else [r.label for r in recipes if r.label is not None],
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.cfg,
            seeds=[recipe.seed for recipe in recipes],
            guidance=guidance,
            eta=first.eta,
            callback_on_step_end=advance,
        ).images
        scheduler = {"class": type(pipe.scheduler).__name__, "config": _plain(pipe.scheduler.config)}
    return _Made(images, scheduler, maps, sharpness)


def _plain(config: Any) -> dict[str, Any]:
    """A diffusers configuration as JSON values, without its private entries."""
    plain = (str, int, float, bool, list, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in config.items() if not key.startswith("_")}
