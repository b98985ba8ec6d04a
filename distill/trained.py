"""What a distillation run has made, for the export: its settings, its checkpoints, the networks in them.

`genkit.distill.runs` describes the folder. Read here without what training needs, so that a run can be exported on another machine.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from genkit import zoo
from genkit.checkpoints import check_folder, read_shapes
from genkit.distill.spec import FewStepSpec

WHICH = {"ema": "student_ema", "last": "student"}
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name


def checkpoint_folders(run: Path) -> dict[int, Path]:
    """The folders of a run's checkpoints by their number, ascending."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.iterdir() if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


class TrainedRun:
    """A folder that `genkit distill` wrote.

    Raises:
        FileNotFoundError: the folder, or its config.json, is missing.
        ValueError: config.json is damaged, or lacks a setting.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"There is no folder {str(folder)!r}. Name the --out of a `genkit distill`.")
        file = self.folder / "config.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{str(folder)!r} is no distillation run: it has no config.json.") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(file)!r} is not JSON ({error}). The run is damaged.") from error
        missing = [name for name in ("teacher", "levels", "method") if not isinstance(content, dict) or content.get(name) is None]
        if missing:
            raise ValueError(f"{str(file)!r} does not say {', '.join(missing)}. Name the --out of a `genkit distill`.")
        self.config: dict[str, Any] = content

    def spec(self, **replaced: str | None) -> FewStepSpec:
        """How the run's student samples; fields that are given and not None replace the run's own."""
        names = ("method", "levels", "teacher", "height", "width", "sampler", "task")
        fields = {name: self.config.get(name) for name in names} | {k: v for k, v in replaced.items() if v is not None}
        spec = FewStepSpec(**{name: value for name, value in fields.items() if value is not None})
        if not spec.teacher:
            raise ValueError(f"The run {str(self.folder)!r} does not say what its teacher is. Name it: --teacher MODEL.")
        return spec

    def checkpoints(self) -> list[int]:
        """The numbers of the checkpoints that are whole, ascending; one that was copied in part has no state.json."""
        return [number for number, folder in checkpoint_folders(self.folder).items() if (folder / "state.json").is_file()]

    def weights(self, which: str = "ema", checkpoint: int | None = None) -> Path:
        """The folder of a student's weights, checked: no tensor is missing or cut off.

        Args:
            which: "ema" or "last".
            checkpoint: its number; the latest by default.

        Raises:
            ValueError: no such checkpoint, or no such student in it, or its weights are damaged.
        """
        there = self.checkpoints()
        listed = ", ".join(str(number) for number in there) or "none"
        if checkpoint is None and not there:
            raise ValueError(f"The run {str(self.folder)!r} has no whole checkpoint yet. Train longer, or resume it.")
        number = there[-1] if checkpoint is None else checkpoint
        if number not in there:
            raise ValueError(f"The run has no whole checkpoint {number}. It has: {listed}.")
        folder = self.folder / f"checkpoint-{number}" / WHICH[which]
        if not folder.is_dir():
            raise ValueError(f"Checkpoint {number} has no {WHICH[which]!r}. Use --which {'last' if which == 'ema' else 'ema'}.")
        try:
            if (folder / LORA_FILE).is_file():
                read_shapes(folder / LORA_FILE)
            else:
                check_folder(folder)
        except (ValueError, OSError) as error:
            raise ValueError(f"Checkpoint {number} is damaged. {error} All there are: {listed}; see --checkpoint.") from error
        return folder


def start_from(init: str, network: Any) -> None:
    """Load the weights of an earlier student into a network, in place.

    Args:
        init: a run, whose latest averaged student is taken; a folder of a network; or an embedded model or a folder of a pipeline
            that has one. Input channels that it lacks (those of a mask) begin with zero weights.

    Raises:
        ValueError, FileNotFoundError: there is no student, or it is of another shape.
    """
    folder = zoo.folder(init)
    if (folder / "model_index.json").is_file():
        folder = folder / ("transformer" if (folder / "transformer").is_dir() else "unet")
    elif list(folder.glob("checkpoint-*")):
        folder = TrainedRun(folder).weights()
    try:
        check_folder(folder)
        load_weights(folder, network, widen=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"No student can start from {init!r}: {' '.join(str(error).split())[:300]}") from error


def load_weights(folder: Path, network: Any, *, widen: bool = False) -> None:
    """Load the weights that a network of the same class was saved with, in place and in float32.

    Args:
        widen: convolutions of fewer input channels are good enough; the others' weights are zero.
    """
    weights, own = type(network).from_pretrained(folder, dtype=torch.float32).state_dict(), network.state_dict()
    for name, value in weights.items():
        if widen and name in own and value.ndim == 4 and value.shape[1] < own[name].shape[1]:
            weights[name] = F.pad(value, (0, 0, 0, 0, 0, own[name].shape[1] - value.shape[1]))
    network.load_state_dict(weights)


def load_network(folder: Path, teacher: Any) -> Any:
    """The network of a checkpoint, float32: a whole one, or the teacher's network with the adapters of a LoRA.

    Args:
        folder: as `TrainedRun.weights` gives it.
        teacher: the teacher's network, which is copied for a LoRA.

    Raises:
        ValueError: the adapters do not fit the teacher's network.
    """
    file = folder / LORA_FILE
    if not file.is_file():
        return type(teacher).from_pretrained(folder)
    network = copy.deepcopy(teacher).float()
    prefix = next(iter(read_shapes(file))).partition(".")[0]  # "unet" or "transformer"
    try:
        network.load_lora_adapter(str(folder), prefix=prefix, weight_name=LORA_FILE)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"The LoRA in {str(folder)!r} does not fit the teacher ({' '.join(str(error).split())[:200]}).") from error
    return network
