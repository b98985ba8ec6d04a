"""PartAssemblyPipeline: a reference, given and random poses, a model that is known exactly; what it refuses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from genkit.assembly import PartSet, Search, evaluate, template_surface, transform
from genkit.assembly.hypotheses import TEMPERATURE, agreement, loose_pieces, verdict
from genkit.assembly.point_model import PointModel
from genkit.assembly.refinement import refine
from genkit.assembly.rigid import angle
from genkit.pipelines import PartAssemblyPipeline
from tests.genkit.test_assembly_search import QUICK, chair

trimesh = pytest.importorskip("trimesh")


class OneCloud(ModelMixin, ConfigMixin):
    """The exact denoiser of data that is one cloud S, point by point: eps = (x - alpha S) / sigma."""

    @register_to_config
    def __init__(self, categories: list[str], points: int = 4096) -> None:
        super().__init__()
        self.register_buffer("cloud", torch.zeros(points, 3))
        self.gain = nn.Parameter(torch.ones(()))
        self.abar = scheduler().alphas_cumprod

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        abar = self.abar[timestep].to(sample)[:, None, None]
        cloud = self.cloud[: sample.shape[1]]
        return SimpleNamespace(sample=(sample - abar.sqrt() * cloud) / (1 - abar).sqrt() * self.gain)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)


def planted(cloud: Tensor) -> PartAssemblyPipeline:
    model = OneCloud(["chair", "table"], len(cloud))
    model.cloud.copy_(cloud)
    return PartAssemblyPipeline(model, scheduler())


@pytest.fixture(scope="module")
def parts() -> PartSet:
    return PartSet.from_meshes(chair(), truth=True)


@pytest.fixture(scope="module")
def scan() -> Tensor:
    return torch.from_numpy(trimesh.sample.sample_surface(trimesh.util.concatenate(chair()), 4096, seed=7)[0])


@pytest.fixture(scope="module")
def found(parts: PartSet, scan: Tensor) -> Any:
    return PartAssemblyPipeline()(parts, reference=scan, search=QUICK, num_hypotheses=4)


def test_parts_are_assembled_on_a_scan(parts: PartSet, found: Any) -> None:
    count, size = len(found.poses), len(parts)
    assert evaluate(found.poses, parts)["part_accuracy"] == 1
    assert found.poses.shape == found.motions.shape == (count, size, 4, 4)
    assert found.points.shape == (count, size, 1000, 3)
    assert found.scores["residual"].shape == (count, size)
    assert (found.scores["energy"].diff() >= 0).all()
    assert found.scores["coverage"][0] > 0.95
    assert found.scores["fit"][0] > 0.95
    assert found.equivalence == [0, 1, 2, 2, 2, 2]
    assert found.scale.tolist() == [1] * count
    # Motions act on what came in, poses on frames in units.
    mesh = parts.meshes[0].copy().apply_transform(found.motions[0, 0].numpy())
    assert abs(mesh.bounds / parts.unit - chair()[0].bounds / parts.unit).max() < 0.05


def test_the_order_of_the_parts_and_the_output_type_change_nothing(parts: PartSet, scan: Tensor, found: Any) -> None:
    order = [3, 0, 5, 1, 4, 2]
    out = PartAssemblyPipeline()(parts[order], reference=scan, search=QUICK, num_hypotheses=4, output_type="np")
    assert torch.equal(torch.from_numpy(out.poses), found.poses[:, order])
    assert out.equivalence == [0, 1, 0, 3, 0, 0]


def test_given_poses_are_refined_and_kept_when_they_are_right(parts: PartSet, scan: Tensor) -> None:
    out = PartAssemblyPipeline()(
        parts, reference=scan, init="given", refine_steps=4, h_range=(0.03, 0.02), coupling="nn", search=QUICK, return_history=True
    )
    assert evaluate(out.poses, parts)["part_accuracy"] == 1
    assert len(out.history) >= 4
    assert out.history[0].shape == (6, 4, 4)


def test_random_starts_are_the_same_for_any_chunk_and_order(parts: PartSet, scan: Tensor) -> None:
    settings: dict[str, Any] = {
        "reference": scan, "init": "random", "refine_steps": 2, "num_hypotheses": 3, "search": QUICK, "points_per_part": 32,
    }  # fmt: skip
    whole = PartAssemblyPipeline()(parts, **settings)
    assert torch.allclose(PartAssemblyPipeline()(parts, chunk_size=1, **settings).poses, whole.poses, atol=1e-6)
    order = [5, 4, 3, 2, 1, 0]
    # Four legs are one box moved, so which of them is which may differ; the others are told apart.
    turned = PartAssemblyPipeline()(parts[order], **settings).poses[:, order]
    assert torch.allclose(turned[:, :2], whole.poses[:, :2], atol=1e-5)


def test_a_reference_of_another_scale_is_scaled(parts: PartSet, scan: Tensor) -> None:
    out = PartAssemblyPipeline()(
        parts, reference=25.4 * scan, init="given", search=QUICK, refine_steps=1, coupling="nn", h_range=(0.02, 0.02)
    )
    assert out.scale[0] == pytest.approx(25.4, rel=0.1)


def test_the_published_loop_solves_a_model_of_one_cloud_at_once(parts: PartSet) -> None:
    """Spec g.1: targets in the order of the points give the true poses after one step, whatever the start."""
    count = 100
    truth = transform(parts.points[:, :count], parts.poses.float()).flatten(0, 1)
    centre, scale = truth.mean(0), 1 / truth.std()
    model = planted((truth - centre) * scale)
    target = PointModel(model.denoiser, model.scheduler).target("chair", float(scale), centre, [5])
    start = torch.eye(4).repeat(1, 6, 1, 1)
    poses = refine(parts.points[:, :count], start, target, [0.02])[0]
    assert (poses[:, :3, 3] - parts.poses[:, :3, 3]).norm(dim=-1).max() < 1e-4
    assert torch.rad2deg(angle(poses[:, :3, :3].double(), parts.poses[:, :3, :3])).max() < 0.05


def test_the_published_fit_ends_where_kabsch_does(parts: PartSet) -> None:
    # Moved by less than a sample's distance to its neighbours, nearest targets are a point's own.
    truth, x = parts.poses.float()[None], parts.points[:, :60]
    goal = (x @ truth[..., :3, :3].mT + truth[..., None, :3, 3]).flatten(1, 2)
    start = truth.clone()
    start[..., :3, 3] += 0.002
    for fit in ("icp", "kabsch"):
        poses = refine(x, start, lambda y, h: goal, [0.02], fit=fit)
        assert (poses - truth).abs().max() < 1e-4, fit


def test_templates_come_from_the_model_and_are_cut_to_the_parts_scale(parts: PartSet, scan: Tensor) -> None:
    cloud = ((scan - scan.mean(0)) / scan.std()).float()
    pipe = planted(cloud)
    clouds = pipe.generate_templates(2, "chair", steps=4)
    assert torch.allclose(clouds[0], cloud[:2048], atol=1e-3)
    assert torch.equal(pipe.generate_templates(1, "chair", steps=4)[0], clouds[0])
    out = pipe(parts, category="chair", num_templates=1, num_hypotheses=2, template_steps=4, search=QUICK)
    assert evaluate(out.poses, _centred(parts))["part_accuracy"] >= 0.5
    assert out.scale[0] == pytest.approx(float(parts.unit / scan.std()), rel=0.1)


def test_what_the_model_imagines_is_ranked_by_what_it_and_common_sense_say(parts: PartSet, scan: Tensor) -> None:
    pipe = planted(((scan - scan.mean(0)) / scan.std()).float())
    told: list[tuple[str, float]] = []
    out = pipe(
        parts, category="chair", num_templates=2, num_hypotheses=3, template_steps=4, search=QUICK,
        on_stage=lambda name, share: told.append((name, share)),
    )  # fmt: skip
    assert {"surprise", "overlap", "gap"} <= set(out.scores)
    agree = out.scores["agreement"]
    assert torch.equal(agree, agree.sort(descending=True).values)
    assert 0 < agree[-1] <= agree[0] <= 1
    middle = (parts.areas.double()[:, None] * out.points[0].mean(1)).sum(0)
    assert middle.abs().max() < 1e-6  # the centroid of the surface is where a model's clouds have it
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert {"imagine", "select", "rank"} <= {name for name, _ in told}


def _centred(parts: PartSet) -> PartSet:
    """The truth about the origin, where templates lie."""
    whole = trimesh.sample.sample_surface(trimesh.util.concatenate(chair()), 4096, seed=7)[0]
    poses = parts.poses.clone()
    poses[:, :3, 3] -= torch.from_numpy(whole).mean(0) / parts.unit
    return dataclasses.replace(parts, poses=poses)


def test_the_pipeline_is_saved_and_loaded_with_and_without_a_model(tmp_path: Path) -> None:
    PartAssemblyPipeline().save_pretrained(tmp_path / "empty")
    assert PartAssemblyPipeline.from_pretrained(tmp_path / "empty").denoiser is None


def test_pieces_of_an_assembly_are_counted(parts: PartSet) -> None:
    assert loose_pieces(parts, parts.poses) == 1
    apart = parts.poses.clone()
    apart[0, 0, 3] += 3
    assert loose_pieces(parts, apart) > 1


def test_agreement_is_the_expected_share_of_parts_in_place(parts: PartSet, scan: Tensor) -> None:
    search, n = Search(parts, template_surface(scan, parts.unit), QUICK), len(parts)
    poses = parts.poses[None].repeat(3, 1, 1, 1)
    poses[1:, 0, 0, 3] += 0.5
    poses[2, 1, 1, 3] += 0.5
    # Of two of three equally likely assemblies one part lies elsewhere in turn, so that the middle one has most in common with all.
    even = agreement(search, poses, torch.zeros(3))
    assert even.tolist() == pytest.approx([(n - 1) / n, (n - 2 / 3) / n, (n - 1) / n])
    likely = agreement(search, poses, TEMPERATURE * torch.tensor([0.0, math.log(2), 1e3]))
    assert likely.tolist() == pytest.approx(
        [2 / 3 + (n - 1) / n / 3, 2 / 3 * (n - 1) / n + 1 / 3, 2 / 3 * (n - 2) / n + (n - 1) / n / 3]
    )
    exchanged = parts.poses.clone()
    exchanged[[2, 3]] = parts.poses[[3, 2]]  # two legs
    assert agreement(search, torch.stack([parts.poses, exchanged]), torch.zeros(2)).tolist() == [1, 1]


def test_what_ties_is_ambiguous_and_what_is_bare_is_poor() -> None:
    energy = torch.tensor([1.0, 1.04, 1.2])
    scores = {"score": energy + 7, "energy": energy, "coverage": torch.full((3,), 0.97), "fit": torch.full((3,), 0.99)}
    assert (verdict(scores).word, verdict(scores).tied) == ("ambiguous", 2)
    assert verdict({**scores, "score": torch.tensor([8.0, 8.06, 8.2])}).word == "clear"
    assert verdict({**scores, "coverage": torch.tensor([0.7] * 3)}).word == "poor"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no model here"),
        ({"coupling": "index"}, "no model here"),
        ({"init": "anyhow"}, "Unknown init"),
        ({"preset": "papper"}, "Unknown preset"),
        ({"num_hypotheses": 0}, "num_hypotheses=0 must be at least 1"),
        ({"template_steps": 0}, "template_steps=0 must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(parts: PartSet, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartAssemblyPipeline()(parts, **arguments)


def test_a_category_that_the_model_lacks_and_a_reference_with_index_are_refused(parts: PartSet, scan: Tensor) -> None:
    with pytest.raises(ValueError, match="Did you mean 'chair'"):
        planted(scan.float())(parts, category="chiar")
    with pytest.raises(ValueError, match="no use"):
        planted(scan.float())(parts, reference=scan, coupling="index")
    with pytest.raises(ValueError, match="no alphas_cumprod"):
        PointModel(None, SimpleNamespace())
