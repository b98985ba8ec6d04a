"""`genkit export`: a distilled student as a diffusers pipeline, or as a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from genkit.cli.common import Debug, Device, Json, Quiet, check_dtype, command, option, resolve_device

_WHAT, _HOW, _WHERE = "What to export", "How", "Files"


def export(
    run: Annotated[Path, option(_WHAT, "Folder of a `genkit distill` run.")],
    out: Annotated[Path, option(_WHERE, "Folder for the student; new or empty.")],
    checkpoint: Annotated[int | None, option(_WHAT, "Number of the checkpoint.", show_default="the latest")] = None,
    teacher: Annotated[
        str | None, option(_WHAT, "Where the teacher is now: a name, a folder, a Hub repository.", show_default="the run's own")
    ] = None,
    which: Annotated[str, option(_WHAT, "ema, the moving average of the weights, or last.")] = "ema",
    format: Annotated[
        str, option(_HOW, "pipeline: all that `from_pretrained` needs; lora: the adapters alone, for `load_lora_weights`.")
    ] = "pipeline",
    sampler: Annotated[
        str | None,
        option(
            _HOW, "From level to level: renoise, as in training, posterior (Euler ancestral) or ode.", show_default="the run's own"
        ),
    ] = None,
    dtype: Annotated[str, option(_HOW, "Of the weights that are written: float32, float16 or bfloat16.")] = "float32",
    figures: Annotated[
        Path | None, option(_HOW, 'JSON file of measured figures for the model card, {"what and how": value}.')
    ] = None,
    dry_run: Annotated[bool, option(_WHERE, "Check the run and print what would be written, and stop.", "--dry-run")] = False,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn the student of a distillation run into an ordinary diffusers model.

    Writes its weights, a scheduler that visits the levels it was trained at, [bold]genkit_distill.json[/bold] and a model card with
    the exact calls. Then it is loaded again, with the stock pipeline and with genkit's, and must draw what the trainer's sampler
    draws from the same noise, to 1e-4; otherwise nothing is written.

    Examples:

        [bold]genkit export --run out --out turbo[/bold]

        [bold]genkit sample "a red seven" --model turbo --steps 1[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.distill.trained import WHICH, TrainedRun
        from genkit.errors import unknown

        if which not in WHICH:
            raise unknown("student", which, WHICH)
        check_dtype(dtype)
        measured = _read_figures(figures)
        source = TrainedRun(run)
        spec = source.spec(sampler=sampler, teacher=teacher)
        weights = source.weights(which, checkpoint)
        document: dict[str, Any] = {"folder": str(out), "format": format, "weights": str(weights), "levels": list(spec.levels)}
        if dry_run:
            output.result({**document, "differences": None}, f"Would export {weights} as a {format} to {out}.")
            return
        import torch

        from genkit.distill.export import export_pipeline
        from genkit.distill.trained import load_network
        from genkit.runner import load

        pipe = load(spec.teacher, device=resolve_device(device), quiet=quiet)
        network = load_network(weights, pipe.denoiser.network).to(pipe.denoiser.device)
        found = export_pipeline(pipe, network, spec, out, format=format, dtype=getattr(torch, dtype), figures=measured)
        text = f"{out}: a {format}, {max(found.values()):.1g} from the trainer's sampler. Its README.md has the calls."
        output.result({**document, "differences": found}, text)


def _read_figures(file: Path | None) -> dict[str, Any]:
    """Measured figures of a JSON file.

    Raises:
        OSError, ValueError: it is missing, or no JSON object of numbers and texts.
    """
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"The figures {str(file)!r} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The figures {str(file)!r} are not JSON ({error}).") from error
    if not isinstance(content, dict) or not all(isinstance(value, (int, float, str)) for value in content.values()):
        raise ValueError(f'The figures {str(file)!r} must be an object such as {{"Frechet distance, 1 step": 40.1}}.')
    return content
