"""Which noise levels a model's own pipeline visits in a few steps, and what is wrong with them.

A run starts from pure noise, so its first level must be the noisiest; its last must leave something to do; and a distilled student
is right at its own levels only. Default schedules break each of these rules somewhere (diffusers issue 6112; the tables of
`tests/genkit/test_doctor_levels.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from genkit import _host, zoo
from genkit.denoisers import Denoiser
from genkit.denoisers.base import accepts
from genkit.denoisers.registry import find_for
from genkit.distill.schedule import as_arguments, is_flow, visits
from genkit.distill.spec import FewStepSpec
from genkit.levels import Level, levels_of

# Fractions of the training time. A run that starts below the first draws noise; a step at or below the second does nothing.
_START, _END = 0.95, 0.02


@dataclasses.dataclass(frozen=True)
class Visit:
    """A level at which the network is evaluated.

    Args:
        timestep: what the scheduler tells the network.
        alpha, sigma: of the sample that the network sees, alpha x0 + sigma eps: alpha^2 + sigma^2 = 1, or alpha + sigma = 1 for
            flow matching.
        snr: signal-to-noise ratio, alpha^2 / sigma^2; None where there is no noise.
    """

    timestep: float
    alpha: float
    sigma: float
    snr: float | None


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something wrong, or worth knowing.

    Args:
        name: "low-start", "wasted-step", "shift-twice", "not-its-levels", "terminal-snr", "guidance" or "too-many-steps".
        harmful: False where it may be as intended.
        text: what it is, with the numbers.
        advice: what to change.
    """

    name: str
    harmful: bool
    text: str
    advice: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a run of `steps` steps visits, and what is wrong with it."""

    steps: int
    visits: tuple[Visit, ...]
    findings: tuple[Finding, ...]


def open_model(model: str) -> Denoiser:
    """A model's pipeline without its weights: configurations, scheduler, and networks that hold no memory.

    Args:
        model: an embedded model, a folder, or a repository of the Hub, of which only the JSON files are fetched.

    Raises:
        FileNotFoundError, ValueError: no such model, no pipeline, no scheduler, or a family that is not supported.
        OSError: the Hub does not give it.

    Example:
        >>> diagnose(open_model("digits"), [1, 2, 4])
    """
    import diffusers

    from genkit.checkpoints import components, on_meta, read_json

    folder = _folder(model)
    name = str(read_json(folder / "model_index.json").get("_class_name"))
    if not hasattr(diffusers, name):
        raise ValueError(f"The pipeline class {name!r} of {model!r} is none of this diffusers ({diffusers.__version__}).")
    find_for(getattr(diffusers, name))
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(f"The model {model!r} has no scheduler: there is no scheduler/scheduler_config.json in its folder.")
    given: dict[str, Any] = {}
    for component, (library, class_name) in components(folder).items():
        if component.name != "scheduler":
            # Text encoders and tokenizers do not matter here.
            parts = ("unet", "transformer", "vae")
            given[component.name] = on_meta(component, library, class_name) if component.name in parts else None
    diffusers.utils.logging.disable_progress_bar()
    return Denoiser.of(getattr(diffusers, name).from_pretrained(folder, **given))


def _folder(model: str) -> Path:
    """The folder of a model with at least its JSON files."""
    from huggingface_hub import snapshot_download

    path = Path(model).expanduser()
    # An embedded name wins over a folder of that name, as everywhere.
    if model in zoo.names() or ("/" not in model and not path.exists()):
        folder = zoo.path(model)
    elif path.exists() or model.count("/") != 1 or model.startswith((".", "~")):
        folder = path
    else:
        try:
            folder = Path(snapshot_download(model, allow_patterns=["*.json"]))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OSError(
                f"The model {model!r} is no folder here, and the Hub does not give it ({reason}). Check its name."
            ) from error
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {model!r}.")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{model!r} is no diffusion pipeline (there is no model_index.json), so it has no schedule.")
    return folder


def diagnose(denoiser: Denoiser, steps: Sequence[int], student: FewStepSpec | None = None) -> Iterator[Diagnosis]:
    """What the family's own pipeline visits by default in each number of steps.

    Args:
        denoiser: of the pipeline, whose scheduler's timesteps are set; its weights are not used.
        steps: numbers of steps.
        student: how it samples, if it is a distilled student.

    Example:
        >>> for diagnosis in diagnose(pipe.denoiser, [1, 4]):
        ...     print(diagnosis.steps, [visit.timestep for visit in diagnosis.visits], diagnosis.findings)
    """
    scheduler = denoiser.pipe.scheduler
    height, width = (None, None) if student is None else (student.height, student.width)
    shape = denoiser.latent_shape(height, width)
    for count in steps:
        if student is not None and count > len(student.levels):
            yield Diagnosis(count, (), (_too_many(count, len(student.levels)),))
            continue
        try:
            denoiser.set_timesteps(scheduler, count, shape, "cpu")
        except ValueError as error:
            yield Diagnosis(count, (), (Finding("too-many-steps", True, str(error), "Use another number of steps."),))
            continue
        levels = levels_of(scheduler)
        found = [*_wrong_levels(scheduler, levels, student, count), *_guidance(denoiser, student)]
        yield Diagnosis(count, tuple(_visit(scheduler, level) for level in levels), tuple(found))


def _visit(scheduler: Any, level: Level) -> Visit:
    norm = float(level.alpha + level.sigma if is_flow(scheduler) else level.norm)
    alpha, sigma = float(level.alpha) / norm, float(level.sigma) / norm
    return Visit(float(level.t), alpha, sigma, (alpha / sigma) ** 2 if sigma > 0 else None)


def _wrong_levels(scheduler: Any, levels: Sequence[Level], student: FewStepSpec | None, count: int) -> Iterator[Finding]:
    first, last = (float(level.t) / scheduler.config.num_train_timesteps for level in (levels[0], levels[-1]))
    ours = None if student is None else student.visited(count)
    if ours is not None and not visits(scheduler, ours):
        name, values = next(iter(as_arguments(scheduler, ours).items()))
        seen = ", ".join(f"{float(level.t):g}" for level in levels)
        text = f"In {_steps(count)} its default schedule visits the timesteps {seen}, which the student was not trained at."
        advice = f"Pass {name}={[round(value, 6) for value in values]} in the call."
        if not accepts(scheduler, name):
            advice = "Use the scheduler that came with the student."
        yield Finding("not-its-levels", True, text, advice)
    trailing = 'timestep_spacing="trailing"' if "timestep_spacing" in scheduler.config else "sigmas that start at 1"
    start = _visit(scheduler, levels[0])
    if first < _START:
        text = (
            f"In {_steps(count)} it starts at timestep {start.timestep:g}, where {100 * start.alpha:.0f} % "
            "of the sample should be signal, but a run starts from pure noise: the picture comes out as noise, or grey."
        )
        yield Finding("low-start", True, text, f"Use a scheduler with {trailing}.")
    elif student is None and start.alpha > 1e-3:  # students are trained for it
        text = (
            f"At its first level alpha is {start.alpha:.3f}, not 0, though a run starts from pure noise. "
            f"Errors of a noise prediction there count {1 / start.alpha:.0f} times in x0."
        )
        advice = (
            "Usual for Stable Diffusion. For very dark or bright pictures: rescale_betas_zero_snr, with a model trained for it."
        )
        yield Finding("terminal-snr", False, text, advice)
    twice = _shifted_twice(scheduler, levels[-1]) if count > 1 else None
    if twice is not None:
        yield Finding("shift-twice", True, twice, "Pass sigmas in the call.")
    if count > 1 and last <= _END:
        even = [round(1 - i / count, 4) for i in range(count)]
        advice = (
            f"Pass sigmas={even} in the call (before the shift)." if is_flow(scheduler) else f"Use a scheduler with {trailing}."
        )
        text = f"The last of {_steps(count)}, at timestep {float(levels[-1].t):g}, is wasted: hardly any noise is left there."
        yield Finding("wasted-step", True, text, advice)


def _shifted_twice(scheduler: Any, last: Level) -> str | None:
    """FlowMatchEuler and its relatives shift sigma_min when they are built, and again in `set_timesteps`."""
    shift = float(scheduler.config.get("shift") or 1.0)
    if not _host.is_flow(scheduler) or shift == 1 or scheduler.config.get("use_dynamic_shifting"):
        return None

    def shifted(sigma: float) -> float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    once = shifted(1 / scheduler.config.num_train_timesteps)
    if abs(float(last.sigma) - shifted(once)) > 1e-5:
        return None
    return f"The shift {shift:g} is applied twice to its last sigma: {float(last.sigma):.4f} instead of {once:.4f}."


def _guidance(denoiser: Denoiser, student: FewStepSpec | None) -> Iterator[Finding]:
    """The pipeline's default guidance, against what a student was trained for."""
    accepted = inspect.signature(denoiser.pipe.__call__).parameters
    if student is None or "guidance_scale" not in accepted or denoiser.family == "Flux":  # whose scale is the network's own input
        return
    default, own = accepted["guidance_scale"].default, student.guidance_scale
    if default != own:
        text = (
            f"{type(denoiser.pipe).__name__} uses guidance_scale={default:g} by default, but the student was trained for {own:g}."
        )
        yield Finding("guidance", True, text, f"Pass guidance_scale={own:g} in the call.")


def _too_many(count: int, levels: int) -> Finding:
    text = f"The student has {levels} level{'s' if levels > 1 else ''}, so there is no run of {_steps(count)}."
    return Finding("too-many-steps", False, text, f"Use 1 to {levels}.")


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"
