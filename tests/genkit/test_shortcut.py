"""The shortcut benchmark: its data, its accuracies, and the closed-form example of its notebook."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score

from genkit.data import shortcut
from genkit.data.source import open_source
from genkit.metrics.accuracy import accuracy, class_balanced_accuracy, group_accuracy, worst_group_accuracy


class TestData:
    @pytest.mark.parametrize(("split", "agreeing", "conflicting"), [("train", 342, 18), ("val", 38, 2), ("test_id", 95, 5)])
    def test_the_ink_tells_the_digit_in_95_percent(self, split: str, agreeing: int, conflicting: int) -> None:
        batch = shortcut.load(split)
        assert len(batch) == 10 * (agreeing + conflicting)
        assert torch.bincount(batch.groups).tolist() == [agreeing, conflicting] * 10
        assert batch.agrees.float().mean().item() == pytest.approx(0.95)

    def test_the_nine_other_inks_are_equally_frequent_in_training(self) -> None:
        batch = shortcut.load("train")
        table = torch.zeros(10, 10, dtype=torch.long).index_put_((batch.digit, batch.ink), torch.tensor(1), accumulate=True)
        assert torch.equal(table, 2 + 340 * torch.eye(10, dtype=torch.long))

    def test_every_digit_has_every_ink_equally_often_out_of_distribution(self) -> None:
        batch = shortcut.load("test_ood")
        table = torch.zeros(10, 10, dtype=torch.long).index_put_((batch.digit, batch.ink), torch.tensor(1), accumulate=True)
        assert torch.equal(table, torch.full((10, 10), 10))

    def test_no_handwritten_digit_is_in_two_of_training_validation_and_test(self) -> None:
        """The tests have the other strokes of `digits`, so numbers are compared within the training split only."""
        train, val = shortcut.load("train"), shortcut.load("val")
        assert sorted([*train.stroke.tolist(), *val.stroke.tolist()]) == list(range(4000))
        for split in ("test_id", "test_ood"):
            assert shortcut.load(split).stroke.tolist() == list(range(1000))

    def test_the_same_on_every_call_and_not_sorted_by_ink(self) -> None:
        a, b = shortcut.load("val"), shortcut.load("val")
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.ink, b.ink)
        conflicts = torch.nonzero(~shortcut.load("train")[slice(0, 360)].agrees).flatten()
        assert conflicts.max() - conflicts.min() > 100

    def test_ink_on_white_paper(self) -> None:
        batch = shortcut.load("test_ood")
        paper = batch.images[:, :, 0, 0]
        torch.testing.assert_close(paper, (torch.tensor(shortcut.PAPER) / 127.5 - 1).expand(1000, 3), atol=0.2, rtol=0)
        # The pixel that is farthest from the paper is where the stroke is full.
        distance = (batch.images - paper[:, :, None, None]).abs().sum(1).flatten(1)
        ink = batch.images.flatten(2)[torch.arange(1000), :, distance.argmax(1)]
        colours = torch.tensor(list(shortcut.INKS.values())) / 127.5 - 1
        assert colours.shape == (10, 3)
        # Colours vary, but every ink is nearest to its own name.
        assert torch.equal(torch.cdist(ink, colours).argmin(1), batch.ink)
        assert ink[batch.ink == 0].std(0).min() > 0.02

    def test_folders_hold_the_same_pictures(self, tmp_path: Path) -> None:
        shortcut.write(tmp_path, splits=("val",))
        source, batch = open_source(tmp_path / "val"), shortcut.load("val")
        assert len(source) == len(batch)
        assert sorted(set(source.labels or [])) == sorted(shortcut.CLASSES)
        rows = [i for i, label in enumerate(source.labels or []) if label == "seven"]
        expected = batch[batch.digit == 7]
        order = expected.stroke.argsort()
        torch.testing.assert_close(source.images(rows, (32, 32)), expected.images[order], atol=1 / 127, rtol=0)

    def test_unknown_split(self) -> None:
        with pytest.raises(ValueError, match=r"Unknown split 'test_oof'. Did you mean 'test_ood'"):
            shortcut.load("test_oof")


class TestAccuracy:
    def test_wilson_interval(self) -> None:
        """Of 1 in 2: (1 + z^2) / (2 + z^2) +- z sqrt(1/2 + z^2 / 4) / (2 + z^2) over 2, z = 1.96."""
        found = accuracy(["two", "seven"], ["two", "two"])
        z = norm.ppf(0.975)
        half = z * np.sqrt(2 * 0.25 + z**2 / 4) / (2 + z**2)
        assert found.value == 0.5
        assert found.count == 2
        assert found.low == pytest.approx(0.5 - half)
        assert found.high == pytest.approx(0.5 + half)

    def test_balanced_is_the_mean_over_classes(self) -> None:
        rng = np.random.default_rng(0)
        labels = rng.choice(3, 300, p=[0.8, 0.15, 0.05])
        predicted = np.where(rng.random(300) < 0.7, labels, 0)
        found = class_balanced_accuracy(torch.from_numpy(predicted), torch.from_numpy(labels))
        assert found.value == pytest.approx(balanced_accuracy_score(labels, predicted))
        assert found.value < accuracy(predicted, labels).value
        assert found.low < found.value < found.high

    def test_balanced_interval_covers(self) -> None:
        """95 % of the intervals hold the true mean of the class accuracies, to the error of 1,000 draws."""
        rng = np.random.default_rng(1)
        labels = np.repeat([0, 1, 2], [60, 25, 10])
        p = np.array([0.95, 0.8, 0.6])
        held = 0
        for _ in range(1000):
            found = class_balanced_accuracy(np.where(rng.random(95) < p[labels], labels, -1), labels)
            held += found.low <= p.mean() <= found.high
        assert 0.93 <= held / 1000 <= 0.98

    def test_worst_group(self) -> None:
        groups = ["water", "water", "land", "land", "land"]
        group, worst = worst_group_accuracy([1, 1, 0, 1, 1], [1, 1, 1, 1, 1], groups)
        assert group == "land"
        assert (worst.value, worst.count) == (pytest.approx(2 / 3), 3)
        assert group_accuracy([1, 1, 0, 1, 1], [1] * 5, groups)["water"].value == 1

    @pytest.mark.parametrize(("predicted", "labels"), [([], []), ([1, 2], [1]), ([[1]], [[1]])])
    def test_bad_input(self, predicted: list, labels: list) -> None:
        with pytest.raises(ValueError, match="Give a label for each prediction"):
            accuracy(predicted, labels)

    def test_groups_of_another_length(self) -> None:
        with pytest.raises(ValueError, match=r"groups of shape \(1,\) for 2 predictions"):
            group_accuracy([1, 2], [1, 2], [0])


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The functions of the notebook's closed-form example."""
    notebook = json.loads((Path(__file__).parents[2] / "notebooks" / "generative_classifiers.ipynb").read_text(encoding="utf-8"))
    (source,) = ("".join(cell["source"]) for cell in notebook["cells"] if "def discriminant_analysis" in "".join(cell["source"]))
    names: dict[str, Any] = {"np": np}
    exec(source, names)
    return names


class TestClosedForm:
    """Linear discriminant analysis against logistic regression, spec 2(h): core feature, spurious feature, noise features."""

    def mean_worst_group(self, example: dict[str, Any], train: Callable, d: int, scale: float, n: int = 200) -> float:
        draws = (example["draw_features"](n, d, scale, np.random.default_rng(seed)) for seed in range(6))
        return float(np.mean([example["worst_group"](*train(*draw), scale) for draw in draws]))

    def test_worst_group_is_what_counting_gives(self, example: dict[str, Any]) -> None:
        rng = np.random.default_rng(0)
        w, b = np.array([2.0, 0.3, 0.5, -0.4]), 0.2
        x, y = example["draw_features"](400_000, 2, 2.0, rng)
        right, agrees = np.sign(x @ w + b) == y, x[:, 1] * y > 0
        counted = min(right[(agrees == g) & (y == label)].mean() for g in (True, False) for label in (-1, 1))
        assert example["worst_group"](w, b, 2.0) == pytest.approx(counted, abs=0.01)

    def test_discriminant_analysis_finds_the_population_weights(self, example: dict[str, Any]) -> None:
        """S = diag(core^2, 4 B^2 r (1 - r), noise^2, ...) and m_1 - m_-1 = (2, 2 B (2 r - 1), 0, ...)."""
        scale, r = 2.0, example["AGREEMENT"]
        x, y = example["draw_features"](400_000, 3, scale, np.random.default_rng(1))
        w, b = example["discriminant_analysis"](x, y)
        expected = [2 / example["CORE"] ** 2, 2 * (2 * r - 1) / (4 * scale * r * (1 - r)), 0, 0, 0]
        np.testing.assert_allclose(w, expected, atol=0.15)
        assert abs(b) < 0.15
        # Its worst group in closed form: the margin w_1 - B w_2 over core w_1.
        exact = norm.cdf((expected[0] - scale * expected[1]) / (example["CORE"] * expected[0]))
        assert example["worst_group"](w, b, scale) == pytest.approx(exact, abs=0.005)
        assert exact == pytest.approx(0.972, abs=5e-4)

    def test_logistic_regression_has_converged(self, example: dict[str, Any]) -> None:
        """At the optimum the gradient is zero, and where the data are separable the margin of every point is positive."""
        x, y = example["draw_features"](200, 120, 3.0, np.random.default_rng(2))
        w, b = example["logistic_regression"](x, y)
        margin = y * (x @ w + b)
        assert margin.min() > 0
        gradient = -(x * (y / (1 + np.exp(margin)))[:, None]).mean(0) + 1e-4 * w
        assert np.abs(gradient).max() < 1e-6

    def test_many_noise_features(self, example: dict[str, Any]) -> None:
        generative = self.mean_worst_group(example, example["discriminant_analysis"], 120, 3.0)
        discriminative = self.mean_worst_group(example, example["logistic_regression"], 120, 3.0)
        assert discriminative < 0.6
        assert generative > discriminative + 0.3

    def test_few_noise_features(self, example: dict[str, Any]) -> None:
        """The other side of the phase diagram: without noise to fit, logistic regression is the better one."""
        generative = self.mean_worst_group(example, example["discriminant_analysis"], 0, 3.0)
        discriminative = self.mean_worst_group(example, example["logistic_regression"], 0, 3.0)
        assert discriminative > generative + 0.05
