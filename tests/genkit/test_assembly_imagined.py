"""What tells assemblies apart where the template cannot: gaps, overlaps, what the model makes of a cloud."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from genkit import noise
from genkit.assembly import PartSet, Search
from genkit.assembly.descriptors import FEATURES, part_features
from genkit.assembly.imagined import UNTOLD, WEIGHTS, Opinion, imagine, samples
from genkit.assembly.plausible import APART, gap, overlap, pulled
from genkit.assembly.point_model import SURPRISED_AT, PointModel
from genkit.assembly.surfaces import part_surface, template_surface
from tests.pipelines.test_assembly import OneCloud, scheduler

trimesh = pytest.importorskip("trimesh")


def boxes(*centres: float) -> PartSet:
    """Unit cubes along x, assembled at the centres; their unit is 1."""
    meshes = [trimesh.creation.box((1, 1, 1), trimesh.transformations.translation_matrix((x, 0, 0))) for x in centres]
    return PartSet.from_meshes(meshes, truth=True)


def test_gaps_are_those_of_the_spanning_tree() -> None:
    parts = boxes(0.0, 1.3, 2.3)
    assert parts.poses is not None
    # 0.3 between the first two; the samples of surfaces that touch are up to APART from each other.
    assert gap(parts, parts.poses) == pytest.approx(0.3 - APART, abs=0.02)
    assert gap(boxes(0.0, 1.0, 2.0), boxes(0.0, 1.0, 2.0).poses) == 0


@pytest.mark.parametrize(("apart", "share"), [(1.0, 0.0), (0.5, 1 / 6), (1.5, 0.0)])
def test_overlap_is_the_share_of_the_surface_inside(apart: float, share: float) -> None:
    parts = boxes(0.0, apart)
    surfaces = [part_surface(parts, i) for i in range(2)]
    # One whole side of each cube is inside the other at 0.5; what is flush with the other's sides is not.
    assert overlap(parts, surfaces, parts.poses) == pytest.approx(share, abs=0.02)
    clouds = PartSet.from_clouds([parts.points[i] for i in range(2)])
    assert overlap(clouds, surfaces, parts.poses) == 0


def test_what_nearly_touches_is_brought_into_contact() -> None:
    near, far = boxes(0.0, 1.1, 2.2), boxes(0.0, 1.1, 2.5)
    assert gap(near, pulled(near, near.poses)) == 0
    moved = pulled(far, far.poses)  # the third is too far away and stays
    assert gap(far, moved) == pytest.approx(0.5 - APART, abs=0.02)
    assert torch.equal(pulled(boxes(0.0, 1.0), boxes(0.0, 1.0).poses), boxes(0.0, 1.0).poses)


def model(points: int = 2048) -> tuple[PointModel, torch.Tensor]:
    net = OneCloud(["chair"], points)
    net.cloud.copy_(torch.randn(points, 3, generator=torch.Generator().manual_seed(0)))
    return PointModel(net, scheduler()), net.cloud


def test_the_surprise_of_a_shifted_cloud_is_the_shift_over_h_squared() -> None:
    exact, cloud = model()
    assert exact.surprise(cloud[None]) == pytest.approx(0, abs=1e-6)
    h = float(exact.ratios[exact.nearest(SURPRISED_AT)])
    assert exact.surprise((cloud + 0.02)[None]) == pytest.approx((0.02 / h) ** 2, rel=1e-3)


def test_a_cloud_is_renewed_from_its_level_and_the_same_for_a_seed() -> None:
    exact, cloud = model(512)
    other = noise.normal([3], (512, 3))
    assert torch.allclose(exact.renewed(other, 0.5, "chair")[0], cloud, atol=1e-4)

    class Still(OneCloud):
        """Predicts no noise: what is noised stays so, scaled up."""

        def forward(self, sample, timestep, class_labels=None):
            out = super().forward(sample, timestep, class_labels)
            out.sample = torch.zeros_like(out.sample)
            return out

    still = PointModel(Still(["chair"], 512), scheduler())
    low, high = (float((still.renewed(other, h, seed=1) - other).square().mean().sqrt()) for h in (0.35, 0.7))
    assert (low, high) == pytest.approx((0.35, 0.7), rel=0.1)
    assert torch.equal(still.renewed(other, 0.5, seed=1), still.renewed(other, 0.5, seed=1))


def test_every_other_sample_has_as_many_points_as_the_model_was_trained_on() -> None:
    exact, _ = model()
    seen: list[int] = []
    exact.denoiser.register_to_config(sample_size=512)
    forward = exact.denoiser.forward
    exact.denoiser.forward = lambda x, *rest, **more: (seen.append(x.shape[1]), forward(x, *rest, **more))[1]
    clouds = samples(exact, 3, "chair", steps=3, seed=0)
    assert clouds.shape == (3, 2048, 3)
    assert sorted(set(seen)) == [512, 2048]
    assert torch.equal(samples(exact, 2, "chair", steps=3, seed=0), clouds[:2])


class Told(OneCloud):
    """Notes the parts that it is told."""

    told: ClassVar[list[torch.Tensor | None]] = []

    def forward(self, sample, timestep, class_labels=None, parts=None):
        self.told.append(parts)
        return super().forward(sample, timestep, class_labels)


def test_a_model_is_told_the_parts_and_they_tell_the_scale() -> None:
    parts = boxes(0.0, 1.0)
    net = Told(["chair"], 2048)
    net.register_to_config(part_features=FEATURES, surface_area=48.0)
    Told.told.clear()
    told = PointModel(net, scheduler(), parts)
    assert told.scale == pytest.approx(2)  # the cubes have an area of 12
    clouds = samples(told, 2, "chair", steps=2, seed=0)
    assert clouds.shape == (2, 2048, 3)
    assert all(torch.equal(seen[0], part_features(parts.points, parts.areas)) for seen in Told.told)
    silent = PointModel(net, scheduler(), parts, tell=False)
    Told.told.clear()
    silent.generate(1, "chair", points=64, steps=2)
    assert Told.told == [None, None]
    assert silent.scale == told.scale
    # What it finds rough counts for more where it knows what the parts can make.
    templates = [template_surface(cloud, scale=told.scale) for cloud in clouds]
    search = Search(parts, templates[0])
    energy = search.energy(parts.poses[None])
    knows, guesses = (Opinion(parts, of, "chair", templates).scores(search, parts.poses[None], energy) for of in (told, silent))
    assert knows["surprise"] == guesses["surprise"] > 0
    assert knows["score"] - guesses["score"] == pytest.approx((WEIGHTS["surprise"] - UNTOLD) * float(knows["surprise"]), rel=1e-4)
    # Of one that is returned the model sees more clouds.
    more = Opinion(parts, told, "chair", templates).closer(parts.poses[None], knows)
    assert more["surprise"] != knows["surprise"]
    assert more["score"] - knows["score"] == pytest.approx(
        WEIGHTS["surprise"] * float(more["surprise"] - knows["surprise"]), rel=1e-3
    )
    terms = sum(weight * float(knows[name]) for name, weight in WEIGHTS.items())
    assert knows["score"] == pytest.approx(float(energy) + terms, rel=1e-4)


def test_templates_of_a_model_that_knows_the_shape_are_the_shape() -> None:
    parts = boxes(0.0, 1.0)
    whole = trimesh.sample.sample_surface(trimesh.util.concatenate(parts.meshes), 4096, seed=1)[0]
    cloud = torch.from_numpy(whole - whole.mean(0)).float()
    exact, known = model(4096)
    known.copy_(cloud)
    template = template_surface(cloud)
    opinion = Opinion(parts, exact, "chair", [template] * 2, float(cloud.square().mean().sqrt()))
    found = imagine(parts, opinion, [(template, 1.0, torch.zeros(3))] * 2, keep=1)
    assert len(found) == 1
    template, scale, _ = found[0]
    assert scale == pytest.approx(1, abs=0.03)
    assert (template.points * scale - cloud).abs().max() < 1e-3
