"""Inversion where the answer is known: T6 and T7 of the spec of discriminative tasks, least squares, Bayes' rule."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from genkit.denoisers.analytic import GaussianMixtureDenoiser, LinearDenoiser
from genkit.inversion import (
    ConditionSlot,
    Descent,
    DiffusionPrior,
    DiscreteInverter,
    Free,
    Gumbel,
    Inversion,
    Leaps,
    Likelihood,
    LogPrior,
    Nearest,
    Optimiser,
    Prior,
    Slots,
    Softmax,
    Stop,
    TokenSlots,
)
from genkit.scoring import PairPlan, Scorer

SCHEDULE = DDPMScheduler()


def toy(
    std: float, count: int, *, classes: int = 1000, width: int = 64, size: int = 256
) -> tuple[LinearDenoiser, Tensor, Tensor, Tensor]:
    """T7: K embeddings E ~ N(0, 0.1^2), pictures N(W E_k, std^2), W ~ N(0, 100 / D); denoiser, E, true classes, pictures."""
    g = torch.Generator().manual_seed(int(10 * std))
    table = 0.1 * torch.randn(classes, width, generator=g)
    weight = (100 / width) ** 0.5 * torch.randn(size, width, generator=g)
    truth = torch.randint(classes, (count,), generator=g)
    return LinearDenoiser(weight, std), table, truth, table[truth] @ weight.mT + std * torch.randn(count, size, generator=g)


def inverter(
    denoiser: LinearDenoiser, table: Tensor, search: object, *, memoise: bool = True, **settings: object
) -> DiscreteInverter:
    slots = ConditionSlot(denoiser, denoiser.condition(table[:, None]))
    terms = [Likelihood(denoiser, scheduler=SCHEDULE)]
    return DiscreteInverter(denoiser, slots, search=search, **{"terms": terms, "memoise": memoise, "batch_size": 25} | settings)


def labels(found: list[Inversion]) -> list[int]:
    return [int(each.rows) for each in found]


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_t7_the_published_schedule_finds_every_class(std: float) -> None:
    denoiser, table, truth, x0 = toy(std, 10)
    plan = PairPlan.reference("dit")
    found = inverter(denoiser, table, Descent.published(), plan=plan).fit(x0)
    assert labels(found) == truth.tolist()
    # Enumeration, of the classes that could be it.
    scorer = Scorer(denoiser, plan, scheduler=SCHEDULE)
    near = torch.cdist(x0, table @ denoiser.network.weight.float().mT).argsort(1)[:, :20]
    for sample, candidates, label in zip(x0[:3], near, labels(found), strict=False):
        scores = scorer.table(sample[None], denoiser.condition(table[candidates][:, None])).mean(2)[0]
        assert candidates[scores.argmin()] == label
    # The same course to the last bit, for a fraction of the evaluations.
    (forgetful,) = inverter(denoiser, table, Descent.published(), plan=plan, memoise=False).fit(x0[:1])
    assert forgetful.trace == found[0].trace
    assert forgetful.evaluations == 15_000
    assert sum(each.evaluations for each in found) <= 10 * 15_000 / 4
    firsts = [next(i for i, point in enumerate(each.trace) if point.rows == tuple(each.rows.tolist())) for each in found]
    assert sum(firsts) / 10 + 1 < 2.2  # loops until the answer is met


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_leaps_find_every_class_with_a_hundredth_of_the_evaluations(std: float) -> None:
    denoiser, table, truth, x0 = toy(std, 20)
    found = inverter(denoiser, table, Leaps(finalists=2), plan=PairPlan(count=64)).fit(x0)
    assert labels(found) == truth.tolist()
    assert max(each.evaluations for each in found) < 64 * 1000 / 200


@pytest.mark.parametrize(
    "projector", [Nearest(metric="cosine"), Gumbel(tau=0.2), Softmax(tau=0.1), Softmax(tau=0.1, metric="cosine")], ids=repr
)
def test_other_projections_find_it_too(projector: Nearest) -> None:
    denoiser, table, truth, x0 = toy(0.3, 3, classes=50, width=16, size=64)
    search = Descent(projector=projector, optimiser=Optimiser(lr=0.2), restarts=4, stop=Stop(loops=10))
    assert labels(inverter(denoiser, table, search).fit(x0)) == truth.tolist()


def test_scores_are_exact_likelihood_ratios() -> None:
    # With a noise and its negative, nothing is left of the noise: what remains is T1's factor of the truncated range, about 1.
    denoiser, table, _, x0 = toy(1.0, 1, classes=5, width=4, size=8)
    plan = PairPlan(count=400, antithetic=True, weighting="elbo")
    nats = inverter(denoiser, table, Leaps(), plan=plan).score(x0.expand(5, -1), torch.arange(5)[:, None]).mean(1)
    exact = ((x0.double() - table.double() @ denoiser.network.weight.mT) ** 2).sum(1) / 2
    torch.testing.assert_close(nats - nats[0], exact - exact[0], rtol=0.02, atol=0.02)


def test_t6_the_diffusion_prior_is_minus_log_p() -> None:
    g = torch.Generator().manual_seed(8)
    atoms = torch.randn(8, 32, generator=g)
    weights = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.08, 0.06, 0.05, 0.01])
    denoiser = GaussianMixtureDenoiser(atoms[:, None], 0.0, weights)
    prior = DiffusionPrior(denoiser, scheduler=SCHEDULE)
    plan = PairPlan(count=96_000, weighting="elbo")
    slots = TokenSlots(
        lambda tokens: LinearDenoiser(torch.zeros(1, 32), 1.0).condition(tokens), atoms, torch.ones(1, 8, dtype=torch.bool)
    )
    inverted = DiscreteInverter(LinearDenoiser(torch.zeros(1, 32), 1.0), slots, terms=[prior], plan=plan, batch_size=1000)
    rows = torch.tensor([[0], [2], [7]])  # 0.916, 2.303 and 4.605 nats
    nats = inverted.score(torch.zeros(3, 1), rows).mean(1)
    torch.testing.assert_close(nats, -weights[rows[:, 0]].double().log(), rtol=0.03, atol=0)


# Layouts: sprites that are drawn on top of each other

SPRITES = 12


def sprites(seed: int = 0) -> tuple[LinearDenoiser, TokenSlots]:
    """Three slots, each of which draws one of 12 sprites, or nothing (the last row); their pictures add up."""
    g = torch.Generator().manual_seed(seed)
    table = torch.cat([0.1 * torch.randn(SPRITES, 16, generator=g), torch.zeros(1, 16)])
    weight = 2.5 * torch.randn(64, 16, generator=g)
    denoiser = LinearDenoiser(weight.repeat(1, 3), 0.3)
    return denoiser, TokenSlots(denoiser.condition, table, torch.ones(3, SPRITES + 1, dtype=torch.bool))


def scene(denoiser: LinearDenoiser, slots: Slots, rows: list[int], seed: int = 1) -> Tensor:
    clean = denoiser.network(slots.table[rows].double().flatten())
    return (clean + denoiser.std * torch.randn(64, generator=torch.Generator().manual_seed(seed))).float()


def test_t7_layouts_are_found_up_to_the_order_of_their_slots() -> None:
    denoiser, slots = sprites()
    truths = [[0, 5, 9], [3, SPRITES, SPRITES], [7, 7, 2], [SPRITES, 10, 1], [SPRITES] * 3, [4, 11, 6]]
    x0 = torch.stack([scene(denoiser, slots, rows, seed) for seed, rows in enumerate(truths)])
    search = [Descent(optimiser=Optimiser(lr=0.2), restarts=4, stop=Stop(loops=8)), Leaps(patience=36)]
    terms = [Likelihood(denoiser, scheduler=SCHEDULE)]
    for memoise in (True, False):
        found = DiscreteInverter(denoiser, slots, search=search, terms=terms, memoise=memoise).fit(x0)
        assert [sorted(each.rows.tolist()) for each in found] == [sorted(rows) for rows in truths]


def test_masks_hold() -> None:
    denoiser, slots = sprites()
    allowed = slots.allowed.clone()
    allowed[:, 5] = False
    allowed[0] = False
    allowed[0, 2] = True
    masked = TokenSlots(denoiser.condition, slots.table, allowed)
    x0 = scene(denoiser, slots, [5, 2, 8])[None]
    for search in (Descent(stop=Stop(loops=3), restarts=2), Leaps(), [Descent(projector=Gumbel(), stop=Stop(loops=3)), Leaps()]):
        (found,) = DiscreteInverter(denoiser, masked, search=search, terms=[Likelihood(denoiser, scheduler=SCHEDULE)]).fit(x0)
        for point in found.trace:
            assert point.rows[0] == 2
            assert 5 not in point.rows


@pytest.mark.parametrize("kind", ["table", "function", "diffusion"])
def test_the_prior_flips_an_ambiguous_answer_at_the_predicted_odds(kind: str) -> None:
    # Sprites 0 and 1 look almost the same: they differ by delta nats in this picture, and by far more in their embedding.
    g = torch.Generator().manual_seed(3)
    table = torch.randn(6, 16, generator=g)
    weight = torch.randn(32, 16, generator=g)
    weight[:, 8:] = 0
    table[1, :8] = table[0, :8] + 0.12 * torch.randn(8, generator=g)
    denoiser = LinearDenoiser(weight, 1.0)
    x0 = (table[0] @ weight.mT + 0.2 * torch.randn(32, generator=g))[None]
    plan = PairPlan(count=4000, antithetic=True, weighting="elbo")
    slots = ConditionSlot(denoiser, denoiser.condition(table[:, None]))
    likelihood = Likelihood(denoiser, scheduler=SCHEDULE)
    settings = {"search": Leaps(pairs=8, patience=6, finalists=2), "plan": plan, "batch_size": 500}
    gaps = ((x0.double() - table[:2].double() @ weight.double().mT) ** 2).sum(1) / 2
    delta = float(gaps[1] - gaps[0])
    assert 0.5 < delta < 6
    assert labels(DiscreteInverter(denoiser, slots, terms=[likelihood], **settings).fit(x0)) == [0]
    for odds, expected in ((delta - 0.3, 0), (delta + 0.3, 1)):
        p = torch.full((6,), 0.1, dtype=torch.float64)
        p[1] = 0.1 * float(torch.tensor(odds).exp())
        if kind == "table":
            prior = LogPrior(p)
        elif kind == "function":
            prior = Prior(lambda rows, free, p=p: -p[rows[0, 0]].log())
        else:
            prior = DiffusionPrior(GaussianMixtureDenoiser(slots.table[:, None], 0.0, p), scheduler=SCHEDULE)
        assert labels(DiscreteInverter(denoiser, slots, terms=[likelihood, prior], **settings).fit(x0)) == [expected]
        # A weight counts, in nats: twice the prior at half the odds.
        if kind == "table":
            half = LogPrior(p.sqrt(), weight=2.0)
            assert labels(DiscreteInverter(denoiser, slots, terms=[likelihood, half], **settings).fit(x0)) == [expected]


class Placed(Slots):
    """A sprite and how strong it is, which is a free number."""

    def __init__(self, denoiser: LinearDenoiser, table: Tensor) -> None:
        super().__init__(table, free=Free((1,), 0.0, 2.0))
        self.denoiser = denoiser

    def condition(self, rows, offset, free):
        return _yielding(self.denoiser.condition(free[:, :, None] * (self.table[rows] + offset)))


@dataclasses.dataclass
class _yielding:
    value: object

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return None


def test_free_numbers_are_fitted_beside_the_slots() -> None:
    g = torch.Generator().manual_seed(4)
    table, weight = torch.randn(5, 8, generator=g), torch.randn(32, 8, generator=g)
    denoiser = LinearDenoiser(weight, 0.1)
    x0 = (1.3 * table[3] @ weight.mT + 0.1 * torch.randn(32, generator=g))[None]
    # Adam's last steps are as long as lr.
    search = [
        Descent(optimiser=Optimiser(lr=0.1), restarts=4, stop=Stop(loops=8)),
        Descent(optimiser=Optimiser(lr=0.005), stop=Stop(loops=8, patience=8)),
    ]
    (found,) = DiscreteInverter(
        denoiser, Placed(denoiser, table), search=search, terms=[Likelihood(denoiser, scheduler=SCHEDULE)]
    ).fit(x0)
    drawn = (table[3] @ weight.mT).double()
    assert int(found.rows) == 3
    assert found.free is not None
    assert float(found.free) == pytest.approx(float(x0[0].double() @ drawn / (drawn @ drawn)), abs=0.03)
