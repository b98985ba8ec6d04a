"""The policy `dive`: on the toy of the spec (T7) through the scorer, its budget, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from genkit.inversion import Descent, Gumbel, Leaps, Optimiser, Softmax, Stop
from genkit.scoring import Dive, Exhaustive, PairPlan, Policy, Race, Scorer, Verdict, within
from genkit.scoring.named import plan_policy
from tests.genkit.test_inversion_closed_form import SCHEDULE, inverter, labels, toy

PLAN = PairPlan(count=64)


def run(denoiser, table, x0, policy: Policy, plan: PairPlan = PLAN, **settings: object) -> list[Verdict]:
    """Verdicts of samples, in order."""
    scorer = Scorer(denoiser, plan, scheduler=SCHEDULE)
    return [verdict for _, verdict in sorted(scorer.run(x0, denoiser.condition(table[:, None]), policy, **settings))]


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_dive_says_what_scoring_everything_says(std: float) -> None:
    denoiser, table, truth, x0 = toy(std, 4, classes=200)
    found, everything = (run(denoiser, table, x0, policy) for policy in (Dive(), Exhaustive()))
    assert [v.label for v in found] == [v.label for v in everything] == truth.tolist()
    assert max(v.evaluations for v in found) < 200 * 64 / 20
    assert all(v.error_bound < 0.05 for v in found)


def test_the_published_schedule_is_that_of_the_inverter() -> None:
    denoiser, table, truth, x0 = toy(1.0, 2)
    plan = PairPlan.reference("dit")
    found = run(denoiser, table, x0, Dive.published(), plan)
    inverted = inverter(denoiser, table, Descent.published(), plan=plan).fit(x0)
    assert [v.label for v in found] == labels(inverted) == truth.tolist()
    for verdict, other in zip(found, inverted, strict=True):
        ends = {point.rows[0] for point in other.trace}
        assert {k for k, n in enumerate(verdict.counts) if n == 250} == ends
        assert verdict.scores[verdict.label] == pytest.approx(other.nats, rel=1e-4)
        # Nothing is asked for twice: of what the inverter asks for at most that much is missing.
        assert verdict.evaluations <= other.evaluations < 15_000 / 4


def test_several_prompts_priors_and_other_orders() -> None:
    denoiser, table, truth, x0 = toy(1.0, 2, classes=40)
    twice = torch.cat([table, table + 0.02 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))])
    classes = [[k, 40 + k] for k in range(40)]
    plain = [v.label for v in run(denoiser, twice, x0, Dive(), classes=classes, merge=True)]
    assert plain == truth.tolist()
    arms = [k for row in classes for k in row]
    assert [arms[v.label] % 40 for v in run(denoiser, twice[arms], x0, Dive(), classes=[[2 * k, 2 * k + 1] for k in range(40)])]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    turned = run(denoiser, table[order], x0, Dive())
    assert [int(order[v.label]) for v in turned] == truth.tolist()
    assert [v.evaluations for v in turned] == [v.evaluations for v in run(denoiser, table, x0, Dive())]
    offsets = torch.zeros(40).double()
    offsets[truth] = 1e3  # what was proposed is not excluded from being improbable
    assert not {v.label for v in run(denoiser, table, x0, Dive(), offsets=offsets.numpy())} & set(truth.tolist())


def test_few_classes_are_all_compared() -> None:
    denoiser, table, _, x0 = toy(1.0, 1, classes=6)
    alone, inner = run(denoiser, table, x0, Dive())[0], run(denoiser, table, x0, Race())[0]
    assert (alone.label, alone.evaluations) == (inner.label, inner.evaluations)


@pytest.mark.parametrize(
    "policy",
    [
        Dive(),
        Dive(proposer=Descent(stop=Stop(loops=3), shuffle=True), inner=Exhaustive(), shortlist=2),
        Dive(proposer=Descent(projector=Gumbel(), restarts=2, batch=4), shortlist=2),
    ],
    ids=["leaps", "descent", "gumbel"],
)
def test_no_more_than_the_budget(policy: Dive) -> None:
    denoiser, table, _, x0 = toy(0.3, 2, classes=50)
    least = policy.proposer.opening
    for budget in (least, least + 1, 2 * least + 3, 200, 5000):
        found = run(denoiser, table, x0, within(policy, budget, 50, 50))
        assert all(v.evaluations <= budget for v in found)
        assert all(v.counts[v.label] > 0 for v in found)
    assert [v.label for v in found] == [v.label for v in run(denoiser, table, x0, policy)]
    with pytest.raises(ValueError, match=f"A budget of {least - 1} evaluations is used up before .* Give {least} or more"):
        within(policy, least - 1, 50, 50)


def test_the_named_policy_fits_any_plan() -> None:
    denoiser, table, truth, x0 = toy(0.3, 1, classes=30)
    for count in (1, 2, 5, 16):
        policy, plan = plan_policy("dive", PairPlan(count=count), 30, cost=30)
        assert run(denoiser, table, x0, policy, plan)[0].label == truth


def test_the_named_policy_costs_no_more_than_scoring_everything() -> None:
    denoiser, table, _, x0 = toy(1.0, 4, classes=11)
    policy, plan = plan_policy("dive", PairPlan(count=8), 11)
    found = run(denoiser, 1e-3 * table, 5 * x0, policy, plan)  # nothing tells the classes apart
    assert max(v.evaluations for v in found) <= 11 * 8
    assert max(v.evaluations for v in run(denoiser, 1e-3 * table, 5 * x0, policy.inner, plan)) > 11 * 8


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="shortlist=1 must be at least 2"):
        Dive(shortlist=1)
    with pytest.raises(ValueError, match="A mixture of classes is no class"):
        Dive(proposer=Descent(projector=Softmax()))
    with pytest.raises(ValueError, match="Leaps want 8 pairs, but the plan has 4"):
        next(Dive().search(20, PairPlan(count=4).times(1000)))
    with pytest.raises(ValueError, match="A step wants 25 pairs, but the plan has 4"):
        next(Dive(proposer=Descent(batch=25, optimiser=Optimiser.published())).search(20, PairPlan(count=4).times(1000)))
    assert Dive(proposer=Leaps(first=0, pairs=4)).search(20, PairPlan(count=4).times(1000))
