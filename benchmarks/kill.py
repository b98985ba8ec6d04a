"""kill -9 at random moments of sampling, synth, distillation and feature caching: is anything lost, half-written, or not resumed?

    python benchmarks/kill.py [--trials 50] [--only sample synth distill features] [--out benchmarks/results/kill.json]

Each trial runs the real command on a tiny random model in a process of its own, waits until a random number of its items is done
and then a random time, kills it (sometimes its continuation, too), and looks at what is there:

    half-written    something that counts as finished (a picture, a shard, a checkpoint, a noted piece) differs from that of the
                    undisturbed run, or is no file of its kind
    lost            something that was finished when the process died was made again, or is gone
    not resumed     the command with --resume fails, or what it leaves differs from the undisturbed run

Commands are forked from one process that has imported what they import, so that kills fall on work and not on imports; one in ten
comes at any time from the start on. Exit code 1 if any of the three happened.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SECOND_KILL = 0.3  # probability that the continuation is killed, too
EARLY = 0.1  # and of a kill at any time from the start on
PIECE = 64  # rows of features that are made together

Finished = dict[str, tuple[str, Any]]
"""Of each finished item: a digest of what a run must repeat, and what changes when it is made again (None: it cannot be told)."""


class Task(NamedTuple):
    """A command, and what of its output counts as finished."""

    line: Callable[[Path], list[str]]
    finished: Callable[[Path], Finished]


def of_pictures(folder: Path) -> Finished:
    """PNGs with their side-cars, which must be JSON; a PNG without one, which is written last, is whole, and is made again."""
    from PIL import Image

    found: Finished = {}
    for file in folder.glob("*.png"):
        if file.with_suffix(".json").exists():
            found[file.name] = (_digest(file), _identity(file))
        else:
            with Image.open(file) as image:
                image.verify()
    for file in folder.glob("*.json"):
        found[file.name] = (json.loads(file.read_text())["hash"], _identity(file))
    return found


def of_shards(folder: Path) -> Finished:
    """Shards by their tensors and metadata: safetensors writes the metadata in any order, so equal shards may differ in bytes."""
    from safetensors import safe_open

    found: Finished = {}
    for file in folder.glob("shard-*.safetensors"):
        with safe_open(file, framework="np") as shard:
            content = [sorted((shard.metadata() or {}).items())]
            content += [(name, shard.get_tensor(name).tobytes()) for name in sorted(shard.keys())]
        found[file.name] = (hashlib.sha256(repr(content).encode()).hexdigest(), _identity(file))
    return found


def of_checkpoints(folder: Path) -> Finished:
    """Checkpoints with all their networks; optimizers are proven by what the next rounds make of them."""
    names = ("student/diffusion_pytorch_model.safetensors", "student_ema/diffusion_pytorch_model.safetensors", "heads.safetensors")
    return {
        path.name: (" ".join(_digest(path / name) for name in names) + (path / "state.json").read_text(), _identity(path))
        for path in folder.glob("checkpoint-*")
    }


def of_pieces(folder: Path) -> Finished:
    """Pieces of features that are noted as done."""
    import numpy as np

    notes = [json.loads(note.read_text()) for note in folder.glob("done-*.json")]
    values = np.load(folder / "mid.npy", mmap_mode="r") if notes else None
    return {
        str(start): (hashlib.sha256(values[start : start + PIECE].tobytes()).hexdigest(), None)
        for note in notes for start in note if values is not None
    }  # fmt: skip


def tasks(work: Path) -> dict[str, Task]:
    """The commands, on models and data in `work`."""
    model, data, pictures = (str(work / name) for name in ("tiny", "latents", "pictures"))
    common = ["--device", "cpu", "--quiet"]

    def sample(out: Path) -> list[str]:
        # One picture at a time: in batches of other sizes they differ by rounding.
        subject = ["a red seven", "a blue cat", "--model", model, "--seeds", "0-4", "--steps", "2", "--batch", "1"]
        return ["sample", *subject, "--no-grid", "--out", str(out), "--resume", *common]

    def synth(out: Path) -> list[str]:
        subject = ["--teacher", model, "--prompt", "a red seven", "--prompt", "a blue cat", "--count", "16", "--steps", "2"]
        return ["synth", *subject, "--sampler", "ddim", "--shard-size", "2", "--out", str(out), "--resume", *common]

    def distill(out: Path) -> list[str]:
        rounds = ["--steps", "5", "--batch-size", "4", "--head-width", "8", "--preview-every", "0", "--checkpoint-every", "1"]
        return ["distill", "ladd", "--teacher", model, "--data", data, "--out", str(out), *rounds, "--checkpoints-limit", "0",
                "--resume", "latest", *common]  # fmt: skip

    def features(out: Path) -> list[str]:
        return ["features", pictures, "--model", model, "--taps", "mid", "--t", "100", "--out", str(out), "--resume", *common]

    return {
        "sample": Task(sample, of_pictures), "synth": Task(synth, of_shards), "distill": Task(distill, of_checkpoints),
        "features": Task(features, of_pieces),
    }  # fmt: skip


def prepare(work: Path) -> None:
    """A tiny Stable Diffusion, latents of it, and pictures."""
    import numpy as np
    from PIL import Image

    from tests import tiny
    from tests.distill.tiny_runs import data_of, denoiser_of

    tiny.pipeline("stable_diffusion").save_pretrained(work / "tiny")
    data_of(denoiser_of("stable_diffusion"), work / "latents")
    (work / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4 * PIECE):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(work / "pictures" / f"{i:04d}.png")


def command(line: Sequence[str]) -> None:
    """A genkit command line, in this process; ends it."""
    from genkit.cli.app import app

    app(list(line), prog_name="genkit")


def started(function: Callable[[], Any], log: Path) -> int:
    """The number of a process that runs a function."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def ended(number: int) -> int:
    """The exit code of a process, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def killed(task: Task, folder: Path, log: Path, moment: tuple[int, float]) -> bool:
    """Run a command and kill it some seconds after so many items are finished; False if it had ended by then."""
    items, seconds = moment
    number = started(lambda: command(task.line(folder)), log)
    while _count(task, folder) < items:
        if os.waitpid(number, os.WNOHANG)[0]:
            return False
        time.sleep(0.02)
    time.sleep(seconds)
    os.kill(number, signal.SIGKILL)
    return ended(number) == -signal.SIGKILL


def _count(task: Task, folder: Path) -> int:
    try:
        return len(task.finished(folder)) if folder.exists() else 0
    except Exception:  # whatever is half-written will be seen after the kill
        return 0


def examine(task: Task, trials: int, work: Path, rng: random.Random) -> dict[str, Any]:
    """What came of the trials of one command."""
    log, whole = work / "log.txt", work / "whole"
    began = time.perf_counter()
    if ended(started(lambda: command(task.line(whole)), log)):
        raise RuntimeError(f"The undisturbed run fails: {log.read_text()[-500:]}")
    length = time.perf_counter() - began
    expected = {name: digest for name, (digest, _) in task.finished(whole).items()}

    def moment() -> tuple[int, float]:
        if rng.random() < EARLY:
            return 0, rng.uniform(0, length)
        return rng.randrange(len(expected)), rng.uniform(0, 0.5 * length / len(expected))

    counts: Counter[str] = Counter()
    notes: list[str] = []
    while counts["trials"] < trials:
        folder = work / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        if not killed(task, folder, log, moment()):
            continue
        counts["trials"] += 1
        kills = 1
        there = look(task, folder, expected, counts, notes)
        if rng.random() < SECOND_KILL and killed(task, folder, log, moment()):
            kills += 1
            again = look(task, folder, expected, counts, notes)
            lose(there, again, counts, notes)
            there = again
        counts["kills"] += kills
        counts["finished when killed"] += len(there)
        code = ended(started(lambda folder=folder: command(task.line(folder)), log))
        after = look(task, folder, expected, counts, notes)
        lose(there, after, counts, notes)
        if code or {name: digest for name, (digest, _) in after.items()} != expected:
            counts["not resumed"] += 1
            notes.append(f"exit code {code}, {len(after)} of {len(expected)}: {log.read_text()[-200:]}")
        else:
            counts["resumed"] += 1
    names = ("trials", "kills", "lost", "half-written", "resumed", "not resumed", "finished when killed")
    return {**{name: counts[name] for name in names}, "items": len(expected), "seconds_of_a_run": length, "notes": notes[:10]}


def look(task: Task, folder: Path, expected: dict[str, str], counts: Counter[str], notes: list[str]) -> Finished:
    """What is finished in a folder; what of it differs from the undisturbed run is counted."""
    try:
        found = task.finished(folder) if folder.exists() else {}
    except Exception as error:
        counts["half-written"] += 1
        notes.append(f"{type(error).__name__}: {error}")
        return {}
    for name, (digest, _) in found.items():
        if expected.get(name) != digest:
            counts["half-written"] += 1
            notes.append(f"{name} differs")
    return found


def lose(before: Finished, after: Finished, counts: Counter[str], notes: list[str]) -> None:
    """Count what was finished and is not the same file any more."""
    for name, entry in before.items():
        if after.get(name) != entry:
            counts["lost"] += 1
            notes.append(f"{name} was made again" if name in after else f"{name} is gone")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _identity(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_ino, stat.st_mtime_ns


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("command", "trials", "kills", "finished when killed", "lost", "half-written", "resumed", box=None)
    for name, row in results.items():
        share = f"{row['finished when killed'] / max(1, row['trials']):.1f} of {row['items']}"
        table.add_row(name, *(str(row[key]) for key in ("trials", "kills")), share, str(row["lost"]), str(row["half-written"]),
                      str(row["resumed"]))  # fmt: skip
    Console(width=110).print(table)
    for name, row in results.items():
        for note in row["notes"]:
            print(f"{name}: {note}")


def main() -> None:
    """Measure, print the table, write the JSON."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A process that has used several threads must not be forked.
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="of each command")
    parser.add_argument("--only", nargs="*", help="some of the commands")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill.json"))
    arguments = parser.parse_args()
    import tests.imported  # noqa: F401

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if ended(started(lambda: prepare(work), work / "log.txt")):
            raise SystemExit((work / "log.txt").read_text())
        every = tasks(work)
        for name in arguments.only or every:
            place = work / name
            place.mkdir()
            began = time.perf_counter()
            results[name] = examine(every[name], arguments.trials, place, random.Random(f"{arguments.seed} {name}"))
            print(f"{name}: {time.perf_counter() - began:.0f} s, {results[name]}", file=sys.stderr, flush=True)
    report(results)
    machine = {"platform": platform.platform(), "python": platform.python_version()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, "commands": results}, indent=2) + "\n")
    if any(row["lost"] or row["half-written"] or row["not resumed"] for row in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
