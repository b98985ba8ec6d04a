"""What a diffusion classifier saves by computing once what its evaluations share: one image against many prompts.

    python benchmarks/folding.py [--rounds 7] [--only TEXT] [--out benchmarks/results/folding.json]

    plain        every row of a batch has its prompt, and all of the network is evaluated for it (fold=False)
    cached       each layer projects each prompt to keys and values once; rows read copies of them
    folded       the same, and the rows of a prompt are folded into the query length: no copies
    folded, prefix shared    the same, and what comes before the first cross-attention is computed once a sample: genkit's default

Every run scores the image from scratch, projections of the prompts included, with every prompt on every pair. "race" is genkit's
default policy on several images, whose batches are ragged. All variants are timed in turn within each round (CPU time on a CPU, so
that other processes do not count); the ratio is the median of the rounds' ratios. Operations are counted by torch (matrix products,
convolutions, attention); memory is the most that a run allocates beyond what is there before. Losses, and scores of a race, are
compared with those of the plain batch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from clock import seconds
from diffusion_classifier import COMBINATIONS
from distill_rounds import added_bytes, middle_sized
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genkit.attention import folding
from genkit.data import digits
from genkit.denoisers import Denoiser
from genkit.files import write_atomic
from genkit.pipelines import GuidedPipeline
from genkit.scoring import PairPlan, Race, Scorer

BATCH = 128


def single_rows(prompts: Tensor) -> folding.Layout:
    """A layout that folds nothing."""
    order = torch.argsort(prompts, stable=True)
    return folding.Layout(order, 1, prompts[order], prompts[:0])


def no_prefix(*arguments: Any) -> list[Any]:
    """As `trace`, with nothing found."""
    trace(*arguments)
    return []


trace = folding.trace
WITHOUT = {
    "cached": [mock.patch.object(folding.Layout, "of", single_rows), mock.patch.object(folding, "trace", no_prefix)],
    "folded": [mock.patch.object(folding, "trace", no_prefix)],
}


Cases = dict[str, Callable[[], Tensor]]


def encoded(denoiser: Denoiser, count: int) -> Tensor:
    """Clean samples of pictures."""
    side = denoiser.latent_shape(None, None)[-1] * denoiser.factor
    images = torch.nn.functional.interpolate(digits.draw("test", count, seed=0).images, (side, side))
    with torch.no_grad():
        return denoiser.encode(images.to(denoiser.device))


def races(pipe: Any, prompts: list[str], pairs: int, images: int) -> Cases:
    """Functions that return the scores (I, K) of a race on pictures."""
    denoiser = Denoiser.of(pipe)
    cond, x0 = denoiser.condition(prompts=prompts), encoded(denoiser, images)

    def run(fold: bool) -> Callable[[], Tensor]:
        def scores() -> Tensor:
            verdicts = dict(Scorer(denoiser, PairPlan(count=pairs), batch_size=BATCH, fold=fold).run(x0, cond, Race()))
            return torch.stack([torch.from_numpy(verdicts[i].scores) for i in range(images)])

        return scores

    return {"plain": run(False), "folded, prefix shared": run(True)}


def variants(pipe: Any, prompts: list[str], pairs: int) -> Cases:
    """Functions that return the losses (1, K, N) of a picture."""
    denoiser = Denoiser.of(pipe)
    cond, x0 = denoiser.condition(prompts=prompts), encoded(denoiser, 1)
    plan = PairPlan(count=pairs).pairs(pipe.scheduler, x0.shape[1:])

    def run(name: str) -> Callable[[], Tensor]:
        def losses() -> Tensor:
            with contextlib.ExitStack() as stack:
                for patch in WITHOUT.get(name, []):
                    stack.enter_context(patch)
                return denoiser.losses(x0, plan, cond, batch_size=BATCH, fold=name != "plain")

        return losses

    return {name: run(name) for name in ("plain", "cached", "folded", "folded, prefix shared")}


def operations(function: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measure(cases: Cases, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds, ratios, operations and bytes of each variant."""
    plain = cases["plain"]()
    rows: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        difference = float(((case() - plain) / plain).abs().max())
        rows[name] = {"operations": operations(case), "added_bytes": added_bytes(case), "largest_relative_difference": difference}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(seconds(case))
    for name, values in times.items():
        ratios = [a / b for a, b in zip(times["plain"], values, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] |= {"seconds": statistics.median(values), "plain_over_this": middle, "quartiles": [low, high]}
        rows[name]["operations_of_plain"] = rows[name]["operations"] / rows["plain"]["operations"]
    return rows


def main() -> None:
    """Measure each case, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/folding.json"))
    arguments = parser.parse_args()
    ten = [digits.with_articles(f"a {name}") for name in digits.DIGITS]
    hundred = [digits.caption(digit, *pair) for digit in range(10) for pair in COMBINATIONS]
    small = ("digits", lambda: GuidedPipeline.from_pretrained("digits").host)
    middle = ("Stable Diffusion, 1/5 of the width", middle_sized)
    cases = [(*small, ten, 64, 1), (*small, hundred, 16, 1), (*small, ten, 64, 20), (*middle, ten, 16, 1), (*middle, hundred, 8, 1)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": named, "torch": torch.__version__, "python": platform.python_version()}
    document: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found = document.setdefault("cases", {})
    for network, make, prompts, pairs, images in cases:
        title = f"{network}: {len(prompts)} prompts" + (f", race on {images} images" if images > 1 else "")
        if arguments.only in title:
            pipe = make().to(device)
            compared = races(pipe, prompts, pairs, images) if images > 1 else variants(pipe, prompts, pairs)
            settings = {"prompts": len(prompts), "pairs": pairs, "batch": BATCH, "rounds": arguments.rounds}
            found[title] = {"machine": machine, **settings, "rows": measure(compared, arguments.rounds)}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(arguments.out, (json.dumps(document, indent=2) + "\n").encode())
    for title, result in found.items():
        table = Table("", "s", "plain / this", "quartiles", "operations", "MB added", "difference", box=None)
        table.title = f"{title}, {result['pairs']} pairs, batch {result['batch']}"
        for name, row in result["rows"].items():
            table.add_row(
                name, f"{row['seconds']:.2f}", f"{row['plain_over_this']:.3f}", "{:.3f} to {:.3f}".format(*row["quartiles"]),
                f"{row['operations_of_plain']:.3f}", f"{row['added_bytes'] / 1e6:.0f}", f"{row['largest_relative_difference']:.0e}",
            )  # fmt: skip
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
