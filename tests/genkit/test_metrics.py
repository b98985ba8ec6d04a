"""Metrics of samples: cases whose answers are plain, or known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from genkit.metrics.estimate import bootstrap_mean, counts
from genkit.metrics.frechet import frechet_distance, frechet_estimate
from genkit.metrics.kernel import kernel_distance, squared_mmd, subset_size
from genkit.metrics.manifold import Manifold, expected_coverage, manifold_metrics


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_moments(mean: list[float], std: list[float], count: int = 50, seed: int = 0) -> torch.Tensor:
    """Rows whose mean and standard deviations are exactly these, without correlation."""
    x = normal(count, len(mean), seed=seed).double()
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(count - 1)
    return x * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


class TestFrechet:
    def test_gaussians_without_correlation(self) -> None:
        """||mu1 - mu2||^2 + sum (s1 - s2)^2."""
        x, y = with_moments([0, 1, 2], [1, 2, 3]), with_moments([1, 1, 4], [1, 1, 5], count=70, seed=1)
        assert frechet_distance(x, y) == pytest.approx(1 + 4 + 0 + 1 + 4, rel=1e-9)
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-7)

    def test_one_dimension(self) -> None:
        assert frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [9.0]])) == pytest.approx(36 + 2)

    def test_the_matrix_square_root_of_scipy(self) -> None:
        x, y = normal(60, 8) @ normal(8, 8, seed=2), normal(80, 8, seed=1)
        s1, s2 = (np.cov(f.double().numpy(), rowvar=False) for f in (x, y))
        root = scipy.linalg.sqrtm(s1 @ s2).real
        expected = (x.double().mean(0) - y.double().mean(0)).square().sum().item() + np.trace(s1 + s2 - 2 * root)
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)

    def test_fewer_rows_than_columns(self) -> None:
        """S1 of 3 rows has rank 2."""
        assert frechet_distance(normal(3, 10), normal(3, 10)) == pytest.approx(0, abs=1e-6)

    def test_the_interval_covers_the_expectation(self) -> None:
        """Of 100 samples of one distribution, intervals of 95 % miss the mean distance about five times."""
        reference = normal(2000, 2, seed=99) * 2
        shifted = [frechet_estimate(normal(200, 2, seed=i) + 1, reference, replicates=100, seed=i) for i in range(100)]
        mean = np.mean([each.value for each in shifted])
        hits = sum(each.low <= mean <= each.high for each in shifted)
        assert 88 <= hits <= 100
        assert all(each.count == 200 for each in shifted)

    def test_no_replicates_no_interval_and_bad_shapes(self) -> None:
        found = frechet_estimate(normal(9, 2), normal(9, 2, seed=1), replicates=0)
        assert found.low == found.value == found.high
        with pytest.raises(ValueError, match=r"\(1, 2\) and \(9, 2\)"):
            frechet_distance(normal(1, 2), normal(9, 2))


class TestKernel:
    def test_by_hand(self) -> None:
        assert squared_mmd(torch.zeros(2, 1), torch.ones(2, 1)) == 1 + 8 - 2

    def test_it_has_no_bias(self) -> None:
        """Of small sets of one distribution the mean is 0, where the biased estimate is well above."""
        drawn = torch.tensor([squared_mmd(normal(5, 3, seed=2 * i), normal(5, 3, seed=2 * i + 1)) for i in range(2000)])
        error = drawn.std() / math.sqrt(len(drawn))
        assert drawn.mean().abs() < 3 * error
        assert error < 0.05
        assert (drawn < 0).float().mean() > 0.4

    def test_its_expectation_in_closed_form(self) -> None:
        """N(0, 1) against N(1, 1) in one dimension, k = (x y + 1)^3: only moments up to 3 count.

        E k(x, x') = sum_j C(3, j) m_j^2 with m = (1, 0, 1, 0) and (1, 1, 2, 4): 1 + 3, 1 + 3 + 12 + 16, and 1 + 0 + 6 + 0 across.
        """
        expected = 4 + 32 - 2 * 7
        drawn = torch.tensor([squared_mmd(normal(40, 1, seed=2 * i), normal(40, 1, seed=2 * i + 1) + 1) for i in range(1500)])
        assert drawn.mean().item() == pytest.approx(expected, abs=3 * drawn.std().item() / math.sqrt(len(drawn)))

    def test_equal_sets_and_distant_ones(self) -> None:
        x = normal(400, 8)
        assert abs(kernel_distance(x, x.flip(0)).value) < 0.05
        found = kernel_distance(x, normal(400, 8, seed=1))
        assert found.low < 0 < found.high
        assert kernel_distance(x, x + 1).low > 1

    def test_the_interval_covers_the_expectation(self) -> None:
        """22 is the closed form above; 100 pairs of samples miss it about five times."""
        found = [kernel_distance(normal(150, 1, seed=2 * i), normal(150, 1, seed=2 * i + 1) + 1, seed=i) for i in range(100)]
        assert 85 <= sum(each.low <= 22 <= each.high for each in found) <= 100

    def test_subsets(self) -> None:
        assert (subset_size(50_000), subset_size(1000), subset_size(4)) == (1000, 500, 2)
        assert kernel_distance(normal(9, 2), normal(8, 2), seed=3) == kernel_distance(normal(9, 2), normal(8, 2), seed=3)
        with pytest.raises(ValueError, match="need 4 rows"):
            kernel_distance(normal(3, 2), normal(9, 2))


class TestManifold:
    def test_equal_sets_are_perfect(self) -> None:
        x = normal(200, 3)
        figures = manifold_metrics(x, x, k=5)
        assert figures["precision"] == figures["recall"] == figures["coverage"] == 1
        assert figures["density"] == pytest.approx(6 / 5, abs=0.1)  # each sample lies in its own ball too

    def test_a_set_far_away_scores_zero(self) -> None:
        x = normal(50, 3)
        assert manifold_metrics(x + 100, x) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}

    def test_half_of_the_data_has_full_precision_and_half_recall(self) -> None:
        real = torch.cat([torch.arange(20.0), torch.arange(1000.0, 1020.0)])[:, None]
        figures = manifold_metrics(real[:20], real, k=1)
        assert figures["precision"] == 1
        assert figures["recall"] == figures["coverage"] == 0.5

    def test_one_line_by_hand(self) -> None:
        """Real 0, 1, 3, 7: 1-nearest radii 1, 1, 2, 4. Generated 0.5, 2, 20 of radii 1.5, 1.5, 18."""
        real, generated = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[0.5], [2.0], [20.0]])
        figures = manifold_metrics(generated, real, k=1)
        assert figures["precision"] == pytest.approx(2 / 3)  # 20 is in none
        assert figures["density"] == pytest.approx((2 + 2) / 3)  # 0.5 in the balls of 0 and 1; 2 in those of 1 and 3
        assert figures["recall"] == 1  # 7 lies within 18 of 20
        assert figures["coverage"] == pytest.approx(3 / 4)
        assert Manifold.of(generated, real, 1).precision.tolist() == [1, 1, 0]

    def test_too_few_samples(self) -> None:
        with pytest.raises(ValueError, match=r"\(5, 3\) and \(9, 3\) cannot be compared with k=5"):
            manifold_metrics(torch.zeros(5, 3), torch.zeros(9, 3))

    def test_parts_of_the_table_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = normal(90, 4), normal(70, 4, seed=1) + 0.5
        whole = manifold_metrics(x, y)
        monkeypatch.setattr("genkit.metrics.manifold._ROWS", 16)
        assert manifold_metrics(x, y) == pytest.approx(whole)

    def test_expected_coverage(self) -> None:
        """Of equal numbers it tends to 1 - 2^-k; and it is what samples of one distribution have."""
        assert expected_coverage(10**6, 10**6, 5) == pytest.approx(1 - 2**-5, abs=1e-5)
        seen = np.mean([manifold_metrics(normal(20, 2, seed=2 * i), normal(40, 2, seed=2 * i + 1))["coverage"] for i in range(200)])
        assert seen == pytest.approx(expected_coverage(20, 40), abs=0.02)


class TestBootstrap:
    def test_draws_are_repeatable_and_complete(self) -> None:
        assert counts(7, 3, 0).sum(1).tolist() == [7, 7, 7]
        assert torch.equal(counts(7, 3, 0), counts(7, 3, 0))
        assert not torch.equal(counts(7, 3, 0), counts(7, 3, 1))

    def test_interval_of_a_mean(self) -> None:
        """1.96 standard errors of a mean of 400."""
        x = with_moments([3], [2], count=400)[:, 0]
        found = bootstrap_mean(x, replicates=4000)
        assert found.value == pytest.approx(3)
        assert found.high - found.value == pytest.approx(1.96 * 2 / 20, rel=0.06)
        assert found.value - found.low == pytest.approx(1.96 * 2 / 20, rel=0.06)

    def test_nothing(self) -> None:
        with pytest.raises(ValueError, match="have no mean"):
            bootstrap_mean(torch.empty(0))
