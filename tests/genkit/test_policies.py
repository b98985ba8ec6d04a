"""Policies on tables of losses: the published schedules' cost (T8), the race's error rate (T10), and bad settings."""

from __future__ import annotations

import numpy as np
import pytest

from genkit.scoring import Exhaustive, FixedRounds, PairPlan, Policy, Race, Taylor, Tree, Verdict
from genkit.scoring.policy import SlopeRequest


def decide(policy: Policy, table: np.ndarray, u: np.ndarray | None = None, **settings: object) -> Verdict:
    """Run a policy on known losses (K, N)."""
    u = PairPlan(count=table.shape[1]).times(1000) if u is None else u
    search = policy.search(len(table), u, **settings)
    request = next(search)
    while True:
        if isinstance(request, SlopeRequest):
            answer = table[request.arms][:, request.pairs].mean(1)
        else:
            answer = table[request.arms, request.pairs]
        try:
            request = search.send(answer)
        except StopIteration as stop:
            return stop.value


def random_table(arms: int, pairs: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Losses with a trend over time that all arms share, a gap, and noise."""
    rng = np.random.default_rng(seed)
    u = PairPlan(count=pairs).times(1000)
    trend = 1 / (0.1 + u) + 0.5 * rng.standard_normal(pairs)
    gaps = np.sort(rng.exponential(spread, arms))
    return trend + gaps[:, None] * (1 - u) + rng.standard_normal((arms, pairs))


# The schedules of the paper, their cost as the published code runs them, and with nested stages.
SCHEDULES = {
    "cifar10": (10, (5, 1), (50, 500), 2_750, 2_750),
    "stl10": (10, (5, 1), (100, 500), 3_000, 3_000),
    "pets": (37, (5, 1), (25, 250), 2_050, 2_050),
    "flowers": (102, (20, 10, 5, 1), (20, 50, 100, 500), 5_590, 5_140),
    "food": (101, (20, 10, 5, 1), (20, 50, 100, 500), 5_570, 5_120),
    "aircraft": (100, (20, 10, 5, 1), (20, 50, 100, 500), 5_550, 5_100),
    "objectnet": (113, (25, 10, 5, 1), (50, 100, 500, 1000), 14_400, 13_400),
    "imagenet": (1000, (500, 50, 10, 1), (50, 100, 500, 1000), 124_500, 100_000),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_t8_the_published_schedules_cost_what_they_cost(name: str) -> None:
    arms, to_keep, n_samples, published, nominal = SCHEDULES[name]
    table = np.arange(arms)[:, None] + np.zeros((arms, n_samples[-1]))
    plan = PairPlan.reference("text", n_samples[-1])
    rounds = FixedRounds(to_keep=to_keep, n_samples=n_samples, nested=False)
    assert decide(rounds, table, plan.times(1000)).evaluations == published
    assert decide(FixedRounds(to_keep=to_keep, n_samples=n_samples), table).evaluations == nominal


def test_t8_the_imagenet_grids_do_not_nest() -> None:
    seen: list[set[int]] = []
    search = FixedRounds(to_keep=(2, 1), n_samples=(50, 100), nested=False).search(2, PairPlan.reference("text", 100).times(1000))
    request = next(search)
    seen.append(set(request.pairs.tolist()))
    request = search.send(np.zeros(len(request.arms)))
    seen.append(set(request.pairs.tolist()))
    grid = PairPlan.reference("text", 1000).timesteps
    # Of the 1000 the stages of 50 and 100 take t = 10, 30, ... and t = 5, 15, ...
    fifty, hundred = ({grid[i] for i in range(step // 2, 1000, step)} for step in (20, 10))
    assert fifty.isdisjoint(hundred)
    assert seen[0] == set(range(1, 100, 2))
    assert seen[1] == set(range(0, 100, 2))


def test_exhaustive_scores_everything() -> None:
    table = random_table(7, 20)
    verdict = decide(Exhaustive(), table)
    assert verdict.label == table.mean(1).argmin()
    assert verdict.evaluations == 140
    assert verdict.error_bound == 0
    np.testing.assert_allclose(verdict.scores, table.mean(1))


# Standard deviations of the six arms' own noise; the first arm is the best.
NOISES = {"equal": [1.0] * 6, "noisy best": [3.0] + [0.3] * 5, "noisy others": [0.3] + [3.0] * 5, "mixed": [0.2, 3, 1, 0.5, 2, 0.2]}


@pytest.mark.parametrize("noise", NOISES)
def test_t10_wrong_eliminations_of_the_race(noise: str) -> None:
    # 250 problems of each kind, 1,000 in all, that are hard: the other arms are all alike, and close.
    alpha, wrong, cost, plan = 0.05, 0, 0, PairPlan(count=96)
    u = plan.times(1000)
    for seed in range(250):
        rng = np.random.default_rng(seed)
        gaps = np.array([0] + [0.5] * 5)[:, None] * (1 - u)
        own = np.array(NOISES[noise])[:, None] * rng.standard_normal((6, 96))
        table = 1 / (0.1 + u) + 0.5 * rng.standard_normal(96) + gaps + own
        verdict = decide(Race(alpha=alpha), table, u)
        wrong += verdict.label != table.mean(1).argmin()
        cost += verdict.evaluations
    assert wrong / 250 <= alpha
    # It races even here.
    assert cost / 250 < 0.95 * 6 * 96


def test_t10_the_error_bound_is_a_bound() -> None:
    wrong, bound = [], []
    for seed in range(1000):
        table = random_table(4, 64, 10_000 + seed, spread=1.0)
        verdict = decide(Race(alpha=0.05, cap=16), table)
        wrong.append(verdict.label != table.mean(1).argmin())
        bound.append(verdict.error_bound)
    assert np.mean(wrong) <= np.mean(bound)
    # And it tells easy images from hard ones.
    sure = np.array(bound) < 0.3
    assert sure.sum() > 100
    assert np.mean(np.array(wrong)[sure]) < 0.6 * np.mean(wrong)


def test_the_race_agrees_with_scoring_everything_to_within_a_standard_error() -> None:
    truth = np.zeros(400, dtype=int)
    right = {"race": [], "all": []}
    for seed in range(400):
        rng = np.random.default_rng(seed)
        table = rng.standard_normal((10, 64)) + 1.0
        table[0] -= 0.5
        right["race"].append(decide(Race(), table).label == truth[seed])
        right["all"].append(decide(Exhaustive(), table).label == truth[seed])
    gap = np.mean(right["all"]) - np.mean(right["race"])
    assert gap <= np.sqrt(np.mean(right["all"]) * (1 - np.mean(right["all"])) / 400) + 1e-9


def test_a_clear_case_is_over_at_the_floor() -> None:
    table = random_table(5, 64)
    table[3] -= 100
    verdict = decide(Race(floor=8), table)
    assert verdict.label == 3
    assert verdict.evaluations == 40
    assert verdict.error_bound < 0.01
    assert [r.pairs for r in verdict.rounds] == [8]


def test_scores_of_dropped_arms_are_compared_on_common_pairs() -> None:
    table = random_table(3, 64, seed=4)
    table[2] += 30
    verdict = decide(Race(), table)
    n = int(verdict.counts[2])
    assert n < verdict.counts[verdict.label]
    expected = table[verdict.label, : verdict.counts[verdict.label]].mean() + (table[2] - table[verdict.label])[:n].mean()
    assert verdict.scores[2] == pytest.approx(expected)


def test_offsets_are_priors() -> None:
    table = random_table(2, 32, seed=5)
    first = decide(Exhaustive(), table).label
    offsets = np.zeros(2)
    offsets[first] = 100
    assert decide(Exhaustive(), table, offsets=offsets).label == 1 - first
    assert decide(Race(), table, offsets=offsets).label == 1 - first


def test_several_prompts_of_a_class_do_not_race_against_each_other() -> None:
    rng = np.random.default_rng(6)
    table = rng.standard_normal((4, 64)) * 0.1
    table[2:] += 5
    groups = np.array([0, 0, 1, 1])
    verdict = decide(Race(), table, groups=groups)
    assert groups[verdict.label] == 0
    assert verdict.evaluations == 4 * 8
    assert verdict.error_bound < 0.01
    assert decide(Race(), table).evaluations > 4 * 8


def test_tree_goes_down_the_best_group() -> None:
    table = np.full((8, 64), 10.0) + 0.01 * np.random.default_rng(7).standard_normal((8, 64))
    table[7] -= 5  # the group of arms 3, 4, 5
    table[4] -= 7
    tree = Tree(children={6: (0, 1, 2), 7: (3, 4, 5)})
    verdict = decide(tree, table)
    assert verdict.label == 4
    assert verdict.evaluations == (2 + 3) * 8
    assert np.isinf(verdict.scores[:3]).all()
    nested = Tree(children={6: (0, 1, 7), 7: (3, 4, 5), 2: (3,)}, beam=2)
    assert decide(nested, table).label == 4


def test_taylor_keeps_the_shortlist() -> None:
    table = random_table(40, 64, seed=8, spread=3.0)
    table[5] -= 2
    verdict = decide(Taylor(pairs=8, shortlist=4), table)
    assert verdict.label == table.mean(1).argmin()
    assert (verdict.counts > 0).sum() == 4
    assert verdict.evaluations >= 16 + 4 * 8
    small = decide(Taylor(shortlist=4), table[:3])
    assert small.evaluations == decide(Race(), table[:3]).evaluations


def test_policies_do_not_depend_on_the_order_of_arms() -> None:
    table = random_table(6, 64, seed=9)
    order = np.array([3, 5, 0, 1, 4, 2])
    for policy in (Exhaustive(), Race(), FixedRounds(to_keep=(3, 1), n_samples=(8, 64)), Taylor(shortlist=3)):
        first, second = decide(policy, table), decide(policy, table[order])
        assert order[second.label] == first.label
        np.testing.assert_allclose(second.scores, first.scores[order])
        assert second.evaluations == first.evaluations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, r"alpha=0.0 is no probability"),
        ({"floor": 1}, r"floor >= 2 and growth > 1, got 1"),
        ({"growth": 1.0}, r"got 8 and 1.0"),
        ({"floor": 8, "cap": 7}, r"cap=7 is below floor=8"),
    ],
)
def test_bad_races(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Race(**settings)


@pytest.mark.parametrize(
    ("to_keep", "n_samples", "message"),
    [
        ((5, 1), (50,), r"one entry for each round"),
        ((5, 1), (500, 50), r"must rise"),
        ((1, 5), (50, 500), r"and to_keep=\(1, 5\) fall"),
        ((), (), r"one entry for each round"),
    ],
)
def test_bad_rounds(to_keep: tuple[int, ...], n_samples: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedRounds(to_keep=to_keep, n_samples=n_samples)


def test_searches_that_cannot_work() -> None:
    with pytest.raises(ValueError, match=r"nothing to decide between 1 classes"):
        decide(Race(), random_table(1, 16))
    with pytest.raises(ValueError, match=r"wants 500 pairs, but the plan has 64"):
        decide(FixedRounds(), random_table(10, 64))
    with pytest.raises(ValueError, match=r"Taylor wants 16 pairs, but the plan has 8"):
        decide(Taylor(), random_table(3, 8))
    with pytest.raises(ValueError, match=r"class 2 is in no group"):
        decide(Tree(children={3: (0, 1)}), random_table(4, 16))
    with pytest.raises(ValueError, match=r"there is no arm 9"):
        decide(Tree(children={3: (0, 1, 2, 9)}), random_table(4, 16))
    with pytest.raises(ValueError, match=r"a group below itself"):
        Tree(children={0: (1,), 1: (0,)})
    with pytest.raises(ValueError, match=r"a group below itself"):
        Tree(children={2: (0,), 0: (1,), 1: (0,)})
    with pytest.raises(ValueError, match=r"each at least one class"):
        Tree(children={})
    with pytest.raises(ValueError, match=r"beam=0"):
        Tree(children={0: (1,)}, beam=0)
    with pytest.raises(ValueError, match=r"shortlist >= 2, got 16 and 1"):
        Taylor(shortlist=1)
