"""Part assembly: rigid geometry, couplings, pushing apart and measures, against closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from genkit.assembly import (
    DenoisedTarget,
    PartSet,
    PushApartConfig,
    Symmetry,
    TemplateTarget,
    annealed,
    chamfer,
    evaluate,
    geometry_classes,
    kabsch,
    match_parts,
    matrix_to_quaternion,
    nearest,
    pose_matrix,
    push_apart,
    quaternion_to_matrix,
    random_rotations,
    refine,
    soft_targets,
    summarise,
    transform,
)
from genkit.assembly.rigid import angle
from genkit.assembly.symmetry import cube_rotations
from genkit.denoisers.analytic import Mixture
from genkit.levels import Level


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_poses(*shape: int, seed: int = 0) -> Tensor:
    count = math.prod(shape)
    poses = pose_matrix(
        random_rotations(count, generator(seed)), torch.randn(count, 3, generator=generator(seed + 1), dtype=torch.float64)
    )
    return poses.reshape(*shape, 4, 4)


def box_cloud(sides: tuple[float, float, float], count: int = 1000, seed: int = 0) -> Tensor:
    """Samples of the surface of a box, area-uniform."""
    trimesh = pytest.importorskip("trimesh")
    points, _ = trimesh.sample.sample_surface(trimesh.creation.box(sides), count, seed=seed)
    return torch.from_numpy(points).float()


def part_set(points: Tensor, poses: Tensor, **fields: object) -> PartSet:
    count = len(points)
    fields.setdefault("geometry_ids", torch.arange(1, count + 1))
    return PartSet(
        points=points, extents=points.amax(1) - points.amin(1), areas=torch.ones(count), names=tuple(map(str, range(count))),
        frames=torch.eye(4).repeat(count, 1, 1), poses=poses, **fields,
    )  # fmt: skip


# Rigid geometry


def test_kabsch_recovers_a_pose_and_its_inverse_problem() -> None:
    x = torch.randn(3, 50, 3, generator=generator(), dtype=torch.float64)
    poses = random_poses(3)
    rotation, translation, scale = kabsch(x, transform(x, poses))
    assert torch.allclose(pose_matrix(rotation, translation), poses, atol=1e-12)
    assert scale == 1


@pytest.mark.parametrize("flat", ["mirrored", "planar", "collinear", "one place"])
def test_kabsch_is_a_rotation_on_degenerate_points(flat: str) -> None:
    x = torch.randn(40, 3, generator=generator())
    y = x.clone()
    if flat == "mirrored":
        y[:, 0] *= -1
    else:
        keep = {"planar": 2, "collinear": 1, "one place": 0}[flat]
        x[:, keep:] = 0
        y = x @ random_rotations(1, generator(3))[0].float().T
    rotation, translation, _ = kabsch(x, y)
    assert torch.linalg.det(rotation) == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(rotation).all()
    assert torch.isfinite(translation).all()


def test_one_scale_is_shared_by_parts() -> None:
    x = torch.randn(2, 4, 60, 3, generator=generator())
    poses = random_poses(2, 4).float()
    y = transform(1.7 * x, poses)
    rotation, translation, scale = kabsch(x, y, shared_scale=True)
    assert scale == pytest.approx([1.7, 1.7], abs=1e-5)
    assert torch.allclose(scale[:, None, None, None] * x @ rotation.mT + translation[..., None, :], y, atol=1e-4)


def test_kabsch_with_weights_ignores_points_without() -> None:
    x = torch.randn(50, 3, generator=generator(), dtype=torch.float64)
    pose = random_poses(1)[0]
    y = transform(x, pose)
    y[25:] += 10
    rotation, _, _ = kabsch(x, y, (torch.arange(50) < 25).double())
    assert torch.allclose(rotation, pose[:3, :3], atol=1e-12)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(6, 3\)"):
        kabsch(torch.zeros(5, 3), torch.zeros(6, 3))
    with pytest.raises(ValueError, match="parts"):
        kabsch(torch.zeros(5, 3), torch.zeros(5, 3), shared_scale=True)


def test_quaternions_have_their_scalar_first() -> None:
    half = math.sqrt(0.5)
    turn = quaternion_to_matrix(torch.tensor([half, 0.0, 0.0, half], dtype=torch.float64))  # 90 degrees about z
    assert torch.allclose(turn @ torch.tensor([1.0, 0, 0], dtype=torch.float64), torch.tensor([0.0, 1, 0], dtype=torch.float64))
    q = matrix_to_quaternion(random_rotations(20, generator()))
    assert torch.allclose(quaternion_to_matrix(q), quaternion_to_matrix(-q))
    assert (q[:, 0] >= 0).all()
    assert torch.allclose(matrix_to_quaternion(quaternion_to_matrix(q)), q)


def test_chamfer_of_a_displaced_point_and_of_samples_of_a_square() -> None:
    delta = 0.03
    assert chamfer(torch.zeros(1, 3), torch.tensor([[delta, 0, 0]])).item() == pytest.approx(2 * delta**2)
    # Two samples of a unit square: the sampling floor 2 A / (pi N), the border adds a little.
    a, b = (torch.cat([torch.rand(1000, 2, generator=generator(s)), torch.zeros(1000, 1)], 1) for s in (0, 1))
    assert chamfer(a, b).item() == pytest.approx(2 / (math.pi * 1000), rel=0.1)


# Denoise and fit


def test_an_ordered_template_is_solved_in_one_step() -> None:
    x = torch.randn(5, 200, 3, generator=generator())
    true = random_poses(1, 5).float()
    template = transform(x, true)[0].reshape(-1, 3)
    found = refine(x, random_poses(1, 5, seed=9).float(), TemplateTarget(template, "index"), [0.1])
    assert (found[..., :3, 3] - true[..., :3, 3]).norm(dim=-1).max() < 1e-5
    assert angle(found[..., :3, :3], true[..., :3, :3]).max() < math.radians(1e-3)
    measures = evaluate(found[0], part_set(x, true[0], contacts=_one_contact(x, true[0])))
    assert (measures["part_accuracy"], measures["connectivity_accuracy"]) == (1, 1)
    assert measures["shape_chamfer"] < 1e-10


def _one_contact(x: Tensor, poses: Tensor) -> Tensor:
    """Parts 0 and 1 touch at the origin of the world."""
    contacts = torch.zeros(len(x), len(x), 4)
    for i, j in ((0, 1), (1, 0)):
        contacts[i, j] = torch.cat([torch.ones(1), -poses[i, :3, :3].T @ poses[i, :3, 3]])
    return contacts


def test_a_soft_template_without_noise_is_icp() -> None:
    x = torch.randn(3, 80, 3, generator=generator())
    poses = random_poses(1, 3, seed=4).float()
    template = torch.randn(300, 3, generator=generator(2))
    y = transform(x, poses)[0].reshape(-1, 3)
    assert torch.allclose(soft_targets(y[None], template, 1e-4, "soft")[0], template[nearest(y, template)[1]], atol=1e-5)
    energies = []
    for _ in range(15):
        y = transform(x, poses)[0].reshape(-1, 3)
        energies.append(nearest(y, template)[0].square().sum().item())
        poses = refine(x, poses, TemplateTarget(template, "nn"), [0.01])
    assert all(after <= before + 1e-4 for before, after in itertools.pairwise(energies))
    assert energies[-1] < 0.9 * energies[0]


def test_transport_uses_each_template_point_once() -> None:
    template = torch.randn(60, 3, generator=generator())
    order = torch.randperm(60, generator=generator(1))
    y = template[order] + 0.01 * torch.randn(60, 3, generator=generator(2))
    y[:30] = y[0]  # half of the points are at one place: the nearest neighbour would be the same for all
    hard, moved = soft_targets(y[None], template, 1.0, "nn")[0], soft_targets(y[None], template, 1.0, "ot")[0]
    assert len(hard[:30].unique(dim=0)) == 1
    # The marginals are uniform: the targets' mean is the template's, but for the last sweep.
    assert torch.allclose(moved.mean(0), template.mean(0), atol=0.02)
    assert not torch.allclose(hard.mean(0), template.mean(0), atol=0.02)


@pytest.mark.parametrize(("offset", "expected"), [(0.04, 0.59868766), (0.05, 0.5)])
def test_the_target_of_ordered_templates_is_their_posterior_mean(offset: float, expected: float) -> None:
    # pi_k ~ w_k exp(-|y - a S_k|^2 / 2 s^2): four points, a S_1 = 0 and a S_2 = 0.1 along x, s = 0.1
    s, a = 0.1, math.sqrt(1 - 0.1**2)
    means, y = torch.zeros(2, 4, 3, dtype=torch.float64), torch.zeros(1, 4, 3, dtype=torch.float64)
    means[1, :, 0], y[..., 0] = 0.1 / a, offset / a
    mixture = Mixture(means, torch.tensor(0.0, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    target = DenoisedTarget(
        lambda noisy, h: mixture(noisy, Level(a, s, 0))[1], lambda shape: torch.zeros(shape, dtype=torch.float64)
    )
    assert 1 - target(y, s / a)[0, 0, 0].item() * a / 0.1 == pytest.approx(expected, abs=1e-6)


def test_a_gaussian_prior_draws_the_centroid_in() -> None:
    # The offset shrinks by rho = a^2 v / (a^2 v + s^2) = 0.9 each step, and nothing turns.
    h = math.sqrt(0.1 / 0.9)

    def eps(noisy: Tensor, h: float) -> Tensor:
        return noisy * math.sqrt(0.1)  # s y / (a^2 + s^2), for a prior of variance 1

    x = torch.randn(1, 50, 3, generator=generator(), dtype=torch.float64)
    x = x - x.mean(1, keepdim=True)
    poses = torch.eye(4, dtype=torch.float64)[None, None].clone()
    poses[..., 0, 3] = 1
    found = refine(x, poses, DenoisedTarget(eps, lambda shape: torch.zeros(shape)), [h] * 10)
    assert found[0, 0, 0, 3].item() == pytest.approx(0.348678440, abs=1e-9)
    assert torch.allclose(found[0, 0, :3, :3], torch.eye(3, dtype=torch.float64), atol=1e-12)


def test_the_gradient_of_score_distillation_is_that_of_the_frozen_target() -> None:
    a, s = math.sqrt(0.9), math.sqrt(0.1)
    y = torch.randn(30, 3, generator=generator(), dtype=torch.float64, requires_grad=True)
    noise, predicted = (torch.randn(30, 3, generator=generator(k), dtype=torch.float64) for k in (1, 2))
    noisy = a * y.detach() + s * noise
    denoised = (noisy - s * predicted) / a
    (0.5 * (y - denoised).square().sum()).backward()
    assert torch.allclose(y.grad, s / a * (predicted - noise), atol=1e-5)


def test_levels_fall_and_end_at_the_small_one() -> None:
    levels = annealed((0.5, 0.01), 60)
    assert len(levels) == 60
    assert levels[0] == 0.5
    assert min(levels) == pytest.approx(0.01)
    assert levels[-1] == 0.02
    with pytest.raises(ValueError, match="steps=0"):
        annealed(steps=0)


@pytest.mark.parametrize("coupling", ["nn", "soft", "ot"])
def test_refinement_is_the_same_for_any_chunk(coupling: str) -> None:
    x = torch.randn(3, 40, 3, generator=generator())
    template = torch.randn(100, 3, generator=generator(1))
    start = random_poses(5, 3).float()
    whole = refine(x, start, TemplateTarget(template, coupling), annealed(steps=6))
    for chunk in (1, 2):
        parts = refine(x, start, TemplateTarget(template, coupling, chunk=1), annealed(steps=6), chunk=chunk)
        assert torch.allclose(parts, whole, atol=1e-6)
    one = refine(x, start[3:4], TemplateTarget(template, coupling), annealed(steps=6))
    assert torch.allclose(one, whole[3:4], atol=1e-6)


def test_refinement_turns_with_the_template_and_permutes_with_the_parts() -> None:
    x = torch.randn(3, 40, 3, generator=generator(), dtype=torch.float64)
    template = torch.randn(100, 3, generator=generator(1), dtype=torch.float64)
    start = random_poses(2, 3)
    found = refine(x, start, TemplateTarget(template, "ot"), annealed(steps=6))
    yaw = random_poses(1)[0]
    yaw[:3, 3] = 0
    turned = refine(x, yaw @ start, TemplateTarget(template @ yaw[:3, :3].T, "ot"), annealed(steps=6))
    assert torch.allclose(turned, yaw @ found, atol=1e-8)
    order = [2, 0, 1]
    permuted = refine(x[order], start[:, order], TemplateTarget(template, "ot"), annealed(steps=6))
    assert torch.allclose(permuted, found[:, order], atol=1e-8)


# Pushing apart


def line(*places: float) -> Tensor:
    return torch.tensor([[x, 0.0, 0.0] for x in places])


def test_the_published_push_moves_the_first_part_only() -> None:
    apart, pushes = push_apart(torch.stack([line(0, 1, 2, 3), line(3, 4, 5, 6)]), PushApartConfig(legacy=True, min_count=0))
    assert pushes == 4
    assert apart[0, 0, 0].item() == pytest.approx(-0.04)
    assert torch.equal(apart[1], line(3, 4, 5, 6))


@pytest.mark.parametrize("legacy", [True, False])
def test_parts_that_lie_in_each_other_whole_are_pushed_without_an_error(legacy: bool) -> None:
    same = torch.stack([line(0, 1, 2, 3), line(0, 1, 2, 3)])
    apart, pushes = push_apart(same, PushApartConfig(legacy=legacy, min_count=0, rounds=1))
    assert pushes == 1
    assert torch.isfinite(apart).all()
    assert (apart[0] - apart[1]).norm(dim=-1).min() == pytest.approx(0.01, abs=1e-6)


def test_our_push_moves_both_and_leaves_contact_alone() -> None:
    deep = torch.stack([line(0, 1, 2, 3), line(1, 2, 3, 4)])
    config = PushApartConfig(min_count=0, rounds=1)
    apart, pushes = push_apart(deep, config)
    assert pushes == 1
    shift = (apart - deep)[:, 0, 0]
    assert shift[0].item() == pytest.approx(-shift[1].item(), abs=1e-6)
    assert shift[0] < 0
    assert push_apart(torch.stack([line(0, 1, 2, 3), line(3, 4, 5, 6)]), config)[1] == 0


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rate=-1"):
        PushApartConfig(rate=-1)


# Symmetry, equivalence


def test_symmetries_of_boxes_and_cylinders() -> None:
    trimesh = pytest.importorskip("trimesh")
    assert len(cube_rotations()) == 24
    assert len(Symmetry.of(box_cloud((1, 0.5, 0.2)), box_cloud((1, 0.5, 0.2), seed=1))) == 4
    assert len(Symmetry.of(box_cloud((1, 1, 0.2), 3000), box_cloud((1, 1, 0.2), 3000, seed=1))) == 8
    cylinder = trimesh.creation.cylinder(radius=0.2, height=1, sections=64)
    a, b = (torch.from_numpy(trimesh.sample.sample_surface(cylinder, 2000, seed=s)[0]) for s in (0, 1))
    symmetry = Symmetry.of(a, b)
    assert symmetry.revolution == 2
    turn = quaternion_to_matrix(torch.tensor([math.cos(0.4), 0, 0, math.sin(0.4)], dtype=torch.float64))
    rotation = random_rotations(1, generator())[0]
    assert symmetry.error(rotation @ turn, rotation) < 1e-6
    assert Symmetry.none().error(rotation @ turn, rotation) == pytest.approx(0.8)
    # Spun about its axis, the part is right.
    parts = part_set(torch.stack([a, a]).float(), torch.stack([random_poses(1)[0]] * 2))
    spun = parts.poses.clone()
    spun[0, :3, :3] = spun[0, :3, :3] @ turn
    assert evaluate(spun, parts)["part_accuracy"] == 1


def test_parts_of_one_class_are_matched() -> None:
    legs = torch.randn(1, 60, 3, generator=generator()).repeat(4, 1, 1) * 0.1
    poses = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    poses[:, 0, 3] = torch.arange(4)
    permuted = poses[[1, 2, 3, 0]]
    assert evaluate(permuted, part_set(legs, poses))["part_accuracy"] == 0
    alike = part_set(legs, poses, geometry_ids=torch.ones(4, dtype=torch.long))
    assert evaluate(permuted, alike)["part_accuracy"] == 1
    assert match_parts(transform(legs.double(), permuted), transform(legs.double(), poses), alike.geometry_ids) == [1, 2, 3, 0]
    # The published script never matches the class 0.
    zero = part_set(legs, poses, geometry_ids=torch.zeros(4, dtype=torch.long))
    assert evaluate(permuted, zero, "dgl")["part_accuracy"] == 0
    assert evaluate(permuted, alike, "dgl")["part_accuracy"] == 1


def test_classes_of_geometry_are_boxes_that_differ_by_less_than_a_tenth() -> None:
    extents = torch.tensor([[1.0, 0.1, 0.1], [0.1, 0.95, 0.1], [0.8, 0.1, 0.1], [1.0, 0.1, 0.1]])
    assert geometry_classes(extents).tolist() == [0, 0, 1, 0]
    assert geometry_classes(extents, torch.tensor([1, 1, 1, 2])).tolist() == [0, 0, 1, 2]


# Measures


@pytest.mark.parametrize(("delta", "right"), [(0.0706, 1.0), (0.0708, 0.5)])
def test_a_displaced_part_is_wrong_beyond_0_0707(delta: float, right: float) -> None:
    poses = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    poses[1, 0, 3] = 5
    parts = part_set(torch.zeros(2, 1, 3), poses, mirrors=torch.ones(2, 3, dtype=torch.bool))
    moved = poses.clone()
    moved[0, 0, 3] += delta
    assert evaluate(moved, parts)["part_accuracy"] == right


@pytest.mark.parametrize(("delta", "right"), [(0.099, 1.0), (0.101, 0.0)])
def test_a_contact_is_lost_beyond_0_1(delta: float, right: float) -> None:
    poses = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    contacts = torch.zeros(2, 2, 4)
    contacts[0, 1, 0] = contacts[1, 0, 0] = 1
    parts = part_set(torch.zeros(2, 1, 3), poses, contacts=contacts, mirrors=torch.ones(2, 3, dtype=torch.bool))
    moved = poses.clone()
    moved[0, 0, 3] += delta
    for protocol in ("strict", "dgl", "mpa"):
        assert evaluate(moved, parts, protocol)["connectivity_accuracy"] == right


def test_mirrors_of_contact_points_are_those_of_the_protocol() -> None:
    # Part 1's label is mirrored along y alone, which DGL does not visit (it meets 5 of the 8), MPA does, and strict does if it may.
    poses = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    contacts = torch.zeros(2, 2, 4)
    contacts[0, 1] = torch.tensor([1, 0, 0.5, 0.0])
    contacts[1, 0] = torch.tensor([1, 0, 0.5, 0.0])
    poses[1, 1, 3] = 1.0
    points = torch.randn(2, 40, 3, generator=generator())
    for mirrors, strict in (([True, True, True], 1.0), ([False, True, False], 1.0), ([True, False, True], 0.0)):
        parts = part_set(points, poses, contacts=contacts, mirrors=torch.tensor([[False] * 3, mirrors]))
        assert evaluate(poses, parts)["connectivity_accuracy"] == strict
    assert evaluate(poses, parts, "mpa")["connectivity_accuracy"] == 1


def test_dgl_divides_by_twenty_parts_and_takes_the_best() -> None:
    points = torch.randn(5, 30, 3, generator=generator())
    true = random_poses(5)
    parts = part_set(points, true, mirrors=torch.ones(5, 3, dtype=torch.bool))
    wrong = random_poses(5, seed=8)
    strict, dgl = evaluate(wrong, parts), evaluate(wrong, parts, "dgl")
    assert dgl["shape_chamfer"] / strict["shape_chamfer"] == pytest.approx(0.25)
    both = torch.stack([wrong, true])
    assert evaluate(both, parts, "dgl")["part_accuracy"] == 1
    assert evaluate(both, parts)["part_accuracy"] < 1
    assert evaluate(both, parts)["best_part_accuracy"] == 1
    alone = [evaluate(both, parts), evaluate(wrong[None], parts)]
    assert summarise(alone)["best_part_accuracy"] == pytest.approx(0.5 * (1 + alone[1]["part_accuracy"]))
    rows = [evaluate(true, parts), evaluate(wrong, parts)]
    assert summarise(rows)["part_accuracy"] == pytest.approx(0.5 * (1 + rows[1]["part_accuracy"]))


def test_measures_need_truth_and_a_known_protocol() -> None:
    points = torch.randn(2, 30, 3, generator=generator())
    with pytest.raises(ValueError, match="not known"):
        evaluate(random_poses(2), part_set(points, None))
    with pytest.raises(ValueError, match="Did you mean 'strict'"):
        evaluate(random_poses(2), part_set(points, random_poses(2)), "strikt")
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        evaluate(random_poses(3), part_set(points, random_poses(2)))
