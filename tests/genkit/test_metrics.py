"""Manifold metrics: hand-made cases whose answers are plain."""

from __future__ import annotations

import pytest
import torch

from genkit.metrics.manifold import manifold_metrics


def test_equal_sets_are_perfect():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    figures = manifold_metrics(x, x, k=5)
    assert figures["precision"] == figures["recall"] == figures["coverage"] == 1
    assert figures["density"] == pytest.approx(6 / 5, abs=0.1)  # each sample lies in its own ball too


def test_a_set_far_away_scores_zero():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert manifold_metrics(x + 100, x) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_half_of_the_data_has_full_precision_and_half_recall():
    real = torch.cat([torch.arange(20.0), torch.arange(1000.0, 1020.0)])[:, None]
    figures = manifold_metrics(real[:20], real, k=1)
    assert figures["precision"] == 1
    assert figures["recall"] == figures["coverage"] == 0.5


def test_one_line_by_hand():
    """Real 0, 1, 3, 7: 1-nearest radii 1, 1, 2, 4. Generated 0.5, 2, 20 of radii 1.5, 1.5, 18."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[0.5], [2.0], [20.0]])
    figures = manifold_metrics(generated, real, k=1)
    assert figures["precision"] == pytest.approx(2 / 3)  # 20 is in none
    assert figures["density"] == pytest.approx((2 + 2) / 3)  # 0.5 in the balls of 0 and 1; 2 in those of 1 and 3
    assert figures["recall"] == 1  # 7 lies within 18 of 20
    assert figures["coverage"] == pytest.approx(3 / 4)


def test_too_few_samples():
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(9, 3\) cannot be compared with k=5"):
        manifold_metrics(torch.zeros(5, 3), torch.zeros(9, 3))
