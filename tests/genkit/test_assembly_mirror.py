"""Mirror planes, pairs of parts, and how far an assembly is from its image."""

from __future__ import annotations

import pytest
import torch

from genkit.assembly import NearestGrid, Search, SearchConfig, evaluate, template_surface, transform
from genkit.assembly.candidates import Anchors
from genkit.assembly.mirror import Mirror, asymmetry, mirror_axis, split
from genkit.assembly.nearest_grid import Surface
from genkit.assembly.pairs import PairChoice
from genkit.assembly.rigid import pose_matrix, random_rotations
from genkit.assembly.surfaces import part_surface
from genkit.assembly.symmetry import Symmetry
from genkit.data.furniture import draw
from genkit.data.objects import centred

trimesh = pytest.importorskip("trimesh")


def box_of(x: float, y: float, z: float, count: int = 2000) -> torch.Tensor:
    made = trimesh.sample.sample_surface(trimesh.creation.box((x, y, z)), count, seed=1)[0]
    return torch.from_numpy(made).float()


def poses(count: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pose_matrix(random_rotations(count, generator).float(), spread * torch.randn(count, 3, generator=generator))


def anchored(x: torch.Tensor) -> Anchors:
    half = len(x) // 2
    return Anchors(x, Symmetry.of(x[:half], x[half:]))


@pytest.mark.parametrize("own", [0, 1, 2])
def test_the_image_of_a_pose_puts_the_part_where_its_points_are_mirrored(own: int) -> None:
    mirror, x = Mirror(0, 0.3), box_of(1.0, 0.5, 0.2)
    flipped = x * (1 - 2 * torch.eye(3)[own])  # the part as it is its own image
    placed = poses(4)
    images = mirror.poses(placed, own)
    assert torch.allclose(transform(flipped, images), mirror.points(transform(x, placed)), atol=1e-5)
    assert torch.allclose(torch.linalg.det(images[:, :3, :3]), torch.ones(4), atol=1e-5)  # a rigid motion again
    assert torch.allclose(mirror.poses(images, own), placed, atol=1e-5)


def test_candidates_are_split_into_those_across_the_plane_and_pairs() -> None:
    mirror, anchors = Mirror(0, 0.0), anchored(box_of(1.0, 0.1, 0.1))
    turn = torch.eye(3)
    along = pose_matrix(turn, torch.tensor([0.02, 0.4, 0.0]))  # a bar across the plane, not quite in its middle
    aside = pose_matrix(turn[[1, 0, 2]] * torch.tensor([1.0, 1.0, -1.0]), torch.tensor([-0.5, 0.0, 0.0]))  # upright, on the left
    single, pairs = split(torch.stack([along, aside]), anchors, mirror, 0)
    assert single.shape == pairs.shape == (1, 4, 4)
    assert single[0, 0, 3] == 0
    assert pairs[0, 0, 3] == pytest.approx(0.5)  # its image


def test_the_plane_of_furniture_is_found_and_none_of_what_has_none() -> None:
    chair = draw("chair", 2, "val").parts(seed=0)
    whole = transform(chair.points.double(), chair.poses).flatten(0, 1).float()
    assert mirror_axis([Surface(whole)]) == 0
    generator = torch.Generator().manual_seed(0)
    lumps = [box_of(1.0, 0.3, 0.1, 500) @ r.float() + torch.randn(3, generator=generator) for r in random_rotations(4, generator)]
    assert mirror_axis([Surface(torch.cat(lumps))]) is None


def test_furniture_is_its_own_image_and_with_a_wrong_leg_it_is_not() -> None:
    parts = centred(draw("chair", 2, "val").parts(seed=0))
    true = parts.poses.double()
    leg = parts.geometry_ids.tolist().index(int(parts.geometry_ids.mode().values))
    moved = true.clone()
    moved[leg, 0, 3] += 0.3
    template = template_surface(transform(parts.points, parts.poses.float()).flatten(0, 1))
    even, odd = Search(parts, template, axis=0).asymmetry(torch.stack([true, moved])).tolist()
    assert even < 1e-4
    assert odd > 10 * even
    assert Search(parts, template).asymmetry(true[None]).tolist() == [0]  # nothing is known of a plane


def test_asymmetry_is_the_squared_distance_to_the_image() -> None:
    x = box_of(0.4, 0.4, 0.4)
    surface = Surface(x)
    grid = NearestGrid(surface, 0.1)
    at = pose_matrix(torch.eye(3).expand(2, 3, 3), torch.tensor([[0.0, 0, 0], [0.02, 0, 0]]))[:, None]
    still, shifted = asymmetry(at, x[None], surface.normals[None], torch.ones(1), [grid], Mirror(0, 0.0)).tolist()
    # Shifted by s, the image is 2 s away; only the two sides that face the plane, a third of the surface, see that.
    assert still < 5e-5
    assert shifted == pytest.approx(0.04**2 / 3, rel=0.4)


def choice(count: int, across: int, paired: int) -> PairChoice:
    """Of one shape that is a bar, with some candidates across the plane and in pairs."""
    at = pose_matrix(torch.eye(3).expand(4, 3, 3), torch.tensor([[0.0, 0, 0], [0, 1, 0], [0.5, 0, 0], [0.5, 1, 0]]))

    def measure(k: int, poses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = poses[:, None, 0, 3]
        return x.expand(-1, 3), x.expand(-1, 3).abs(), torch.zeros(len(poses))

    return PairChoice([list(range(count))], [0], [(at[:across], at[2 : 2 + paired])], Mirror(0, 0.0), measure)


@pytest.mark.parametrize(
    ("count", "across", "paired", "patterns"),
    [(4, 2, 2, [[2], [1], [0]]), (3, 2, 2, [[1], [0]]), (4, 0, 2, [[2]]), (3, 0, 2, []), (2, 2, 0, [[0]]), (1, 1, 2, [[0]])],
)
def test_patterns_are_the_numbers_of_pairs_that_can_be(count: int, across: int, paired: int, patterns: list[list[int]]) -> None:
    assert choice(count, across, paired).patterns(8, torch.Generator()) == patterns


def test_of_many_patterns_some_are_drawn_and_most_pairs_come_first() -> None:
    one = choice(4, 2, 2)
    one.members = [[0, 1, 2, 3]] * 3
    one.poses |= {(k, paired): [torch.eye(4)[None]] for k in (1, 2) for paired in (False, True)}
    found = one.patterns(5, torch.Generator().manual_seed(0))
    assert found[0] == [2, 2, 2]
    assert len(found) == 5
    assert all(0 <= n <= 2 for pattern in found for n in pattern)


def test_a_pair_covers_what_either_does_and_has_the_density_of_both() -> None:
    one = choice(2, 0, 2)
    cover, density, _ = one.measured[0, True]
    assert cover[:, 0].tolist() == [-0.5, -0.5]  # the image's, the lesser
    assert density[:, 0].tolist() == [1.0, 1.0]
    assert one.poses[0, True][1][0, 0, 3] == -0.5


def test_pairs_find_the_assembly_and_it_is_even() -> None:
    parts = centred(draw("table", 0, "val").parts(seed=0))
    surfaces = [part_surface(parts, i) for i in range(len(parts))]
    whole = torch.cat([transform(s.points[:800], pose) for s, pose in zip(surfaces, parts.poses.float(), strict=True)])
    config = SearchConfig(candidates=48, rotations=64, starts=8, beam=4, rounds=1, patterns=8)
    search = Search(parts, template_surface(whole), config, axis=0)
    found, energy = search.run(2)
    assert evaluate(found[0], parts)["part_accuracy"] == 1
    assert search.asymmetry(found[:1])[0] < 1e-4
    again, repeated = Search(parts, template_surface(whole), config, axis=0).run(2)
    assert torch.equal(found, again)
    assert torch.equal(energy, repeated)
