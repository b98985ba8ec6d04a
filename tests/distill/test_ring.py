"""A ring of eight modes, distilled to one step: what works works, and what has to fail fails."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.ring import COUNT, distil, student_rows
from genkit.data import ring
from genkit.data.ring import mmd2, points, ring_metrics
from genkit.distill.data import open_data
from genkit.distill.ring import RingDenoiser, load_student, ring_config, ring_data, train_ring
from genkit.distill.trainer import DistillTrainer
from genkit.noise import mix

SHORT = {"steps": 150, "lr": 5e-4}  # a student that is not good yet, but far better than its teacher in one step


@pytest.fixture(scope="module")
def reference() -> Tensor:
    return points(2048, seed=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> RingDenoiser:
    return train_ring(tmp_path_factory.mktemp("teacher"), steps=1000)


@pytest.fixture(scope="module")
def teacher_mmd(teacher: RingDenoiser, reference: Tensor) -> dict[int, float]:
    return {steps: ring_metrics(teacher.sample(2048, steps), reference)["mmd"] for steps in (50, 4, 2, 1)}


def one_step(run: Path, reference: Tensor) -> dict[str, float]:
    return ring_metrics(load_student(run).few_steps(2048, (1.0,)), reference)


# The data


def test_the_discrepancy_to_the_middle_of_the_ring_is_the_closed_form(reference):
    """Gaussian integrals: E k_h(0, x) and E k_h(x, x') of a mixture of Gaussians."""
    s2, r2 = ring.STD**2, ring.RADIUS**2
    expected = 0.0
    for h2 in (h**2 for h in ring.BANDWIDTHS):
        squares = (ring.centres() - ring.centres()[0]).square().sum(1)
        within = (h2 / (h2 + 2 * s2) * torch.exp(-squares / (2 * (h2 + 2 * s2)))).mean().item()
        expected += 1 + within - 2 * h2 / (h2 + s2) * math.exp(-r2 / (2 * (h2 + s2)))
    assert mmd2(torch.zeros(50, 2), reference) == pytest.approx(expected, rel=5e-3)
    assert expected == pytest.approx(2.77, abs=5e-3)


def test_samples_of_the_ring_measure_as_the_ring(reference):
    found = ring_metrics(points(2048, seed=5), reference)
    within = 1 - math.exp(-4.5)  # three standard deviations of two coordinates
    assert abs(found["mmd"]) < 2.0
    assert found["hq"] == pytest.approx(within, abs=0.008)
    assert 0.1 < found["min_mode"] < 0.125
    assert found["std"] == pytest.approx(0.12 * math.sqrt(1 - 4.5 * math.exp(-4.5) / within), rel=0.03)


def test_a_mode_that_is_lost_shows(reference):
    x = points(2048, seed=5)
    lost = x[(x - ring.centres()[0]).norm(dim=1) > 0.5]
    found = ring_metrics(lost, reference)
    assert found["min_mode"] == 0
    assert found["mmd"] > 5
    assert found["hq"] > 0.98


def test_nothing_near_a_mode_has_no_width(reference):
    found = ring_metrics(torch.zeros(10, 2), reference)
    assert found["hq"] == 0
    assert "std" not in found


@pytest.mark.parametrize("shape", [(1, 2), (0, 2), (5, 3), (5,)])
def test_samples_that_cannot_be_compared(shape, reference):
    with pytest.raises(ValueError, match=r"Samples of shape .* cannot be compared. Give points \(N, 2\), two or more"):
        ring_metrics(torch.zeros(shape), reference)


def test_points_of_a_seed_are_the_same():
    assert torch.equal(points(10, seed=3), points(10, seed=3))
    assert not torch.equal(points(10, seed=3), points(10, seed=4))


# The teacher


def test_the_teacher_needs_its_steps(teacher_mmd):
    assert teacher_mmd[50] < 3
    assert teacher_mmd[50] < teacher_mmd[4] < 60
    assert 150 < teacher_mmd[2] < 800
    assert teacher_mmd[1] > 2000


def test_a_teacher_is_trained_once(tmp_path):
    first = train_ring(tmp_path, steps=3)
    again = train_ring(tmp_path, steps=1000)
    assert torch.equal(first.sample(4, 2), again.sample(4, 2))


def test_the_ring_has_no_condition(teacher):
    with pytest.raises(ValueError, match=r"The condition of ring takes no labels"):
        teacher.condition(labels=[1])


def test_points_become_data(teacher, tmp_path):
    x = points(32)
    ring_data(x, teacher, tmp_path, "ring")
    data = open_data(tmp_path, teacher)
    assert torch.equal(data.latents([3, 7]), x[[3, 7]].reshape(2, 2, 1, 1))


# The students


@pytest.fixture(scope="module")
def hinge(teacher: RingDenoiser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distil("hinge", teacher, tmp_path_factory.mktemp("runs"), **SHORT)


def test_one_step_of_the_student_replaces_many(hinge, reference, teacher_mmd):
    found = one_step(hinge, reference)
    assert found["mmd"] < teacher_mmd[1] / 20
    assert found["mmd"] < teacher_mmd[2] / 4
    assert found["min_mode"] > 0.03


def test_the_distillation_loss_alone_fails(teacher, reference, teacher_mmd, tmp_path):
    """It pulls samples together."""
    found = one_step(distil("distillation only", teacher, tmp_path, **SHORT), reference)
    assert found["mmd"] > teacher_mmd[1] / 5
    assert found["hq"] < 0.05


def test_stale_gradients_in_the_heads_fail_and_clearing_them_repairs_it(teacher, reference, teacher_mmd, tmp_path):
    stale, cleared = (one_step(distil(f"{name} gradients", teacher, tmp_path, **SHORT), reference) for name in ("stale", "cleared"))
    assert cleared["mmd"] < teacher_mmd[1] / 20
    assert stale["mmd"] > 5 * cleared["mmd"]
    assert stale["min_mode"] < 0.01


def test_a_fused_round_is_a_separate_one(teacher, tmp_path):
    """The student is the same when it is asked again, and so are its samples and what the new heads make of them."""
    runs = [distil(name, teacher, tmp_path, steps=5) for name in ("hinge", "hinge, separate rounds")]
    students = [load_student(run, "last").network.state_dict() for run in runs]
    for name, value in students[0].items():
        torch.testing.assert_close(students[1][name], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(students[0]["out.weight"], teacher.network.state_dict()["out.weight"])


def test_rows_of_the_benchmark(teacher, reference, tmp_path):
    rows = student_rows("four levels", distil("four levels", teacher, tmp_path, steps=2), reference)
    assert list(rows) == [f"four levels, {n} renoised" for n in (1, 2, 4)] + ["four levels, 4 of the ODE"]
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())


def test_synthetic_data_are_samples_of_the_teacher(teacher, tmp_path):
    distil("synthetic data", teacher, tmp_path, steps=1)
    data = open_data(tmp_path / "synthetic-data" / "data", teacher)
    x = data.latents(range(1024)).flatten(1)
    assert abs(ring_metrics(x, teacher.sample(1024, 20))["mmd"]) < 3


def test_levels_of_the_student_are_those_it_visits(teacher):
    """At one level, x0 is what the denoiser makes of pure noise; at two, of its noised x0."""
    eps = [torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(mix(4, step))) for step in range(2)]
    with torch.no_grad():
        x0 = eps[0] - teacher.network(eps[0], torch.ones(5))
        x = 0.5 * x0 + 0.5 * eps[1]
        second = x - 0.5 * teacher.network(x, torch.full((5,), 0.5))
    torch.testing.assert_close(teacher.few_steps(5, (1.0,), seed=4), x0.flatten(1))
    torch.testing.assert_close(teacher.few_steps(5, (1.0, 0.5), seed=4), second.flatten(1))


@pytest.mark.slow
def test_one_step_is_as_good_as_four_of_the_teacher(tmp_path):
    """With the settings of the benchmark: at most the teacher's four steps and a hundredth of its one step, and no mode lost."""
    reference = points(COUNT, seed=2)
    teacher = train_ring(tmp_path)
    four, one = (ring_metrics(teacher.sample(COUNT, steps), reference)["mmd"] for steps in (4, 1))
    trainer = DistillTrainer(
        teacher, ring_data(points(16384, seed=1), teacher, tmp_path / "data", "ring"), ring_config(), tmp_path / "run"
    )
    trainer.fit()
    found = ring_metrics(load_student(tmp_path / "run").few_steps(COUNT, (1.0,)), reference)
    assert found["mmd"] <= four
    assert found["mmd"] <= one / 100
    assert found["min_mode"] >= 0.08
