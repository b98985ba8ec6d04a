"""`genkit assemble`: the parts of an object, put together."""

from __future__ import annotations

import dataclasses
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
        option(_WHAT, "The whole object: a mesh, or a scan (.ply without faces, .npy, .npz). Poses are in its frame."),
    ] = None,
    category: Annotated[str | None, option(_WHAT, "For a model: chair, table, lamp, cabinet.", show_default="left open")] = None,
    model: Annotated[str, option(_WHAT, "A point-cloud model, where there is no reference: embedded, or a folder.")] = "furniture",
    truth: Annotated[
        str,
        option(
            _WHAT,
            "Whether the parts are in their assembled pose, so that metrics.json can be written: yes, no, auto (if most touch).",
        ),
    ] = "auto",
    keep_poses: Annotated[
        bool,
        option(
            _WHAT,
            "Start from the poses that the parts come in, instead of turning them at random. Where those are the true ones, "
            "metrics.json says that they were kept.",
            "--keep-poses",
        ),
    ] = False,
    units: Annotated[
        str | None, option(_WHAT, "Of the parts' lengths, where you know them: mm, cm, m, in, ft. For poses.json.")
    ] = None,
    reference_units: Annotated[
        str | None,
        option(_WHAT, "Of the reference's lengths, with --units.", show_default="the parts', or others if it is far larger"),
    ] = None,
    hypotheses: Annotated[int, option(_HOW, "Assemblies that are kept.", min=1)] = 16,
    templates: Annotated[
        int | None,
        option(_HOW, "Samples of the model to assemble on.", min=1, show_default="4 of a model that is told the parts, else 16"),
    ] = None,
    template_steps: Annotated[int, option(_HOW, "Steps of DPM-Solver++ for each sample.", min=1)] = 20,
    refine: Annotated[
        int | None, option(_HOW, "Steps of refinement.", min=1, show_default="none after a search, 60 from kept poses")
    ] = None,
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
    that pose is the truth of metrics.json, and reaches nothing else, unless --keep-poses makes it the start.

    Examples:

        [bold]genkit assemble parts/ --reference scan.ply --out assembled[/bold]

        [bold]genkit assemble chair.glb --category chair --out assembled[/bold]

        [bold]genkit assemble draft/ --reference scan.ply --keep-poses --out mended[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from diffusers.utils import logging

        from genkit.assembly.metrics import PROTOCOLS
        from genkit.assembly.units import metres
        from genkit.data.meshes import read_parts
        from genkit.data.objects import centred
        from genkit.errors import unknown
        from genkit.files import prepare_folder
        from genkit.pipelines import PartAssemblyPipeline

        if protocol not in PROTOCOLS:
            raise unknown("protocol", protocol, PROTOCOLS)
        if truth not in ("auto", "yes", "no"):
            raise unknown("truth", truth, ("auto", "yes", "no"))
        if units is not None:
            metres(units)
        if reference_units is not None and units is None:
            raise ValueError(f"--reference-units {reference_units} says nothing without the parts' own. Give --units too.")
        if reference is not None and category is not None:
            raise ValueError(f"--category {category} says nothing where --reference shows the whole. Leave one of them out.")
        factor = 1.0 if reference_units is None else metres(reference_units) / metres(units or "")
        group = read_parts(parts, truth=truth != "no", allow_pickle=allow_pickle, seed=seed)
        if truth == "auto" and group.poses is not None and not held_together(group):
            group = dataclasses.replace(group, poses=None)
        whole = None if reference is None else _reference(reference, factor)
        plan = {
            "parts": list(group.names), "reference": str(reference) if reference else None, "truth": group.poses is not None,
            "poses_kept": keep_poses,
        }  # fmt: skip
        if dry_run:
            output.result(
                plan, f"Would assemble {len(group)} parts into {out}; the truth is {'' if plan['truth'] else 'not '}known."
            )
            return
        logging.disable_progress_bar()
        pipe = PartAssemblyPipeline() if whole is not None else PartAssemblyPipeline.from_zoo(model)
        settings: dict[str, Any] = {"num_hypotheses": hypotheses, "num_templates": templates, "refine_steps": refine, "seed": seed}
        settings |= {"reference": whole, "estimate_scale": reference_units is None, "template_steps": template_steps}
        if whole is None:
            pipe.check_category(category)
            group, settings["category"] = centred(group), category
        if keep_poses:
            settings |= _kept(group, whole is not None)
        prepare_folder(out)
        document = _assemble(output, pipe, group, out, protocol, plan, settings, units)
        output.result(document, _told(document, out))


def held_together(parts: Any) -> bool:
    """Whether parts touch each other in the pose that counts as the true one: into half as many pieces as there are, at most.

    Objects with a gap are whole then, and scattered parts are not.
    """
    from genkit.assembly.hypotheses import loose_pieces

    return loose_pieces(parts, parts.poses.double()) <= max(1, len(parts) // 2)


def _reference(file: Path, factor: float) -> Any:
    """The whole; in the lengths of the parts, where both units are known."""
    from genkit.data.meshes import read_reference

    whole = read_reference(file)
    return whole.apply_scale(factor) if hasattr(whole, "faces") else whole * factor


def _kept(group: Any, reference: bool) -> dict[str, Any]:
    """Arguments of the pipeline that start from the poses that parts come in; about the origin where a model draws the whole.

    Nearest neighbours mend what lies near its place on a scan, where transport, made for random starts, takes it away again.
    """
    from genkit.data.objects import centred

    if reference:
        return {"init": "given", "coupling": "nn"}
    start = centred(dataclasses.replace(group, poses=group.frames)).poses
    return {"init": "given", "initial_poses": start, "coupling": "index", "h_range": (0.1, 0.02)}


def _assemble(
    output: Output, pipe: Any, group: Any, out: Path, protocol: str, plan: dict[str, Any], settings: dict[str, Any],
    units: str | None,
) -> dict[str, Any]:  # fmt: skip
    from genkit.assembly import evaluate
    from genkit.assembly.export import write_glb, write_ply, write_poses, write_turntable, write_viewer
    from genkit.console import progress
    from genkit.files import write_atomic

    with progress() as bar:
        task = bar.add_task("assemble", total=100)
        result = pipe(
            group, return_history=True, **settings,
            on_stage=lambda name, share: bar.update(task, completed=int(100 * share), description=name),
        )  # fmt: skip
    told, scale = result.verdict.text, result.scale[0].item()
    document = write_poses(
        out / "poses.json", group, result.poses, result.scores, units=units or "as the input", scale=scale, seed=settings["seed"],
        confidence=told,
    )  # fmt: skip
    write_ply(out / "assembled.ply", group, result.poses[0])
    if group.meshes is not None:
        write_glb(out / "assembled.glb", group, result.poses[0])
    write_turntable(out / "turntable.png", group, result.poses[0])
    begun = result.history.pop(0) if plan["poses_kept"] else None
    write_viewer(out / "viewer.html", group, result.poses, result.history, told, start=begun)
    document = {
        **plan, "folder": str(out), "confidence": told, "score": document["score"], "scale": scale,
        "hypotheses": len(result.poses),
    }  # fmt: skip
    if group.poses is not None:
        measures = evaluate(result.poses, group, protocol)
        document["metrics"] = {"protocol": protocol, "poses_kept": plan["poses_kept"], **measures}
        write_atomic(out / "metrics.json", (json.dumps(document["metrics"], indent=2) + "\n").encode())
    return document


def _told(document: dict[str, Any], out: Path) -> str:
    lines = [f"{len(document['parts'])} parts assembled into {out} ({document['confidence']})"]
    if document["reference"] and document["scale"] != 1:
        lines.append(
            f"The reference was taken for the object in other units, {document['scale']:.4g} times as large. If that is wrong, "
            "give --units and --reference-units."
        )
    if "metrics" in document:
        found = document["metrics"]
        lines.append(
            f"part accuracy {found['part_accuracy']:.2f}, contacts {found['connectivity_accuracy']:.2f}, "
            f"shape Chamfer {found['shape_chamfer']:.5f} ({found['protocol']}"
            + (", started from the true poses)" if found["poses_kept"] else ")")
        )
    return "\n".join(lines)
