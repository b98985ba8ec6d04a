"""genkit as processes of its own: interrupted by Ctrl-C, and two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

_GENKIT = ("-m", "genkit")
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def interrupted(line: Sequence[str], ready: Callable[[], bool], *, seconds: float = 240) -> tuple[int, str, str]:
    """Run a genkit command line, send SIGINT once `ready()` holds or `seconds` are over; (exit code, stdout, stderr)."""
    process = _start([*_GENKIT, *line])
    try:
        deadline = time.monotonic() + seconds
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def two_processes(line: Sequence[str], **environment: str) -> tuple[int, str, str]:
    """Run a genkit command line in two processes under torchrun; (exit code, stdout, stderr)."""
    process = _start([*_TORCHRUN, *_GENKIT, *line], **environment)
    try:
        stdout, stderr = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # so that the launcher ends its workers, which a kill would leave behind
        process.communicate(timeout=60)
        raise
    return process.returncode, stdout, stderr


def _start(line: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
