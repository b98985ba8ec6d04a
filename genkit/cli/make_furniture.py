"""`genkit make-furniture`: generated objects in parts, to try assembly on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from genkit.cli.common import Debug, Json, Quiet, command, option

_WHAT, _WHERE = "What to make", "Files"
FORMATS = ("obj", "ply", "stl", "glb", "npz")


def make_furniture(
    out: Annotated[Path, option(_WHERE, "Folder; an object is a folder of meshes below it, or one file.", "--out", "-o")],
    category: Annotated[
        list[str] | None, option(_WHAT, "chair, table, lamp or cabinet. Repeat it for several.", show_default="all four")
    ] = None,
    count: Annotated[int, option(_WHAT, "Objects of each category.", min=1)] = 10,
    split: Annotated[str, option(_WHAT, "train, val, test or held-out (structures that the others lack).")] = "test",
    seed: Annotated[int, option(_WHAT, "Of the first object; the next has the next.", min=0)] = 0,
    format: Annotated[
        str, option(_WHERE, "obj, ply, stl (folders of meshes), glb (scenes), npz (the benchmark's fields).")
    ] = "obj",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make furniture in parts: exact meshes in metres, y up, in their assembled pose.

    What is made is a function of category, split and seed. furniture.json says of each object its parts, their classes and which
    of them touch.

    Examples:

        [bold]genkit make-furniture --out chairs --category chair --count 50[/bold]

        [bold]genkit assemble-eval chairs[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.console import progress
        from genkit.data.furniture import CATEGORIES, SPLITS
        from genkit.errors import unknown
        from genkit.files import prepare_folder, write_atomic

        for kind, name, known in (("format", format, FORMATS), ("split", split, SPLITS)):
            if name not in known:
                raise unknown(kind, name, known)
        chosen = list(category or CATEGORIES)
        for name in chosen:
            if name not in CATEGORIES:
                raise unknown("category", name, CATEGORIES)
        prepare_folder(out)
        objects = []
        with progress() as bar:
            task = bar.add_task("furniture", total=len(chosen) * count)
            for name in chosen:
                for i in range(seed, seed + count):
                    objects.append(_write(out, name, split, i, format))
                    bar.advance(task)
        document = {"split": split, "format": format, "objects": objects}
        write_atomic(out / "furniture.json", (json.dumps(document, indent=1) + "\n").encode())
        output.result({"folder": str(out), **document}, f"{len(objects)} objects in {out}.")


def _write(out: Path, category: str, split: str, seed: int, format: str) -> dict[str, Any]:
    """One object, and what furniture.json says of it."""
    from genkit.data.furniture import draw
    from genkit.data.partnet import write_npz
    from genkit.files import prepare_folder, write_atomic

    made, name = draw(category, seed, split), f"{category}-{split}-{seed}"
    parts = [f"{i:02d} {piece.semantic}" for i, piece in enumerate(made.pieces)]
    if format == "npz":
        file = out / f"{name}.npz"
        write_npz(made.parts(), file)
    elif format == "glb":
        import trimesh

        file = out / f"{name}.glb"
        scene = trimesh.Scene()
        for part, mesh in zip(parts, made.meshes, strict=True):
            scene.add_geometry(mesh, node_name=part, geom_name=part)
        write_atomic(file, scene.export(file_type="glb"))
    else:
        file = out / name
        prepare_folder(file)
        for part, mesh in zip(parts, made.meshes, strict=True):
            data: Any = mesh.export(file_type=format)
            write_atomic(file / f"{part}.{format}", data.encode() if isinstance(data, str) else data)
    contacts = [{"parts": list(pair), "point": place.tolist()} for pair, place in made.contacts.items()]
    return {
        "path": str(file.relative_to(out)), "category": category, "seed": seed, "structure": list(made.structure), "parts": parts,
        "classes": [piece.semantic for piece in made.pieces], "contacts": contacts,
    }  # fmt: skip
