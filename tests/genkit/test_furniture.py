"""Generated furniture and the readers: exact meshes, contacts on both surfaces, the same for a seed; clear errors for bad input."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.assembly import PartSet, evaluate, matrix_to_quaternion
from genkit.data.furniture import CATEGORIES, MOST_PARTS, draw
from genkit.data.partnet import from_fields, load_partnet, pose_vectors, read_arrays, write_npz

trimesh = pytest.importorskip("trimesh")

from genkit.data.meshes import read_mesh, read_parts, read_reference  # noqa: E402


@pytest.mark.parametrize("category", CATEGORIES)
def test_furniture_is_closed_connected_and_the_same_for_a_seed(category: str) -> None:
    structures = set()
    for seed in range(12):
        made = draw(category, seed)
        assert 2 <= len(made.pieces) <= MOST_PARTS
        assert all(mesh.is_watertight and mesh.volume > 0 for mesh in made.meshes)
        assert min(mesh.bounds[0][1] for mesh in made.meshes) == pytest.approx(0, abs=0.06)
        structures.add(made.structure)
    assert len(structures) > 1
    again, other = draw(category, 3), draw(category, 3, "test")
    assert torch.equal(draw(category, 3).cloud(100), again.cloud(100))
    assert not torch.equal(other.cloud(100), again.cloud(100))


@pytest.mark.parametrize("category", CATEGORIES)
def test_contacts_lie_on_both_parts(category: str) -> None:
    made = draw(category, 5)
    for pair, place in made.contacts.items():
        for i in pair:
            _, distance, _ = trimesh.proximity.closest_point_naive(made.meshes[i], place[None])
            assert distance[0] < 0.03, (pair, made.pieces[i].semantic)


def test_held_out_structures_are_drawn_by_their_split_alone() -> None:
    for category in CATEGORIES:
        apart = {draw(category, seed, "held-out").structure for seed in range(8)}
        assert not apart & {draw(category, seed, split).structure for seed in range(25) for split in ("train", "test")}


def test_parts_carry_poses_contacts_and_classes() -> None:
    parts = draw("chair", 2).parts()
    assert parts.category == "chair"
    assert evaluate(parts.poses, parts) | {"parts": 0, "correct_parts": 0} == {
        "part_accuracy": 1, "connectivity_accuracy": 1, "shape_chamfer": 0, "parts": 0, "correct_parts": 0,
    }  # fmt: skip
    assert parts.extents.max() == pytest.approx(1, abs=1e-6)
    assert (parts.contacts[..., 0] == parts.contacts[..., 0].T).all()


def test_a_category_or_split_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'chair'"):
        draw("chairs", 0)
    with pytest.raises(ValueError, match="Unknown split"):
        draw("chair", 0, "all")


# The benchmark's files


def fields(count: int = 4) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    quaternions = torch.randn(count, 4, generator=generator)
    poses = torch.cat([torch.randn(count, 3, generator=generator), quaternions / quaternions.norm(dim=1, keepdim=True)], 1)
    return {
        "part_pcs": torch.randn(count, 50, 3, generator=generator).numpy(), "part_poses": poses.numpy(),
        "part_ids": np.arange(1, count + 1), "geo_part_ids": np.zeros(count, int), "sym": np.ones((count, 3), int),
    }  # fmt: skip


def test_a_benchmark_folder_is_read_once_and_kept(tmp_path: Path) -> None:
    (tmp_path / "shape_data").mkdir()
    (tmp_path / "contact_points").mkdir()
    np.save(tmp_path / "Chair.val.npy", np.array([7]))
    content = fields()
    np.save(tmp_path / "shape_data" / "7_level3.npy", content, allow_pickle=True)
    contacts = np.zeros((4, 4, 4), np.float32)
    contacts[0, 1] = contacts[1, 0] = 1
    np.save(tmp_path / "contact_points" / "pairs_with_contact_points_7_level3.npy", contacts)
    with pytest.raises(ValueError, match="--allow-pickle"):
        load_partnet(tmp_path, "chair", "val")[0]
    first = load_partnet(tmp_path, "chair", "val", allow_pickle=True)[0]
    kept = load_partnet(tmp_path, "chair", "val")[0]  # from the .npz, without a pickle
    for name in ("points", "poses", "classes", "geometry_ids", "mirrors", "contacts"):
        assert torch.equal(getattr(first, name), getattr(kept, name)), name
    # The order is another one, and the content the benchmark's.
    rows = [int(name) for name in first.names]
    assert sorted(rows) == [0, 1, 2, 3]
    assert np.array_equal(first.points.numpy(), content["part_pcs"][rows])
    vectors = pose_vectors(first.poses).numpy()
    expected = content["part_poses"][rows]
    expected[:, 3:] *= np.where(expected[:, 3:4] < 0, -1, 1)
    assert vectors == pytest.approx(expected, abs=1e-6)


def test_a_pickle_that_acts_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (print, ("acted",))

    np.save(tmp_path / "evil.npy", np.array({"part_pcs": Evil()}, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"builtins\.print"):
        read_arrays(tmp_path / "evil.npy", allow_pickle=True)
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00" + pickle.dumps({}))
    with pytest.raises(ValueError):  # noqa: PT011
        read_arrays(tmp_path / "bad.npy", allow_pickle=True)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"part_pcs": np.zeros((4, 0, 3))}, r"It must be \(parts, points, 3\)"),
        ({"part_poses": np.zeros((3, 7))}, "3 `part_poses`, but 4 parts"),
        ({"part_poses": np.zeros(())}, r"`part_poses` of the shape is \(\)"),
        ({"names": np.array(["a", "b"])}, "2 names, but 4 parts"),
        ({"names": np.arange(4)}, "are no names"),
        ({"names": np.frombuffer(b"\xff\xff\xff\xff" * 4, "<U1")}, "a number that is no character"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changed: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_fields({**fields(), **changed})


def test_poses_that_mirror_are_repaired() -> None:
    content = fields(2)
    mirrored = np.tile(np.eye(4), (2, 1, 1))
    mirrored[0, 0, 0] = -1
    parts = from_fields({**content, "part_poses": mirrored, "names": np.array(["a", "b"])})
    assert (torch.linalg.det(parts.poses[:, :3, :3]) > 0).all()
    placed = parts.points[0].double() @ parts.poses[0, :3, :3].T
    assert torch.allclose(placed, torch.from_numpy(content["part_pcs"][0] * [-1, 1, 1]), atol=1e-6)
    assert matrix_to_quaternion(parts.poses[:, :3, :3]).shape == (2, 4)


def test_npz_keeps_parts_as_they_are(tmp_path: Path) -> None:
    parts = draw("table", 1).parts(points=200)
    write_npz(parts, tmp_path / "t.npz")
    back = read_parts(tmp_path / "t.npz")
    for name in ("points", "poses", "classes", "geometry_ids", "contacts"):
        assert torch.equal(getattr(parts, name), getattr(back, name)), name
    assert back.names == parts.names


# Meshes


def folder(path: Path, meshes: dict[str, object]) -> Path:
    path.mkdir()
    for name, mesh in meshes.items():
        mesh.export(path / name)
    return path


BOX = trimesh.creation.box((1, 0.5, 0.2))


def test_folders_and_scenes_give_the_same_parts(tmp_path: Path) -> None:
    made = draw("lamp", 0)
    scene = trimesh.Scene({f"{i:02d}": mesh for i, mesh in enumerate(made.meshes)})
    scene.export(tmp_path / "lamp.glb")
    files = folder(tmp_path / "lamp", {f"{i:02d}.ply": mesh for i, mesh in enumerate(made.meshes)})
    one, other = read_parts(files), read_parts(tmp_path / "lamp.glb")
    assert one.names == other.names
    assert torch.allclose(one.extents, other.extents, atol=1e-4)
    assert one.poses is not None
    assert read_parts(files, truth=False).poses is None
    assert read_mesh(tmp_path / "lamp.glb").area == pytest.approx(sum(mesh.area for mesh in made.meshes), rel=1e-4)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_parts(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no meshes"):
        read_parts(tmp_path)
    with pytest.raises(ValueError, match="There is 1 part"):
        read_parts(folder(tmp_path / "one", {"a.stl": BOX}))
    with pytest.raises(ValueError, match="Two parts are called 'a'"):
        read_parts(folder(tmp_path / "twice", {"a.stl": BOX, "a.ply": BOX}))
    many = tmp_path / "many"
    many.mkdir()
    for i in range(65):
        (many / f"{i}.obj").write_text("v 0 0 0\n")
    with pytest.raises(ValueError, match="65 meshes"):
        read_parts(many)
    with pytest.raises(ValueError, match="one mesh, so one part"):
        read_parts(tmp_path / "one" / "a.stl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "no surface"),
        ("v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "NaN"),
        ("v 0 0 0\nv 1 0 0\n", "no"),
        ("no mesh at all", "no"),
    ],
)
def test_bad_meshes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    files = folder(tmp_path / "parts", {"good.ply": BOX})
    (files / "bad.obj").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_parts(files)
    assert "bad" in str(caught.value)


def test_a_mesh_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = folder(tmp_path / "parts", {"a.ply": BOX, "b.ply": BOX})
    monkeypatch.setattr("genkit.data.meshes.MOST_FACES", 20)
    with pytest.raises(ValueError, match="24 faces"):
        read_parts(files)
    monkeypatch.setattr("genkit.data.meshes.MOST_BYTES", 100)
    with pytest.raises(ValueError, match="MiB"):
        read_parts(files)


def test_open_and_non_manifold_meshes_are_parts_too() -> None:
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0.0], [0, 0, 1]], [[0, 1, 2], [1, 3, 2], [0, 1, 4]])
    assert len(PartSet.from_meshes([sheet, BOX])) == 2


def test_references_are_meshes_or_clouds(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.zeros((100, 3)))
    assert read_reference(tmp_path / "scan.npy").shape == (100, 3)
    BOX.export(tmp_path / "box.obj")
    assert len(read_reference(tmp_path / "box.obj").faces) == 12
    trimesh.PointCloud(np.random.default_rng(0).normal(size=(80, 3))).export(tmp_path / "scan.ply")
    assert read_reference(tmp_path / "scan.ply").shape == (80, 3)
    with pytest.raises(FileNotFoundError):
        read_reference(tmp_path / "none.obj")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no cloud"):
        read_reference(tmp_path / "objects.npy")
