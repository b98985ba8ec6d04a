"""genkit as processes of its own: stopped by a signal, and two at once.

They are forked from one that has imported what commands import, which would take each of them seconds. `torchrun` is the launcher
that users start.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SECONDS = 240  # within which everything here ends

forks = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(os, "fork"):
    forks.set_forkserver_preload(["tests.imported"])


class Command:
    """A genkit command line as a running process; what it prints lies in files of a folder."""

    def __init__(self, line: Sequence[str], folder: Path, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self.files = folder / "stdout", folder / "stderr"
        arguments = (list(line), [str(file) for file in self.files], {**os.environ, **environment})
        self.process = forks.Process(target=_run, args=arguments)
        self.process.start()

    def output(self) -> tuple[str, str]:
        """Its stdout and stderr so far."""
        stdout, stderr = (file.read_text() if file.exists() else "" for file in self.files)
        return stdout, stderr


def stopped(
    line: Sequence[str], ready: Callable[[], bool], *, number: int = signal.SIGINT, seconds: float = SECONDS
) -> tuple[int | None, str, str]:
    """Run a genkit command line, send a signal once `ready()` holds or `seconds` are over; (exit code, stdout, stderr)."""
    with tempfile.TemporaryDirectory() as folder:
        command = Command(line, Path(folder))
        try:
            deadline = time.monotonic() + seconds
            while not ready() and command.process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.02)
            if command.process.is_alive() and command.process.pid:
                os.kill(command.process.pid, number)
            command.process.join(60)
        finally:
            command.process.kill()
            command.process.join()
        return (command.process.exitcode, *command.output())


def two_processes(line: Sequence[str], **environment: str) -> tuple[int | None, str, str]:
    """Run a genkit command line in two processes, with the environment that a launcher gives them; (exit code, stdout, stderr)."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            Command(line, Path(folder, rank), RANK=rank, LOCAL_RANK=rank, **meeting, **environment) for rank in ("0", "1")
        ]  # fmt: skip
        try:
            for command in commands:
                command.process.join(SECONDS)
        finally:
            for command in commands:
                command.process.kill()
                command.process.join()
        stdout, stderr = ("".join(texts) for texts in zip(*(command.output() for command in commands), strict=True))
        return next((c.process.exitcode for c in commands if c.process.exitcode), 0), stdout, stderr


def torchrun(line: Sequence[str], **environment: str) -> tuple[int, str, str]:
    """Run a genkit command line in two processes under torchrun; (exit code, stdout, stderr)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "genkit"]
    process = subprocess.Popen(
        [*launcher, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        stdout, stderr = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # so that the launcher ends its workers, which a kill would leave behind
        process.communicate(timeout=60)
        raise
    return process.returncode, stdout, stderr


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _run(line: list[str], files: list[str], environment: dict[str, str]) -> None:
    """What a process does."""
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from genkit.cli.app import app

    if "OMP_NUM_THREADS" in environment:  # torch has read that of the process it was forked from
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    app(line, prog_name="genkit")
