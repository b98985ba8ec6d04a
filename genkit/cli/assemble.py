"""`genkit assemble`: the parts of an object, put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from genkit.cli.common import Debug, Json, Output, Quiet, command, option

_WHAT, _HOW, _WHERE = "What to assemble", "How", "Files"


def assemble(
    parts: Annotated[
        Path, typer.Argument(metavar="PARTS", help="A folder of meshes (.obj .ply .stl), a .glb scene, .npz or .npy.")
    ],
    out: Annotated[
        Path, option(_WHERE, "Folder for poses.json, assembled.glb, assembled.ply, turntable.png, viewer.html.", "--out", "-o")
    ],
    reference: Annotated[
        Path | None,
        option(_WHAT, "The whole object: a mesh, or a scan (.ply without faces, .npy, .npz), in the lengths of the parts."),
    ] = None,
    category: Annotated[str | None, option(_WHAT, "For a model: chair, table, lamp, cabinet.", show_default="left open")] = None,
    model: Annotated[str, option(_WHAT, "A point-cloud model, where there is no reference: embedded, or a folder.")] = "furniture",
    truth: Annotated[
        str,
        option(
            _WHAT,
            "Whether the parts are in their assembled pose, so that metrics.json can be written: yes, no, auto (if they touch).",
        ),
    ] = "auto",
    hypotheses: Annotated[int, option(_HOW, "Assemblies that are kept.", min=1)] = 16,
    templates: Annotated[int, option(_HOW, "Samples of the model to assemble on.", min=1)] = 8,
    refine: Annotated[int, option(_HOW, "Steps of annealed refinement after the search.", min=0)] = 0,
    seed: Annotated[int, option(_HOW, "Of everything random.", min=0)] = 0,
    protocol: Annotated[str, option(_HOW, "Of metrics.json: strict, dgl or mpa.")] = "strict",
    allow_pickle: Annotated[bool, option(_WHERE, "Read .npy pickles, restricted to arrays.", "--allow-pickle")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Read the parts, say what would be done, and stop.", "--dry-run")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put the parts of an object together.

    The parts may come in any pose: each is turned at random before anything looks at it. Where they come in their assembled pose,
    that pose is the truth of metrics.json, and reaches nothing else.

    Examples:

        [bold]genkit assemble parts/ --reference scan.ply --out assembled[/bold]

        [bold]genkit assemble chair.glb --category chair --out assembled[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.assembly.metrics import PROTOCOLS
        from genkit.data.meshes import read_parts, read_reference
        from genkit.errors import unknown
        from genkit.files import prepare_folder

        if protocol not in PROTOCOLS:
            raise unknown("protocol", protocol, PROTOCOLS)
        if truth not in ("auto", "yes", "no"):
            raise unknown("truth", truth, ("auto", "yes", "no"))
        group = read_parts(parts, truth=truth != "no", allow_pickle=allow_pickle, seed=seed)
        if truth == "auto" and group.meshes is not None and not in_one_piece(group):
            import dataclasses

            group = dataclasses.replace(group, poses=None)
        whole = None if reference is None else read_reference(reference)
        plan = {"parts": list(group.names), "reference": str(reference) if reference else None, "truth": group.poses is not None}
        if dry_run:
            output.result(
                plan, f"Would assemble {len(group)} parts into {out}; the truth is {'' if plan['truth'] else 'not '}known."
            )
            return
        prepare_folder(out)
        settings = {"num_hypotheses": hypotheses, "num_templates": templates, "refine_steps": refine or None, "category": category}
        document = _assemble(output, group, whole, model, out, seed, protocol, plan, settings)
        output.result(document, _told(document, out))


def in_one_piece(parts: Any) -> bool:
    """Whether the parts as they came touch each other, all of them."""
    from genkit.assembly.hypotheses import loose_pieces

    return loose_pieces(parts, parts.frames.double()) == 1


def _assemble(
    output: Output,
    group: Any,
    whole: Any,
    model: str,
    out: Path,
    seed: int,
    protocol: str,
    plan: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    from genkit.assembly import evaluate
    from genkit.assembly.export import write_glb, write_ply, write_poses, write_turntable, write_viewer
    from genkit.console import progress
    from genkit.files import write_atomic
    from genkit.pipelines import PartAssemblyPipeline

    pipe = PartAssemblyPipeline() if whole is not None else _load(PartAssemblyPipeline, model)
    with progress() as bar:
        task = bar.add_task("assemble", total=100)
        result = pipe(
            group, reference=whole, seed=seed, return_history=True,
            on_stage=lambda name, share: bar.update(task, completed=int(100 * share), description=name), **settings,
        )  # fmt: skip
    tie = result.verdict.text
    told = write_poses(
        out / "poses.json", group, result.poses, result.scores, scale=result.scale[0].item(), seed=seed, confidence=tie
    )
    write_ply(out / "assembled.ply", group, result.poses[0])
    if group.meshes is not None:
        write_glb(out / "assembled.glb", group, result.poses[0])
    write_turntable(out / "turntable.png", group, result.poses[0])
    write_viewer(out / "viewer.html", group, result.poses, result.history, tie)
    document = {**plan, "folder": str(out), "confidence": tie, "score": told["score"], "hypotheses": len(result.poses)}
    if group.poses is not None:
        measures = evaluate(result.poses, group, protocol)
        document["metrics"] = {"protocol": protocol, **measures}
        write_atomic(out / "metrics.json", (json.dumps(document["metrics"], indent=2) + "\n").encode())
    return document


def _load(pipeline: Any, model: str) -> Any:
    from genkit import zoo
    from genkit.checkpoints import check_folder
    from genkit.errors import unknown

    folder = zoo.path(model) if model in zoo.names() else Path(model).expanduser()
    if not folder.is_dir():
        if "/" not in model and model == "furniture":
            raise ValueError("There is nothing to assemble on. Give --reference, the whole object as a mesh or a scan.")
        raise unknown("model", model, zoo.names())
    check_folder(folder)
    return pipeline.from_pretrained(str(folder), use_safetensors=True)


def _told(document: dict[str, Any], out: Path) -> str:
    lines = [f"{len(document['parts'])} parts assembled into {out} ({document['confidence']})"]
    if "metrics" in document:
        found = document["metrics"]
        lines.append(
            f"part accuracy {found['part_accuracy']:.2f}, contacts {found['connectivity_accuracy']:.2f}, "
            f"shape Chamfer {found['shape_chamfer']:.5f} ({found['protocol']})"
        )
    return "\n".join(lines)
