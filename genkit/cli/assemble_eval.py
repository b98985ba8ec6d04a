"""`genkit assemble-eval`: how well objects whose assembly is known are put together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.cli.common import BAD_INPUT, INTERRUPTED, PARTLY, Debug, Json, Output, Quiet, command, option

if TYPE_CHECKING:
    from genkit.assembly import PartSet

_WHAT, _HOW, _WHERE = "What to assemble", "How", "Files"


def assemble_eval(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder of objects in their assembled pose (folders of meshes, .glb, .npz), the PartNet assembly benchmark's "
            "folder (with --category and --split), or generated furniture: furniture:chair, furniture:table:held-out.",
        ),
    ],
    model: Annotated[
        str | None,
        option(
            _WHAT, "Assemble on what this point-cloud model draws of the category.", show_default="on a sample of the true shape"
        ),
    ] = None,
    points: Annotated[int, option(_WHAT, "Points of the sample of the true shape.", min=64)] = 8192,
    category: Annotated[str | None, option(_WHAT, "Of the benchmark, and for a model.", show_default="the data's own")] = None,
    split: Annotated[str, option(_WHAT, "Of the benchmark: train, val or test. Its published scripts take val.")] = "val",
    level: Annotated[int, option(_WHAT, "Of the benchmark, 1 to 3.", min=1, max=3)] = 3,
    limit: Annotated[int | None, option(_WHAT, "Objects at most.", min=1, show_default="all; 50 of generated ones")] = None,
    protocol: Annotated[str, option(_HOW, "strict, dgl or mpa, see genkit.assembly.metrics.")] = "strict",
    preset: Annotated[str, option(_HOW, "search, or paper: the published loop from random poses, without the truth.")] = "search",
    hypotheses: Annotated[int, option(_HOW, "Assemblies of each object.", min=1)] = 16,
    templates: Annotated[
        int | None, option(_HOW, "Samples of the model.", min=1, show_default="4 of a model that is told the parts, else 16")
    ] = None,
    template_steps: Annotated[int, option(_HOW, "Steps of DPM-Solver++ for each sample.", min=1)] = 20,
    seed: Annotated[int, option(_HOW, "Of everything random.", min=0)] = 0,
    out: Annotated[Path | None, option(_WHERE, "JSON file: settings, summary and a row for each object, as they are done.")] = None,
    resume: Annotated[bool, option(_WHERE, "Keep the rows of --out, and do the others.", "--resume")] = False,
    allow_pickle: Annotated[bool, option(_WHERE, "Read the benchmark's pickles, restricted to arrays.", "--allow-pickle")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Take objects apart, turn their parts at random, put them together, and measure.

    The truth reaches nothing but the measures; without --model, an independent sample of the true shape is the reference.

    Examples:

        [bold]genkit assemble-eval chairs --out chairs.json[/bold]

        [bold]genkit assemble-eval furniture:chair --model furniture --limit 50[/bold]

        [bold]genkit assemble-eval partnet --category chair --split test --protocol dgl --allow-pickle[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.assembly.metrics import PROTOCOLS
        from genkit.errors import unknown

        for kind, name, known in (("protocol", protocol, PROTOCOLS), ("preset", preset, ("search", "paper"))):
            if name not in known:
                raise unknown(kind, name, known)
        settings = {
            "data": data, "model": model, "points": points, "category": category, "split": split, "level": level,
            "protocol": protocol, "preset": preset, "hypotheses": hypotheses, "templates": templates,
            "template_steps": template_steps, "seed": seed,
        }  # fmt: skip
        rows = _kept(out, settings, resume)
        job = _Job(settings, rows, out, output)
        try:
            job.run(_objects(data, category, split, level, limit, seed, allow_pickle))
        except KeyboardInterrupt:
            output.note(f"Interrupted after {len(job.rows)} objects." + (" Repeat with --resume to finish." if out else ""))
            raise typer.Exit(INTERRUPTED) from None
        job.report()


class _Job:
    """A run over objects: rows as they are done, what failed, the report."""

    def __init__(self, settings: dict[str, Any], rows: list[dict[str, Any]], out: Path | None, output: Output) -> None:
        self.settings, self.rows, self.out, self.output = settings, rows, out, output
        self.failed: dict[str, str] = {}

    def run(self, objects: Iterator[tuple[str, Any]]) -> None:
        from genkit.console import progress
        from genkit.pipelines import PartAssemblyPipeline

        model = self.settings["model"]
        pipe = PartAssemblyPipeline() if model is None else PartAssemblyPipeline.from_zoo(model)
        done = {row["object"] for row in self.rows}
        with progress() as bar:
            task = bar.add_task("assemble", total=None)
            for name, read in objects:
                bar.update(task, description=name)
                if name not in done:
                    try:
                        self.rows.append({"object": name, **self._measure(pipe, read())})
                    except (ValueError, FloatingPointError, OSError) as error:
                        self.failed[name] = str(error)
                        self.output.note(f"{name}: {error}")
                    self._write()
                bar.advance(task)

    def _measure(self, pipe: Any, parts: PartSet) -> dict[str, Any]:
        """The row of one object."""
        import time

        from genkit.assembly import evaluate
        from genkit.data.objects import centred, reference_cloud

        how = self.settings
        given: dict[str, Any] = {"category": how["category"] or parts.category}
        if how["model"] is None:
            given = {"reference": reference_cloud(parts, how["points"], how["seed"] + 1000)}
        else:
            parts = centred(parts)
        began = time.process_time()
        out = pipe(
            parts, num_hypotheses=how["hypotheses"], num_templates=how["templates"],
            template_steps=how["template_steps"], seed=how["seed"], preset="paper" if how["preset"] == "paper" else None, **given,
        )  # fmt: skip
        seconds = time.process_time() - began
        measures = evaluate(out.poses, parts, how["protocol"])
        best = measures.get("best_part_accuracy", measures["part_accuracy"])
        if "agreement" in out.scores:
            measures["agreement"] = float(out.scores["agreement"][0])
        return {
            **measures, "first_is_best": measures["part_accuracy"] >= best, "hypotheses": len(out.poses),
            "verdict": out.verdict.word, "tied": out.verdict.tied, "energy": float(out.scores["energy"][0]), "seconds": seconds,
        }  # fmt: skip

    def summary(self) -> dict[str, float]:
        from statistics import mean, median

        from genkit.assembly import summarise

        seconds = [row["seconds"] for row in self.rows]
        agreement = [row["agreement"] for row in self.rows if "agreement" in row]
        return {
            **summarise(self.rows), "first_is_best": mean(row["first_is_best"] for row in self.rows),
            **({"agreement": mean(agreement)} if agreement else {}),
            "seconds_median": median(seconds), "seconds_max": max(seconds),
        }  # fmt: skip

    def document(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "summary": self.summary() if self.rows else None,
            "rows": self.rows,
            "failed": self.failed,
        }

    def _write(self) -> None:
        from genkit.files import write_atomic

        if self.out is not None:
            write_atomic(self.out, (json.dumps(self.document(), indent=1) + "\n").encode())

    def report(self) -> None:
        """Print the summary.

        Raises:
            typer.Exit: some objects failed.
        """
        lines = [f"{len(self.rows)} objects, {len(self.failed)} failed ({self.settings['protocol']})"]
        if self.rows:
            lines += [f"{key:24s} {value:.4g}" for key, value in self.summary().items() if key != "objects"]
        self.output.result(self.document(), "\n".join(lines))
        if self.failed:
            raise typer.Exit(PARTLY if self.rows else BAD_INPUT)


def _kept(out: Path | None, settings: dict[str, Any], resume: bool) -> list[dict[str, Any]]:
    """Rows of a run that is gone on with.

    Raises:
        ValueError: there are rows that were not asked for, or of other settings; the file holds something else.
    """
    if out is None or not out.exists():
        return []
    if not resume:
        raise ValueError(f"{str(out)!r} exists. Add --resume to go on with it, or name another --out.")
    try:
        document = json.loads(out.read_text(encoding="utf-8"))
        before, rows = document["settings"], document["rows"]
    except (ValueError, KeyError, TypeError, RecursionError):
        before, rows = None, None
    if not isinstance(before, dict) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(out)!r} holds no rows of assemble-eval. Name another --out.")
    changed = sorted(key for key in settings if before.get(key) != settings[key])
    if changed:
        raise ValueError(f"{str(out)!r} was made with other settings ({', '.join(changed)}). Name another --out.")
    return rows


def _objects(
    data: str, category: str | None, split: str, level: int, limit: int | None, seed: int, allow_pickle: bool
) -> Iterator[tuple[str, Any]]:
    """Names of objects, and functions that read them."""
    from functools import partial

    from genkit.data.furniture import draw
    from genkit.data.meshes import read_parts
    from genkit.data.objects import find_objects
    from genkit.data.partnet import load_partnet

    if data.startswith("furniture:"):
        kind, _, part = data.removeprefix("furniture:").partition(":")
        draw(kind, 0, part or "test")  # a wrong name is an error before anything else is done
        for i in range(limit or 50):
            yield f"{kind}-{part or 'test'}-{i}", lambda i=i: draw(kind, i, part or "test").parts(seed=seed)
        return
    root = Path(data).expanduser()
    if category is not None and (root / "shape_data").is_dir():
        shapes = load_partnet(root, category, split, level, allow_pickle=allow_pickle)
        for i in range(min(limit or len(shapes), len(shapes))):
            yield f"{category}-{shapes.ids[i]}", partial(shapes.__getitem__, i)
        return
    for path in find_objects(root)[:limit]:
        yield str(path.relative_to(root)), partial(read_parts, path, seed=seed)
