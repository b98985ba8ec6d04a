"""Distillation of eight modes on a ring to one step: what works, and what has to fail.

    python benchmarks/ring.py [--rounds 1200] [--only TEXT] [--seed 0] [--out benchmarks/results/ring.json] [--work DIR]
                              [--picture ring.png]

    mmd        1,000 MMD^2 to the ring, see `genkit.data.ring`; 4,096 samples each
    hq         share of samples within three standard deviations of a mode
    min mode   share of the rarest mode, 0.125 at best
    std        within the modes, 0.117 for the ring (0.12, cut off at three)

The teacher's rows are Euler's method. A student is the average of its weights; "last" is the MMD of the weights that are averaged.
All are trained by `DistillTrainer`, except "stale gradients" and "cleared gradients", which are one loop of the ordering that a
public trainer has: the student's loss leaves its gradient in the heads, and the discriminator's is added to it. Its part on fakes
then cancels, so the heads only learn to call everything real. With the gradients cleared in between, the same loop works.

Cases are written as soon as they are measured, and those that are there already are kept. Seconds are CPU time; fused and separate
rounds are timed in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genkit.data.ring import BANDWIDTHS, RADIUS, STD, points, ring_metrics
from genkit.distill.losses import gan_g
from genkit.distill.path import steps_of
from genkit.distill.ring import RingDenoiser, load_student, ring_config, ring_data, train_ring
from genkit.distill.trainer import DistillTrainer
from genkit.files import write_atomic

COUNT = 4096  # samples that are measured
DATA = 16384  # samples to train on
TEACHER_STEPS = (50, 20, 8, 4, 2, 1)
FOUR = (1.0, 0.75, 0.5, 0.25)
CASES: dict[str, dict[str, Any]] = {
    "hinge": {},
    "hinge, separate rounds": {"fused": False},
    "softplus": {"gan": "softplus"},
    "synthetic data": {},
    "+ distillation 0.5": {"distillation": 0.5},
    "+ distillation 2.5": {"distillation": 2.5},
    "distillation only": {"adversarial": 0.0, "distillation": 1.0},
    "no spectral norm": {"spectral_norm": False},
    "noise 0": {"disc_noise": "logit-normal:0,1"},
    "noise 1": {"disc_noise": "logit-normal:1,1"},
    "four levels": {"levels": FOUR, "level_probs": (0.7, 0.1, 0.1, 0.1)},
    "four levels alike": {"levels": FOUR},
    "cleared gradients": {},
    "stale gradients": {},
}


class PublicOrder(DistillTrainer):
    """The ordering of a public trainer. Do not do this.

    The heads are not frozen while the student learns, and their gradients are cleared after the discriminator's step only, so that
    they still hold -dD(fake) when +dD(fake) of its own loss arrives.

    Args:
        clear: clear them in between, which repairs it.
    """

    clear = False

    def _round(self) -> dict[str, float]:
        draw = self.draws(self.step)
        fakes = self.rounds.fakes(draw)
        loss = gan_g(self.discriminator.score(fakes.features, draw.vector, draw.u_fake), self.config.gan)
        loss.backward()
        self.student_optimizer.step()
        self.student_optimizer.zero_grad()
        self.average.update(self.student.trained())
        if self.clear:
            self.heads_optimizer.zero_grad()
        with torch.no_grad():
            fakes = self.rounds.fakes(draw)
        for part, _ in self.rounds.discriminator_losses(draw, self.rounds.references(draw), fakes):
            part.backward()
        self.heads_optimizer.step()
        self.heads_optimizer.zero_grad()
        return {"g_loss": loss.item()}


class ClearedOrder(PublicOrder):
    """The same with the gradients cleared in between."""

    clear = True


ORDERS = {"stale gradients": PublicOrder, "cleared gradients": ClearedOrder}


def distil(name: str, teacher: RingDenoiser, work: Path, **changes: Any) -> Path:
    """The run of a case of `CASES`, below `work`; `changes` replace settings. A run that is there is not made again."""
    folder = work / name.replace(" ", "-")
    if (folder / "run").is_dir():
        return folder / "run"
    x = teacher.sample(DATA, 20, seed=1) if name == "synthetic data" else points(DATA, seed=1)
    data = ring_data(x, teacher, folder / "data", name)
    trainer = ORDERS.get(name, DistillTrainer)(teacher, data, ring_config(**CASES[name] | changes), folder / "run")
    trainer.fit()
    if trainer.interrupted:
        shutil.rmtree(folder)
        raise KeyboardInterrupt
    return folder / "run"


def student_rows(name: str, run: Path, reference: Tensor) -> dict[str, dict[str, float]]:
    """The figures of a case's student by the name of the row."""
    student = load_student(run)
    levels = CASES[name].get("levels", (1.0,))
    samples = {name: student.few_steps(COUNT, (1.0,))}
    if len(levels) > 1:
        samples = {f"{name}, {n} renoised": student.few_steps(COUNT, steps_of(levels, n)) for n in (1, 2, 4)}
        samples[f"{name}, 4 of the ODE"] = student.sample(COUNT, 4)
    rows = {row: ring_metrics(x, reference) for row, x in samples.items()}
    rows[next(iter(rows))]["last"] = ring_metrics(load_student(run, "last").few_steps(COUNT, (1.0,)), reference)["mmd"]
    return rows


def seconds_of_rounds(teacher: RingDenoiser, folder: Path, rounds: int) -> dict[str, float]:
    """Median CPU seconds of a fused and of a separate round, in turn."""
    data = ring_data(points(DATA, seed=1), teacher, folder / "data", "ring")
    configs = {"fused": ring_config(), "separate": ring_config(fused=False)}
    trainers = {kind: DistillTrainer(teacher, data, config, folder / kind) for kind, config in configs.items()}
    times: dict[str, list[float]] = {kind: [] for kind in configs}
    for _ in range(rounds):
        for kind, trainer in trainers.items():
            start = time.process_time()
            trainer._round()
            trainer.step += 1
            times[kind].append(time.process_time() - start)
    medians = {kind: statistics.median(found) for kind, found in times.items()}
    return medians | {"ratio": medians["fused"] / medians["separate"]}


def measure(out: Path, work: Path, rounds: int, seed: int, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The document, with the cases of `out`; each is written when it is done."""
    setting = {"rounds": rounds, "seed": seed, "count": COUNT, "radius": RADIUS, "std": STD, "bandwidths": list(BANDWIDTHS)}
    machine = {"device": f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__, "python": platform.python_version()}
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if document.get("setting") != setting:
        document = {"machine": machine, "setting": setting, "teacher": {}, "students": {}, "seconds of a round": {}}

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, (json.dumps(document, indent=2) + "\n").encode())

    teacher, reference = train_ring(work, seed=seed), points(COUNT, seed=2)
    samples = {"ring": points(COUNT, seed=3)} | {f"teacher, {n}": teacher.sample(COUNT, n) for n in TEACHER_STEPS}
    document["teacher"] = {name: ring_metrics(x, reference) for name, x in samples.items()}
    for name in CASES:
        if name not in document["students"] and wanted(name):
            document["students"][name] = student_rows(name, distil(name, teacher, work, steps=rounds, seed=seed), reference)
            write()
    if not document["seconds of a round"] and wanted("seconds"):
        document["seconds of a round"] = seconds_of_rounds(teacher, work / "seconds", 200)
        write()
    return document


def draw(file: Path, work: Path, rounds: int, seed: int) -> None:
    """A picture of the ring, the teacher in 50, 4 and 1 steps, the student in one, and what fails."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    teacher = train_ring(work, seed=seed)
    shown = {"ring": points(COUNT)} | {f"teacher, {n} step{'s' * (n > 1)}": teacher.sample(COUNT, n) for n in (50, 4, 1)}
    for name in ("hinge", "distillation only", "stale gradients"):
        student = load_student(distil(name, teacher, work, steps=rounds, seed=seed))
        shown[f"{name}, 1 step"] = student.few_steps(COUNT, (1.0,))
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3 * len(shown), 3.2), sharex=True, sharey=True)
    for axis, (title, x) in zip(axes, shown.items(), strict=True):
        axis.scatter(*x.T, s=1, alpha=0.3)
        axis.set(title=title, xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ring.json"))
    parser.add_argument("--work", type=Path, help="a folder that keeps the teacher and the runs of this seed and these rounds")
    parser.add_argument("--picture", type=Path, help="a PNG of the samples")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        document = measure(arguments.out, work, arguments.rounds, arguments.seed, lambda name: arguments.only in name)
        if arguments.picture:
            draw(arguments.picture, work, arguments.rounds, arguments.seed)
    columns = {"mmd": "mmd", "hq": "hq", "min_mode": "min mode", "std": "std", "last": "last"}
    table = Table("", *columns.values(), box=None)
    students = {name: row for rows in document["students"].values() for name, row in rows.items()}
    for name, row in (document["teacher"] | students).items():
        table.add_row(name, *(f"{row[column]:.4g}" if column in row else "" for column in columns))
    console = Console(width=110)
    console.print(table)
    console.print("CPU seconds of a round:", document["seconds of a round"])


if __name__ == "__main__":
    main()
