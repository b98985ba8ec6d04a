"""FewStepSpec: what a few-step student needs to be sampled as it was trained, kept beside its weights as `genkit_distill.json`.

Imports nothing heavy: the command line asks for a model's default steps before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from genkit.errors import unknown

FILE = "genkit_distill.json"
SAMPLERS = ("renoise", "posterior", "ode")
TASKS = ("generate", "inpaint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStepSpec:
    """How a distilled student samples.

    Args:
        method: how it was trained: "ladd", "add", ...
        levels: K fractions of the training time that it was trained at, descending from 1 (pure noise).
        sampler: from one level to the next, see `genkit.distill.schedule`: "renoise" (what training simulates), "posterior" or
            "ode".
        guidance_scale: classifier-free guidance that it was trained for; 1, the default, is none.
        height, width: size in pixels that it was trained at, both or neither; None is the network's own.
        teacher: the model that it was distilled from: a name, a folder, or a repository of the Hub.
        steps: its default number of steps, 1 to K; by default K.
        task: "generate", or "inpaint": it gets a mask and what is outside of it.

    Raises:
        ValueError: a field has the wrong type or range; the message names field and value.

    Example:
        >>> spec = FewStepSpec(method="ladd", levels=(1, 0.75, 0.5, 0.25), teacher="digits")
        >>> spec.visited(2)
        (1.0, 0.5)
    """

    method: str
    levels: tuple[float, ...]
    sampler: str = "renoise"
    guidance_scale: float = 1.0
    height: int | None = None
    width: int | None = None
    teacher: str = ""
    steps: int | None = None
    task: str = "generate"

    def __post_init__(self) -> None:
        levels = self.levels
        if not isinstance(levels, (list, tuple)) or not levels or not all(_is_number(u) and 0 < u <= 1 for u in levels):
            raise ValueError(f"levels must be fractions of the training time, above 0 and at most 1; got {levels!r:.200}.")
        object.__setattr__(self, "levels", tuple(float(u) for u in levels))
        if self.levels[0] != 1 or any(b >= a for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"levels must descend from 1, which is pure noise; got {levels!r:.200}.")
        for name in ("method", "teacher"):
            if not isinstance(getattr(self, name), str) or len(getattr(self, name)) > 4096:
                raise ValueError(f"{name} must be text of at most 4,096 characters; got {getattr(self, name)!r:.100}.")
        if self.sampler not in SAMPLERS:
            raise unknown("sampler of a student", str(self.sampler), SAMPLERS)
        if self.task not in TASKS:
            raise unknown("task of a student", str(self.task), TASKS)
        if not _is_number(self.guidance_scale) or not 0 <= self.guidance_scale <= 1000:
            raise ValueError(f"guidance_scale must be a number from 0 to 1000, 1 for none; got {self.guidance_scale!r:.100}.")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"Give height and width together; got {self.height!r} and {self.width!r}.")
        for name, high in (("height", 65536), ("width", 65536), ("steps", len(self.levels))):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= high):
                raise ValueError(f"{name} must be a whole number from 1 to {high}; got {value!r:.100}.")

    @property
    def default_steps(self) -> int:
        """`steps`, or as many as there are levels."""
        return len(self.levels) if self.steps is None else self.steps

    def visited(self, count: int) -> tuple[float, ...]:
        """The levels of a run of `count` steps.

        Raises:
            ValueError: no steps, or more than there are levels.
        """
        from genkit.distill.path import steps_of

        return steps_of(self.levels, count)

    def schedule(self, count: int, scheduler: Any) -> dict[str, list[float]]:
        """The levels of a run as `scheduler.set_timesteps` takes them: {"timesteps": [...]}, or a flow's {"sigmas": [...]}.

        Raises:
            ValueError: no steps, or more than there are levels.
        """
        from genkit.distill.schedule import as_arguments

        return as_arguments(scheduler, self.visited(count))

    def save(self, folder: Path) -> None:
        """Write `genkit_distill.json` into a folder."""
        from genkit.files import write_atomic

        write_atomic(folder / FILE, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> FewStepSpec | None:
        """The spec of a model's folder; None for a folder that has none, and for what is no folder.

        Raises:
            ValueError: the file is damaged, or from another version of genkit.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(file)!r} is not JSON ({error}). Export the student again.") from error
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or not {"method", "levels"} <= set(content):
            raise ValueError(f"{str(file)!r} does not say method and levels. Export the student again.")
        extra = sorted(set(content) - known)
        if extra:
            raise ValueError(f"{str(file)!r} has an unknown entry {extra[0]!r:.100}. It may come from another version of genkit.")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{str(file)!r} cannot be used: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
