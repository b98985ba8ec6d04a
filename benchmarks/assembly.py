"""Part assembly from a reference: parts re-posed at random, an independent sample of the true shape as the template.

    python benchmarks/assembly.py FOLDER [--reference cloud|parts|mesh] [--points 8192] [--seed 0] [--out FILE]
    python benchmarks/assembly.py --large
    python benchmarks/assembly.py --picture docs/assembly.png

FOLDER holds an object in each folder of meshes below it, in assembled pose (IKEA Manuals at Work, or others); without it nothing is
measured. `cloud` is an area-uniform sample of the union, `parts` as many points of each part, `mesh` the union itself. The parts'
frames come from a random turn of each mesh and their own smallest boxes, so they hold nothing of the true pose. Accuracies are the
`strict` protocol's, seconds are CPU seconds on one thread, with loading of the meshes not counted. `--large` assembles a
generated chair and a table beside it, 20 parts with 1,000 points each, by the whole pipeline, and tells its CPU seconds and the
peak memory of the process. `--picture` draws generated furniture: its parts scattered, a scan of it, and what is assembled on that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit.assembly import PartSet, Search, Surface, evaluate, summarise, template_surface
from genkit.assembly.metrics import part_distances
from genkit.data.meshes import read_parts
from genkit.files import write_atomic

LARGE = 20  # parts
SHOWN = (("chair", 8), ("table", 3), ("lamp", 2), ("cabinet", 1))  # of the test split
SIDE = 240  # pixels


def objects(folder: Path) -> list[Path]:
    """Folders below that hold at least two meshes."""
    return sorted({file.parent for file in folder.rglob("*.obj") if len(list(file.parent.glob("*.obj"))) > 1})


def reference(parts: PartSet, kind: str, points: int, seed: int) -> Surface:
    """The template, in units of the parts: nothing in it says which point is of which part."""
    import trimesh

    whole = trimesh.util.concatenate(parts.meshes)
    if kind == "mesh":
        return template_surface(whole, parts.unit)
    meshes = [whole] if kind == "cloud" else list(parts.meshes or ())
    each = [np.asarray(trimesh.sample.sample_surface(m, points // len(meshes), seed=seed + i)[0]) for i, m in enumerate(meshes)]
    return template_surface(np.concatenate(each), parts.unit)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    parts = read_parts(folder, seed=args.seed)
    template = reference(parts, args.reference, args.points, args.seed + 1000)
    began = time.process_time()
    search = Search(parts, template, seed=args.seed)
    poses, energy = search.run()
    seconds = time.process_time() - began
    row: dict[str, Any] = {"object": "/".join(folder.parts[-2:]), "parts": len(parts), **evaluate(poses, parts)}
    true = search.exact.energy(search.to_shapes(parts.poses)).item()
    return {
        **row,
        "seconds": round(seconds, 2),
        "energy": energy[0].item(),
        "true_energy": true,
        "wrong": part_distances(poses[0], parts),
    }


def large(args: argparse.Namespace) -> None:
    """One assembly of 20 parts with 1,000 points each, a chair's and a table's, of which nothing but the points is known."""
    import resource

    import trimesh

    from genkit.data.furniture import draw
    from genkit.data.objects import reference_cloud
    from genkit.pipelines import PartAssemblyPipeline

    meshes = []
    for category, shift in (("chair", 0.0), ("table", 1.5)):
        drawn = (draw(category, i, "test") for i in itertools.count())
        meshes += [m.copy().apply_translation([shift, 0, 0]) for m in next(d for d in drawn if len(d.pieces) == LARGE // 2).meshes]
    clouds = [np.asarray(trimesh.sample.sample_surface(mesh, 1000, seed=args.seed + i)[0]) for i, mesh in enumerate(meshes)]
    parts = PartSet.from_clouds(clouds, truth=True, seed=args.seed)
    cloud = reference_cloud(PartSet.from_meshes(meshes, truth=True), args.points, args.seed + 1000)
    began, wall = time.process_time(), time.perf_counter()
    out = PartAssemblyPipeline()(parts, reference=cloud, seed=args.seed)
    row = {
        "parts": len(parts), "points": parts.points.shape[1], "seconds": round(time.process_time() - began, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, **evaluate(out.poses, parts),
    }  # fmt: skip
    print(json.dumps(row, indent=2))
    if args.out:
        write_atomic(args.out, json.dumps(row, indent=2).encode())


def picture(file: Path, args: argparse.Namespace) -> None:
    """A column for each of `SHOWN`: the parts scattered, the scan, the first assembly."""
    from genkit.assembly.export import in_place
    from genkit.assembly.picture import draw as view
    from genkit.assembly.picture import palette
    from genkit.assembly.starts import scattered
    from genkit.data.furniture import draw
    from genkit.data.objects import reference_cloud
    from genkit.images import contact_sheet, save_png
    from genkit.pipelines import PartAssemblyPipeline

    columns, labels = [], []
    for category, i in SHOWN:
        parts = draw(category, i, "test").parts(seed=args.seed)
        cloud = reference_cloud(parts, args.points, args.seed + 1000)
        out = PartAssemblyPipeline()(parts, reference=cloud, seed=args.seed)
        template = template_surface(cloud, parts.unit)
        begun = scattered(parts, template, args.seed)
        scan = view([cloud.numpy()], [np.tile([0.0, 1.0, 0.0], (len(cloud), 1))], np.full((1, 3), 110.0), size=SIDE)
        before, after = (view(*in_place(parts, pose), palette(len(parts)), size=SIDE) for pose in (begun, out.poses[0]))
        columns.append([before, scan, after])
        labels.append(f"{category}: {len(parts)} parts, {evaluate(out.poses, parts)['part_accuracy']:.0%} right")
    save_png(contact_sheet(list(zip(*columns, strict=True)), ["", "", ""], labels), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--reference", choices=("cloud", "parts", "mesh"), default="cloud")
    parser.add_argument("--points", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="Names of objects.")
    parser.add_argument("--large", action="store_true", help="Time and memory of 20 parts with 1,000 points each.")
    parser.add_argument("--picture", type=Path, help="Draw what is assembled of generated furniture.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.picture:
        picture(args.picture, args)
        return
    if args.large:
        large(args)
        return
    if args.folder is None or not args.folder.is_dir():
        print("There is no folder of objects, so nothing is measured. Give one.")
        return
    rows = []
    for folder in objects(args.folder):
        if args.only and not any(name in str(folder) for name in args.only):
            continue
        row = measure(folder, args)
        wrong = row.pop("wrong")
        rows.append(row)
        print(
            f"{row['object']:20s} {row['parts']:2.0f} parts  accuracy {row['part_accuracy']:.2f}  "
            f"best {row['best_part_accuracy']:.2f}  contacts {row['connectivity_accuracy']:.2f}  "
            f"Chamfer {row['shape_chamfer']:.5f}  {row['seconds']:5.1f} s  "
            f"energy {1e5 * row['energy']:.1f}, true {1e5 * row['true_energy']:.1f}  {wrong}",
            flush=True,
        )
    seconds = sorted(row["seconds"] for row in rows)
    summary = {**summarise(rows), "seconds_median": float(np.median(seconds)), "seconds_max": seconds[-1]}
    print(json.dumps(summary, indent=2))
    if args.out:
        settings = {"reference": args.reference, "points": args.points, "seed": args.seed}
        write_atomic(args.out, json.dumps({"settings": settings, "summary": summary, "rows": rows}, indent=2).encode())


if __name__ == "__main__":
    main()
