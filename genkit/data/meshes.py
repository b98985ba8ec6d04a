"""Reads the parts of an object: a folder of meshes, a scene, arrays of points, or a file of the PartNet assembly benchmark.

| what | parts |
|---|---|
| a folder of `.obj`, `.ply`, `.stl`, `.off` | one in each file, in the order of the names |
| `.glb`, `.gltf` | one for each node with geometry |
| `.npz` | `part_pcs` (P, N, 3), and what else the benchmark has (`genkit.data.partnet`) |
| `.npy` | a benchmark's file; a pickle, so only if it is allowed |

Nothing is run or fetched: materials and textures are not read, and files and meshes have size limits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from genkit.assembly.parts import MOST_PARTS, PartSet
from genkit.data.npy import read_npy, read_npz

if TYPE_CHECKING:
    from trimesh import Trimesh

MESHES = (".obj", ".ply", ".stl", ".off")
SCENES = (".glb", ".gltf")
MOST_BYTES = 256 * 2**20  # of a file
MOST_FACES = 4_000_000  # of an object


def read_parts(path: str | Path, *, truth: bool = True, allow_pickle: bool = False, **fields: Any) -> PartSet:
    """The parts of one object.

    Args:
        path: see above.
        truth: the parts are in their assembled pose, which becomes the true one and reaches nothing else. Benchmark files say it
            themselves.
        allow_pickle: also read `.npy`, by an unpickler that knows arrays, numbers, strings, lists and dictionaries only.
        **fields: for `PartSet.from_meshes` and `from_clouds`: `seed`, `category`, ...

    Raises:
        FileNotFoundError: no such path, or a folder without meshes.
        ValueError: one part or more than 64, a file that is no mesh, empty, too large, or named like another; a surface of no area;
            coordinates that are not finite; a pickle that is not allowed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = _mesh_files(path)
        meshes = [read_mesh(file) for file in files]
        names = [file.stem for file in files]
    elif not path.exists():
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}.")
    elif path.suffix.lower() in SCENES:
        meshes, names = _scene(path)
    elif path.suffix.lower() in (".npz", ".npy"):
        from genkit.data.partnet import read_arrays

        return read_arrays(path, truth=truth, allow_pickle=allow_pickle, **fields)
    elif path.suffix.lower() in MESHES:
        raise ValueError(f"{str(path)!r} is one mesh, so one part. Give a folder with a mesh for each part, or a .glb scene.")
    else:
        raise ValueError(
            f"{str(path)!r} is no kind of file that parts are read from. Known: a folder, {', '.join(SCENES)}, .npz, .npy."
        )
    faces = sum(len(mesh.faces) for mesh in meshes)
    if faces > MOST_FACES:
        raise ValueError(f"The parts have {faces:,} faces, more than {MOST_FACES:,}. Simplify the meshes.")
    return PartSet.from_meshes(meshes, names, truth=truth, **fields)


def read_mesh(file: str | Path) -> Trimesh:
    """A mesh as it is in its file, without materials; a `.glb` scene as one mesh.

    Raises:
        FileNotFoundError, ValueError: see `read_parts`.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    if file.suffix.lower() in SCENES:
        import trimesh

        whole: Any = trimesh.util.concatenate(_scene(file)[0])
        return whole
    if file.suffix.lower() not in MESHES:
        raise ValueError(f"{str(file)!r} is no mesh. Known: {', '.join(MESHES + SCENES)}.")
    mesh = _load(file, force="mesh")
    if len(mesh.vertices) == 0:
        raise ValueError(f"{str(file)!r} holds no mesh: it has no faces. Export it again, or remove it.")
    return _checked(mesh, file)


def read_reference(file: str | Path) -> Any:
    """A reference: a mesh, or, of a `.ply` without faces, `.npy` or `.npz` (`points`), a cloud (K, 3).

    Raises:
        FileNotFoundError, ValueError: no such file, no mesh or cloud in it, too large, or not finite.
    """
    file = Path(file).expanduser()
    if file.suffix.lower() in (".npy", ".npz"):
        _check_size(file)
        try:
            cloud = read_npz(file, MOST_BYTES)["points"] if file.suffix.lower() == ".npz" else read_npy(file)
            if cloud.dtype.kind not in "iuf" or not np.isfinite(cloud).all():
                raise ValueError(f"its {cloud.shape} of {cloud.dtype} are not all finite numbers")
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"{str(file)!r} holds no cloud of points ({error}). Give an array (K, 3), in .npz as `points`."
            ) from error
        return cloud.astype(np.float64)
    if file.suffix.lower() == ".ply":
        content = _load(file, force=None)
        if not hasattr(content, "faces") and hasattr(content, "vertices"):
            return np.asarray(_checked(content, file).vertices, dtype=np.float64)
    return read_mesh(file)


def _mesh_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in MESHES)
    if not files:
        raise FileNotFoundError(
            f"The folder {str(folder)!r} has no meshes ({', '.join(MESHES)}). Give one with a mesh for each part."
        )
    if len(files) > MOST_PARTS:
        raise ValueError(f"The folder {str(folder)!r} has {len(files)} meshes. An assembly has 2 to {MOST_PARTS} parts.")
    known: dict[str, Path] = {}
    for file in files:
        if file.stem in known:
            raise ValueError(f"Two parts are called {file.stem!r}: {known[file.stem].name} and {file.name}. Rename one.")
        known[file.stem] = file
    return files


def _scene(file: Path) -> tuple[list[Any], list[str]]:
    """Meshes of a scene's nodes, where the nodes put them, and their names."""
    scene = _load(file, force="scene")
    meshes, names = [], []
    for node in sorted(scene.graph.nodes_geometry):
        placed, geometry = scene.graph[node]
        mesh = scene.geometry[geometry]
        if not hasattr(mesh, "faces"):
            continue
        mesh = mesh.copy()
        mesh.apply_transform(placed)
        meshes.append(_checked(mesh, file))
        names.append(str(node))
    if not meshes:
        raise ValueError(f"{str(file)!r} is a scene without meshes. Export it with its geometry.")
    return meshes, names


def _load(file: Path, force: Literal["mesh", "scene"] | None) -> Any:
    _check_size(file)
    import trimesh

    try:
        return trimesh.load(file, force=force, process=False, skip_materials=True)
    except Exception as error:  # whatever a damaged file makes the parsers raise
        raise ValueError(
            f"{str(file)!r} cannot be read as a mesh ({type(error).__name__}: {error!s:.100}). Export it again."
        ) from error


def _check_size(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    size = file.stat().st_size
    if size == 0:
        raise ValueError(f"{str(file)!r} is empty. Export it again.")
    if size > MOST_BYTES:
        raise ValueError(f"{str(file)!r} has {size / 2**20:,.0f} MiB, more than {MOST_BYTES >> 20}. Simplify the mesh.")


def _checked(mesh: Any, file: Path) -> Any:
    if not np.isfinite(mesh.vertices).all():
        raise ValueError(f"{str(file)!r} has NaN or infinite coordinates. Repair the mesh.")
    faces = np.asarray(getattr(mesh, "faces", ()))
    if faces.size and not 0 <= faces.min() <= faces.max() < len(mesh.vertices):
        raise ValueError(f"{str(file)!r} has faces of vertices that it lacks. Export it again.")
    if len(faces) > MOST_FACES:
        raise ValueError(f"{str(file)!r} has {len(faces):,} faces, more than {MOST_FACES:,}. Simplify the mesh.")
    return mesh
