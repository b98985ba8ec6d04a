"""Several processes on one job, as `torchrun` and `accelerate launch` start them: who does what, and waiting for each other.

A single process imports nothing for it.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process (`index`) among `world` processes.

    Raises:
        ValueError: not 0 <= index < world.
    """

    index: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.world:
            raise ValueError(f"RANK={self.index} and WORLD_SIZE={self.world} do not fit. Start with torchrun, or unset both.")

    @classmethod
    def from_environment(cls) -> Ranks:
        """From RANK and WORLD_SIZE, which launchers set."""
        values = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        for name, value in values.items():
            if not value.isdigit():
                raise ValueError(f"The environment variable {name}={value!r} is not a number. Start with torchrun, or unset it.")
        return cls(int(values["RANK"]), int(values["WORLD_SIZE"]))

    @property
    def leads(self) -> bool:
        """Whether this process reports and does what is done once."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part: item i belongs to process i modulo `world`."""
        return list(items[self.index :: self.world])

    def join(self, *, cpu: bool) -> str | None:
        """Meet the other processes.

        Args:
            cpu: compute on the CPU (gloo).

        Returns:
            The device of this process, or None if it is alone and may choose.

        Raises:
            RuntimeError: the others could not be met.
        """
        if self.world == 1:
            return None
        import torch
        from accelerate import PartialState

        # accelerate silently stays alone where there is neither an accelerator nor cpu=True. Processes may finish hours apart,
        # so waiting must not time out.
        cpu = cpu or not torch.accelerator.is_available()
        state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=30))
        if state.num_processes != self.world:
            raise RuntimeError(f"WORLD_SIZE is {self.world}, but accelerate found {state.num_processes} processes.")
        return "cpu" if cpu else str(state.device)

    def wait(self) -> None:
        """Until every process is here; after `join`."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of the processes; after `join`. Anything that can be pickled."""
        if self.world == 1:
            return list(items)
        from accelerate.utils import gather_object

        return gather_object(list(items))

    def leave(self) -> None:
        """End the meeting, so that the launcher sees a clean exit."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()
