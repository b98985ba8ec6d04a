"""What DreamTeacher gives a ResNet-18 on digits: linear probes, fine-tuning, segmentation with few labels; and what a step costs.

    python benchmarks/dreamteacher.py [--work DIR] [--only step,pretrain,probe,...] [--draws 3] [--threads 2] [--device cuda]
    python benchmarks/dreamteacher.py --sweep t=(30,) t=(250,) attention=0.0 mse=0.0 regressor=fpn encoding=ddim whitening=c

The backbones are pretrained on the training digits without labels (16,000 pictures of 4,000 handwritten digits), or with 40:

    random                  not pretrained: fine-tuned, it is supervised learning from scratch
    features                the teacher's features
    mix-classes, mix-masks  and soft labels of an interpreter that knows the classes, or the label maps, of 40 pictures
    simclr                  contrastive learning for as many steps; simclr-time for as many seconds as `features` took

Labels are those of 1 %, 10 % and 100 % of the 4,000 digits, drawn `--draws` times (or as `DRAWS` says); the test is on 1,000 held-
out digits. A probe is ridge regression on the frozen backbone's levels, pooled to 4 x 4 places. Fine-tuning trains everything, with
a fresh linear layer on the means of the levels; all have the same augmentation and steps, and each contender that learning rate of
`RATES` which is best on 1,000 other training digits, for other draws of labels (`VALIDATED`). Segmentation tells for each pixel
paper from ten digits, at one rate. A row is written as soon as it is there, and an interrupted run goes on where it stopped.
`--sweep` pretrains with one setting changed at a time, for fewer steps, and probes.
Several processes can share the work, each with its own `--contenders`, `--work` and `--out`; `--merge` puts their rows together;
`--plot FILE` draws the label-efficiency curves.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from clock import machine
from label_efficiency import label_rows, measure, pooled, probe_accuracy, simclr, tuned
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genkit.data.source import ImageSource, open_source
from genkit.denoisers import Denoiser
from genkit.distill import DreamTeacher, DreamTeacherConfig
from genkit.distill.dreamteacher_data import labels_of
from genkit.distill.dreamteacher_student import Backbone, DreamStudent, create_backbone
from genkit.distill.dreamteacher_teacher import TeacherLevels, decoder_taps
from genkit.features import FeatureExtractor
from genkit.files import write_atomic
from genkit.runner import load
from genkit.training import TrainConfig

COUNTS = {"1 %": 40, "10 %": 400, "100 %": 4000}
TASKS = {"classification": "accuracy", "segmentation": "miou"}
KINDS = "step,pretrain,probe,classification,segmentation"
CONTENDERS = ("random", "features", "mix-classes", "mix-masks", "simclr", "simclr-time")
MIXES = {"mix-classes": "classification", "mix-masks": "segmentation"}
TUNED = [
    ("segmentation", "1 %"), ("classification", "10 %"), ("classification", "1 %"), ("segmentation", "10 %"),
    ("classification", "100 %"), ("segmentation", "100 %"),
]  # fmt: skip
DRAWS = {("classification", "10 %"): 5}  # at least: the differences are small
STEPS = {"1 %": 300, "10 %": 400, "100 %": 800}
RATES, VALIDATED, VALIDATION = (3e-3, 6e-3), (10, 11), 1000
# Of 3e-4, 1e-3 and 3e-3 the last is best from scratch, and for segmentation with pretraining too.
TUNE = TrainConfig(steps=1, batch_size=40, lr=3e-3, warmup=20, weight_decay=0.05, ema_decay=0.0, checkpoint_seconds=600)


class Bench:
    """The rows of the benchmark, kept in a JSON file.

    Args:
        out: the file.
        work: folder of runs.
        draws: of labels.
        config: of the pretraining.
        device: of everything.
        contenders: those that are measured.
        time_steps: of "simclr-time", where it is known how many there are time for.
        short: how many times shorter fine-tuning is, for a try.
    """

    def __init__(
        self, out: Path, work: Path, draws: int, config: DreamTeacherConfig, *, device: str = "cpu",
        contenders: Sequence[str] = CONTENDERS, time_steps: int | None = None, short: int = 1,
    ) -> None:  # fmt: skip
        self.out, self.work, self.draws, self.config, self.device = out, work, draws, config, device
        self.contenders, self.time_steps, self.short = contenders, time_steps, short
        self.rows: dict[str, Any] = json.loads(out.read_text()).get("rows", {}) if out.exists() else {}
        self.train, self.test = self._source("digits", 4000), self._source("digits-test", 1000)
        self._backbones: dict[str, Backbone] = {}

    def _source(self, name: str, count: int | None = None) -> ImageSource:
        """Digits; all in memory where a GPU would wait for a CPU to scale them."""
        source, side = open_source(name, count), self.config.size or 32
        return source if self.device == "cpu" else source.held((side, side), self.device)

    def row(self, name: str, make: Callable[[], Any]) -> Any:
        """A row that is there, or is made now."""
        if name not in self.rows:
            began = time.monotonic()
            self.rows[name] = {**make(), "row_seconds": round(time.monotonic() - began, 1)}
            write(self.out, {"machine": machine(self.device), "config": self.config.to_json(), "rows": self.rows})
            print(name, json.dumps(self.rows[name])[:200], flush=True)
        return self.rows[name]

    def backbone(self, name: str) -> Backbone:
        """A contender's weights, pretrained if they are not there."""
        if name not in self._backbones:
            self._backbones[name] = self._pretrained(name).to(self.device)
        return self._backbones[name].eval()

    def _fresh(self) -> Backbone:
        side = self.config.size or 32
        torch.manual_seed(self.config.train.seed)
        return Backbone(create_backbone(self.config.backbone, (side, side)), (side, side))

    def _pretrained(self, name: str) -> Backbone:
        config, folder = self.config, self.work / name
        if name == "random":
            return self._fresh()
        if name.startswith("simclr"):
            steps = config.train.steps
            if name == "simclr-time" and self.time_steps:
                steps = self.time_steps
            elif name == "simclr-time":
                seconds = {key: self.row(f"pretrain {key}", lambda key=key: self.pretrain(key)) for key in ("features", "simclr")}
                steps = round(steps * seconds["features"]["seconds"] / seconds["simclr"]["seconds"])
            loop = dataclasses.replace(config.train, steps=steps, lr=1e-3)
            return simclr(self._fresh(), self._source("digits"), loop, folder, self.device)
        if name in MIXES:
            config = dataclasses.replace(config, label=1.0, task=MIXES[name], labelled=40)
        return distilled(config, folder, self.device).backbone

    def pretrain(self, name: str) -> dict[str, float]:
        """Seconds of a contender's pretraining, as its log has them (over interruptions), its steps and the last loss."""
        self.backbone(name)
        if name == "random":
            return {"seconds": 0.0}
        seconds, loss, step = 0.0, float("nan"), 0
        for file in sorted((self.work / name).rglob("log.jsonl")):  # the interpreter's first
            last = 0.0
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                # The clock begins anew where a run goes on.
                seconds += entry["seconds"] - (last if entry["seconds"] >= last else 0.0)
                last, loss, step = entry["seconds"], entry["loss"], entry["step"]
        return {"seconds": seconds, "steps": step, "loss": loss}

    def probe(self, name: str) -> dict[str, Any]:
        """Accuracy of linear probes."""
        backbone = self.backbone(name)
        train, test = pooled(backbone, self.train), pooled(backbone, self.test)
        truth, _ = labels_of(self.test, range(len(self.test)), (1, 1), dense=False)
        labels, _ = labels_of(self.train, range(len(self.train)), (1, 1), dense=False)
        return {key: summary(self._probes(count, train, labels, test, truth)) for key, count in COUNTS.items()}

    def _probes(self, count: int, train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> list[float]:
        chosen = [label_rows(self.train, count, draw, "classification") for draw in range(1 if count == 4000 else self.draws)]
        return [probe_accuracy(train[rows], labels[rows], test, truth) for rows in chosen]

    def tune(self, name: str, task: str, key: str, draw: int) -> dict[str, Any]:
        """Figures of a contender, fine-tuned on a draw of labels."""
        return self._tuned(name, task, key, draw, self.rate(name) if task == "classification" else TUNE.lr, self.test)

    def rate(self, name: str) -> float:
        """The learning rate of a contender's fine-tuning for classification."""
        found = {
            lr: [self.row(f"rate {name} {lr:g} {draw}", lambda a=(lr, draw): self._validate(name, *a)) for draw in VALIDATED]
            for lr in RATES
        }
        return max(found, key=lambda lr: sum(row["accuracy"] for row in found[lr]))

    def _validate(self, name: str, lr: float, draw: int) -> dict[str, Any]:
        """Accuracy on training digits whose labels were not drawn."""
        drawn = set(label_rows(self.train, COUNTS["10 %"], draw, "classification"))
        others = [row for row in range(len(self.train)) if row not in drawn]
        chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(draw))[:VALIDATION].tolist()
        return self._tuned(name, "classification", "10 %", draw, lr, self.train.subset([others[i] for i in sorted(chosen)]))

    def _tuned(self, name: str, task: str, key: str, draw: int, lr: float, test: ImageSource) -> dict[str, Any]:
        rows = label_rows(self.train, COUNTS[key], draw, task)
        config = dataclasses.replace(TUNE, steps=STEPS[key] // self.short, seed=draw, lr=lr)
        folder = self.work / "tuned" / f"{name}-{task}-{COUNTS[key]}-{draw}-{lr:g}"
        figures = measure(tuned(self.backbone(name), task, self.train, rows, config, folder), task, test)
        (folder / "checkpoint.pt").unlink()  # the row is what is kept
        return {**figures, "lr": lr}

    def run(self, only: list[str]) -> None:
        """All rows of the kinds in `only`, the ones that matter most first."""
        if "step" in only:
            self.row("step", lambda: adm_step(self.device))
            self.row("step, digits", lambda: digits_step(self.config, self.device))
        for name in self.contenders:
            if "pretrain" in only:
                self.row(f"pretrain {name}", lambda name=name: self.pretrain(name))
            if "probe" in only:
                self.row(f"probe {name}", lambda name=name: self.probe(name))
        for task, key in TUNED:
            for draw in range(max(self.draws, DRAWS.get((task, key), 0)) if COUNTS[key] < 4000 else 1):
                for name in self.contenders if task in only else ():
                    self.row(f"{task} {name} {key} {draw}", lambda a=(name, task, key, draw): self.tune(*a))

    def sweep(self, changes: list[str], steps: int) -> None:
        """A probe for each change of one setting, and without any."""
        for change in ["", *changes]:
            name, _, value = change.partition("=")
            loop = dataclasses.replace(self.config.train, steps=steps, warmup=min(self.config.train.warmup, steps // 10))
            config = dataclasses.replace(self.config, train=loop, **({name: literal(value)} if name else {}))
            label = f"sweep {steps} {change or 'as it is'}"

            def probed(config: DreamTeacherConfig = config, label: str = label) -> dict[str, Any]:
                folder = self.work / label.replace("/", "-")
                self._backbones[label] = distilled(config, folder, self.device).backbone
                return self.probe(label)

            self.row(label, probed)


def literal(value: str) -> Any:
    """A setting's value: a number or tuple, else a text."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def write(out: Path, document: dict[str, Any]) -> None:
    """Write a result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, (json.dumps(document, indent=2) + "\n").encode())


def merge(files: Sequence[Path], out: Path) -> dict[str, Any]:
    """Put the rows of several results, made with one configuration, together with those of `out`; returns the rows."""
    parts = [json.loads(file.read_text()) for file in ([out] if out.exists() else []) + [file for file in files if file != out]]
    if any(part["config"] != parts[0]["config"] for part in parts):
        raise ValueError("The results were made with different configurations.")
    machines: list[dict[str, str]] = []
    for part in parts:
        machines += [m for m in (part["machine"] if isinstance(part["machine"], list) else [part["machine"]]) if m not in machines]
        for row in part["rows"].values():
            row.setdefault("device", part["machine"]["device"] if isinstance(part["machine"], dict) else None)
    rows = {name: row for part in parts for name, row in part["rows"].items()}
    write(out, {"machine": machines, "config": parts[0]["config"], "rows": rows})
    return rows


def distilled(config: DreamTeacherConfig, folder: Path, device: str) -> DreamStudent:
    """A student of `digits`."""
    denoiser = load("digits", device=device).denoiser
    return DreamTeacher(denoiser, open_source("digits"), config, folder).fit(resume=True).eval()


def summary(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over draws."""
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}


def steps_in_turn(
    passes: dict[str, Callable[[], dict[str, Tensor]]], student: DreamStudent, side: int, rounds: int, device: str
) -> dict[str, Any]:
    """Median seconds of a training step with each teacher, in turn, and the ratio of the first to the second."""
    student = student.to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    pictures = torch.randn(len(next(iter(next(iter(passes.values()))().values()))), 3, side, side, device=device)
    kind = torch.device(device).type
    times: dict[str, list[float]] = {name: [] for name in passes}

    def step(teach: Callable[[], dict[str, Tensor]]) -> None:
        teacher = teach()
        with torch.autocast(kind, torch.bfloat16):
            found, _ = student(pictures)
        loss = torch.stack([(found[key].float() - value).square().mean() for key, value in teacher.items()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if kind == "cuda":
            torch.cuda.synchronize()

    for teach in passes.values():
        step(teach)  # the first of each compiles, chooses and allocates
    for _ in range(rounds):
        for name, teach in passes.items():
            began = time.perf_counter()
            step(teach)
            times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in times.items()}
    first, second = median.values()
    return {**{f"{name} seconds": value for name, value in median.items()}, "ratio": first / second, "rounds": rounds}


def teachers(denoiser: Denoiser, taps: list[str], t: int, batch: int) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """The teacher as it trains, and the whole pass in float32."""
    x0 = torch.randn(batch, *denoiser.latent_shape(None, None), device=denoiser.device)
    fast, slow = TeacherLevels(denoiser, taps, [t], bf16=True), FeatureExtractor(denoiser, taps, t=t, early_exit=False)
    return {"early exit, bf16": lambda: fast(x0), "full pass, fp32": lambda: slow(latents=x0)}


def adm_step(device: str) -> dict[str, Any]:
    """A step of a ResNet-18 at 256 pixels with a teacher of ADM-256's layout, random weights; on a CPU a quarter of its width."""
    gpu = torch.device(device).type == "cuda"
    width, batch, rounds = (256, 8, 9) if gpu else (64, 2, 5)
    with torch.device(device):
        network = diffusers.UNet2DModel(
            sample_size=256, out_channels=6, block_out_channels=tuple(width * k for k in (1, 1, 2, 2, 4, 4)), layers_per_block=2,
            attention_head_dim=64, downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
            down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
            up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",) * 3,
        )  # fmt: skip
    pipe = diffusers.DDPMPipeline(network.eval().requires_grad_(False), diffusers.DDPMScheduler()).to(device)
    denoiser = Denoiser.of(pipe)
    backbone = Backbone(create_backbone("resnet18", (256, 256)), (256, 256))
    taps = decoder_taps(denoiser, [(h, w) for _, h, w in backbone.levels])
    passes = teachers(denoiser, taps, 50, batch)
    student = DreamStudent(backbone, TeacherLevels(denoiser, taps).shapes)
    return steps_in_turn(passes, student, 256, rounds, device) | {"width": width, "batch": batch}


def digits_step(config: DreamTeacherConfig, device: str, rounds: int = 9) -> dict[str, Any]:
    """A step of the pretraining on digits, where the student costs more than the teacher."""
    side, denoiser = config.size or 32, load("digits", device=device).denoiser
    passes = teachers(denoiser, [str(tap) for tap in config.taps], config.t[0], config.train.batch_size)
    backbone = Backbone(create_backbone(config.backbone, (side, side)), (side, side))
    student = DreamStudent(backbone, TeacherLevels(denoiser, config.taps).shapes, width=config.width)
    return steps_in_turn(passes, student, side, rounds, device)


def report(rows: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    table = Table("pretraining", "minutes", *(f"probe, {key}" for key in COUNTS), box=None)
    for name in CONTENDERS:
        probe = rows.get(f"probe {name}", {})
        cells = [f"{probe[key]['mean']:.1%} +- {probe[key]['spread']:.1%}" if key in probe else "" for key in COUNTS]
        table.add_row(name, f"{rows.get(f'pretrain {name}', {}).get('seconds', 0) / 60:.1f}", *cells)
    console.print(table)
    for task, figure in TASKS.items():
        table = Table(f"{task}, {figure}", *COUNTS, box=None)
        for name in CONTENDERS:
            cells = []
            for key in COUNTS:
                values = [rows[label][figure] for draw in range(100) if (label := f"{task} {name} {key} {draw}") in rows]
                cells.append(f"{summary(values)['mean']:.1%} +- {summary(values)['spread']:.1%}" if values else "")
            table.add_row(name, *cells)
        console.print(table)
    table = Table("sweep", *(f"probe, {key}" for key in COUNTS), box=None)
    for label, row in rows.items():
        if label.startswith("sweep"):
            table.add_row(label, *(f"{row[key]['mean']:.1%}" for key in COUNTS))
        elif label.startswith("step"):
            console.print(f"{label}: early exit and bf16 / full pass in float32 = {row['ratio']:.3f}")
    console.print(table)


def plot(rows: dict[str, Any], file: Path) -> None:
    """Draw the label-efficiency curves of the probes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for name in CONTENDERS:
        if f"probe {name}" in rows:
            found = [rows[f"probe {name}"][key] for key in COUNTS]
            means, spreads = ([100 * cell[what] for cell in found] for what in ("mean", "spread"))
            axes.errorbar(list(COUNTS.values()), means, spreads, marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="labelled digits", ylabel="accuracy of a linear probe, %", ylim=(0, 100))
    axes.set_xticks(list(COUNTS.values()), [str(count) for count in COUNTS.values()])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("dreamteacher"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dreamteacher.json"))
    parser.add_argument("--only", help="kinds of rows: step,pretrain,probe,classification,segmentation; all but for a sweep")
    parser.add_argument("--draws", type=int, default=3, help="of labels")
    parser.add_argument("--steps", type=int, help="of the pretraining")
    parser.add_argument("--size", type=int, help="side of the backbone's pictures")
    parser.add_argument("--sweep", nargs="*", default=[], metavar="NAME=VALUE", help="settings to change, one at a time")
    parser.add_argument("--sweep-steps", type=int, default=300)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--time-steps", type=int, help="of simclr-time; by default as the times of the other two have it")
    parser.add_argument("--short", type=int, default=1, help="divides the steps of fine-tuning, for a try")
    parser.add_argument("--merge", type=Path, nargs="+", help="results whose rows go into --out, instead of measuring")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of the rows in --out, instead of measuring")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.merge:
        report(merge(arguments.merge, arguments.out))
        return
    if arguments.plot:
        plot(json.loads(arguments.out.read_text())["rows"], arguments.plot)
        return
    torch.set_num_threads(arguments.threads)
    config = DreamTeacherConfig.preset("digits", teacher="digits", steps=arguments.steps, size=arguments.size)
    bench = Bench(
        arguments.out, arguments.work, arguments.draws, config, device=arguments.device,
        contenders=arguments.contenders.split(","), time_steps=arguments.time_steps, short=arguments.short,
    )  # fmt: skip
    if arguments.only or not arguments.sweep:
        bench.run((arguments.only or KINDS).split(","))
    if arguments.sweep:
        bench.sweep(arguments.sweep, arguments.sweep_steps)
    report(bench.rows)


if __name__ == "__main__":
    main()
