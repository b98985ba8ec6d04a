"""Kernels of notebooks that are forked, as the commands of `tests.processes` are."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from jupyter_client.provisioning import LocalProvisioner
from nbclient import NotebookClient

from tests.processes import forks


class Forked(LocalProvisioner):
    """Starts a kernel by a fork; jupyter does the rest."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        arguments = (cmd[cmd.index("-f") + 1], str(kwargs["cwd"]), dict(kwargs["env"]))
        self.process = forks.Process(target=_kernel, args=arguments)
        self.process.start()
        self.pid = self.process.pid
        return self.connection_info

    async def poll(self) -> int | None:
        return self.process.exitcode if self.process else 0

    async def wait(self) -> int | None:
        while await self.poll() is None:
            await asyncio.sleep(0.05)
        code = await self.poll()
        self.process = None
        return code

    async def send_signal(self, signum: int) -> None:
        if self.process:
            os.kill(self.process.pid, signum)


def forked(client: NotebookClient) -> NotebookClient:
    """The client of a notebook with such a kernel."""
    manager = client.create_kernel_manager()
    manager.provisioner = Forked(parent=manager, kernel_id="forked", kernel_spec=manager.kernel_spec)
    return client


def _kernel(connection: str, folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=["-f", connection])
