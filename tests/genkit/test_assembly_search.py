"""Search and select: parts in any pose find their places on a sample of the whole; nothing depends on their order or input pose."""

from __future__ import annotations

import pytest
import torch

from genkit.assembly import PartSet, Search, SearchConfig, Surface, evaluate, random_rotations, summarise, template_surface
from genkit.assembly.surfaces import shapes_of
from genkit.data.furniture import draw
from genkit.data.objects import reference_cloud

trimesh = pytest.importorskip("trimesh")

QUICK = SearchConfig(candidates=120, rotations=24, starts=8, beam=4, rounds=1, renewed=1, fine=512, last=1024, resolution=64)


def chair() -> list:
    """Seat, back and four legs, in their places."""
    places = [((0.5, 0.05, 0.5), (0, 0.45, 0)), ((0.5, 0.5, 0.04), (0, 0.725, -0.23))]
    places += [((0.05, 0.42, 0.05), (x, 0.215, z)) for x in (-0.2, 0.2) for z in (-0.2, 0.2)]
    boxes = []
    for sides, centre in places:
        box = trimesh.creation.box(sides)
        box.apply_translation(centre)
        boxes.append(box)
    return boxes


def reposed(meshes: list, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    moved = []
    for mesh, turn in zip(meshes, random_rotations(len(meshes), generator), strict=True):
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3], pose[:3, 3] = turn, 5 * torch.randn(3, generator=generator, dtype=torch.float64)
        copy = mesh.copy()
        copy.apply_transform(pose.numpy())
        moved.append(copy)
    return moved


@pytest.fixture(scope="module")
def parts() -> PartSet:
    return PartSet.from_meshes(chair(), truth=True)


@pytest.fixture(scope="module")
def scan(parts: PartSet) -> torch.Tensor:
    whole = trimesh.util.concatenate(chair())
    return torch.from_numpy(trimesh.sample.sample_surface(whole, 4096, seed=7)[0])


@pytest.fixture(scope="module")
def found(parts: PartSet, scan: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return Search(parts, template_surface(scan, parts.unit), QUICK).run()


def test_a_chair_is_assembled_from_a_scan(parts: PartSet, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    poses, energy = found
    measures = evaluate(poses[0], parts)
    assert measures["part_accuracy"] == 1
    assert measures["shape_chamfer"] < 1e-3
    assert measures["connectivity_accuracy"] > 0.9
    assert (energy.diff() >= 0).all()
    assert torch.linalg.det(poses[..., :3, :3]) == pytest.approx(1, abs=1e-5)


def test_legs_are_one_shape(parts: PartSet) -> None:
    from genkit.assembly.surfaces import part_surface

    shapes = shapes_of(parts, [part_surface(parts, i) for i in range(len(parts))])
    assert sorted(len(shape.members) for shape in shapes) == [1, 1, 4]


def test_the_order_of_the_parts_changes_nothing(
    parts: PartSet, scan: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor]
) -> None:
    order = [3, 0, 5, 1, 4, 2]
    poses, energy = Search(parts[order], template_surface(scan, parts.unit), QUICK).run()
    assert torch.equal(poses, found[0][:, order])
    assert torch.equal(energy, found[1])


def test_the_pose_that_parts_come_in_tells_nothing(scan: torch.Tensor) -> None:
    scattered = PartSet.from_meshes(reposed(chair(), seed=3))
    poses, _ = Search(scattered, template_surface(scan, scattered.unit), QUICK).run()
    motions = scattered.to_input(poses[0])
    # The motions put the scattered meshes where the true ones are: box by box, in whatever order the legs.
    placed = []
    for mesh, motion in zip(scattered.meshes or (), motions, strict=True):
        mesh = mesh.copy()
        mesh.apply_transform(motion.numpy())
        placed.append(mesh.bounds.ravel())
    for box in chair():
        assert min(abs(box.bounds.ravel() - bounds).max() for bounds in placed) < 0.03


def test_another_template_is_searched_as_by_a_search_of_its_own(parts: PartSet, scan: torch.Tensor) -> None:
    quick = SearchConfig(candidates=16, rotations=24, voxel=0.08, starts=2, beam=2, rounds=1, coarse=128, fine=128, last=256)
    first, second = (template_surface(scan[rows]) for rows in (slice(0, 1000), slice(1000, 2000)))
    alone = Search(parts, second, quick, seed=3).run(2)
    other = Search(parts, first, quick)
    other.run(2)
    assert all(torch.equal(a, b) for a, b in zip(other.on(second, 3).run(2), alone, strict=True))


def test_a_setting_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="candidates=0"):
        SearchConfig(candidates=0)


@pytest.mark.parametrize(("cloud", "message"), [(torch.zeros(10, 3), "at least 64"), (torch.full((100, 3), float("nan")), "NaN")])
def test_a_bad_reference_is_refused(cloud: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template_surface(cloud)


# Oracle chairs: what a sample of the true shape is worth to the search


def oracle(seed: int) -> tuple[PartSet, Surface]:
    """A generated chair and a sample of its true shape."""
    parts = draw("chair", seed, "test").parts()
    return parts, template_surface(reference_cloud(parts, 8192, seed=7), parts.unit)


@pytest.mark.slow
def test_oracle_chairs_are_assembled_by_search() -> None:
    """Spec g.16, seeds 0 to 5: PA >= 0.6 and SCD <= 0.001."""
    rows = [evaluate(Search(parts, template, QUICK).run(1)[0][0], parts) for parts, template in map(oracle, range(6))]
    assert summarise(rows)["part_accuracy"] >= 0.6
    assert summarise(rows)["shape_chamfer"] <= 1e-3
