"""Inversion on networks: embeddings of every family, slots, searches, layouts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from genkit.data import digits
from genkit.denoisers import Cond, Denoiser
from genkit.denoisers.analytic import LinearDenoiser
from genkit.denoisers.embeddings import Embeddings
from genkit.denoisers.mixing import label_tables
from genkit.inversion import (
    ConditionSlot,
    Descent,
    DiffusionPrior,
    DiscreteInverter,
    Free,
    Gumbel,
    LayoutSlots,
    Leaps,
    Likelihood,
    LogPrior,
    Nearest,
    Optimiser,
    Prior,
    Softmax,
    Stop,
    TokenSlots,
    Vocabulary,
    leave_one_out,
)
from genkit.layouts import Layout
from genkit.layouts.encoder import painted
from genkit.levels import Level, training_level
from genkit.pipelines import GuidedPipeline
from genkit.scoring import PairPlan
from tests import tiny
from tests.genkit.test_layouts import tiny as tiny_layouts
from tests.genkit.test_scorer import CONDITIONED, conditions, samples


def level_of(denoiser: Denoiser, rows: int) -> Level:
    return training_level(denoiser.pipe.scheduler, torch.full((rows,), 0.3))


# Embeddings


@pytest.mark.parametrize("family", CONDITIONED)
def test_embeddings_of_every_family(family: str) -> None:
    denoiser = Denoiser.of(tiny.pipeline(family))
    cond, x = conditions(denoiser), samples(denoiser)
    embeddings = Embeddings(denoiser, cond)
    level = level_of(denoiser, 3)
    plain = denoiser(x, level, cond).raw
    offset = torch.zeros_like(embeddings.table, requires_grad=True)
    with embeddings.displaced(torch.arange(3), offset) as same:
        moved = denoiser(x, level, same).raw
        (gradient,) = torch.autograd.grad(moved.square().sum(), offset)
    assert torch.equal(moved, plain)
    assert (gradient.abs().amax(1) > 0).all()
    # From each condition to the next one. Flux and PixArt mask what only one of the prompts has.
    turned = torch.tensor([1, 2, 0])
    with embeddings.displaced(torch.arange(3), embeddings.table[turned] - embeddings.table) as other, torch.no_grad():
        reached = denoiser(x, level, other).raw
    if "prompt_attention_mask" not in cond.tensors:
        torch.testing.assert_close(reached, denoiser(x, level, cond[turned]).raw, rtol=1e-3, atol=1e-4)
    assert torch.equal(denoiser(x, level, cond).raw, plain)


def test_distances_of_prompts_are_kept() -> None:
    denoiser = Denoiser.of(tiny.pipeline("sdxl"))
    cond = conditions(denoiser)
    table = Embeddings(denoiser, cond).table
    whole = torch.cat([cond.tensors[name].flatten(1) for name in ("prompt_embeds", "pooled_prompt_embeds")], dim=1)
    assert table.shape == (3, 2)
    torch.testing.assert_close(torch.cdist(table, table), torch.cdist(whole, whole), rtol=1e-4, atol=1e-4)


def test_equal_copies_of_a_label_table_are_one_and_are_moved_together() -> None:
    pipe = tiny.pipeline("dit", num_layers=3)
    denoiser = Denoiser.of(pipe)
    cond = denoiser.condition(labels=[5, 9])
    tables = label_tables(pipe.transformer)
    assert Embeddings(denoiser, cond).table.shape == (2, 3 * 16)  # a random network's copies differ
    for table in tables[1:]:
        table.weight.data.copy_(tables[0].weight)
    embeddings = Embeddings(denoiser, cond)
    assert torch.equal(embeddings.table, tables[0].weight[[5, 9]])
    assert embeddings.mean == pytest.approx(float(tables[0].weight.mean()), abs=1e-7)
    x, level = samples(denoiser, 1), level_of(denoiser, 1)
    with torch.no_grad(), embeddings.displaced(torch.tensor([0]), embeddings.table[1:] - embeddings.table[:1]) as moved:
        reached = denoiser(x, level, moved).raw
    torch.testing.assert_close(reached, denoiser(x, level, cond[1]).raw, rtol=1e-4, atol=1e-5)


def test_hooks_go_with_the_context() -> None:
    denoiser = Denoiser.of(tiny.pipeline("dit"))
    embeddings = Embeddings(denoiser, denoiser.condition(labels=[5, 9]))
    with pytest.raises(RuntimeError, match="stop"), embeddings.displaced(torch.tensor([0]), embeddings.table[:1]):
        raise RuntimeError("stop")
    assert not any(table._forward_hooks for table in label_tables(denoiser.network))


def test_conditions_without_embeddings_are_refused() -> None:
    denoiser = Denoiser.of(tiny.pipeline("dit"))
    with pytest.raises(ValueError, match=r"These 2 conditions of DiT have no embeddings"):
        Embeddings(denoiser, denoiser.condition(labels=[5, 5]))
    with pytest.raises(ValueError, match=r"'components' of DiT is made of whole numbers"):
        Embeddings(denoiser, Cond({"components": torch.tensor([[True], [False]])}))


# The published schedule


def test_a_descent_is_what_the_publication_says() -> None:
    """Steps 1 to 4 of the published code, spelled out, without any of the machinery."""
    g = torch.Generator().manual_seed(0)
    table, weight = 0.1 * torch.randn(40, 8, generator=g), 3 * torch.randn(24, 8, generator=g)
    denoiser = LinearDenoiser(weight, 0.5)
    x0 = (table[17] @ weight.mT + 0.5 * torch.randn(24, generator=g))[None]
    scheduler = tiny.pipeline("dit").scheduler
    plan = PairPlan.reference("dit", 50)
    pairs = plan.pairs(scheduler, (24,))
    eps = pairs.noise(range(50))

    def loss(y: Tensor, index: Tensor) -> Tensor:
        x = pairs.level[index].diffuse(x0.expand(len(index), -1), eps[index])
        return (denoiser(x, pairs.level[index], denoiser.condition(y.expand(len(index), 1, -1))).eps - eps[index]).square().mean()

    generator = torch.Generator().manual_seed(0)
    v = (table.mean() + table.std() * torch.randn(1, 1, 8, generator=generator))[0].requires_grad_(True)
    optimizer = torch.optim.AdamW([v], lr=1e-2, weight_decay=0.01)
    course = []
    order = np.argsort(np.argsort((0.5 + np.arange(50) * (5**0.5 - 1) / 2) % 1.0))
    for _ in range(6):
        for index in torch.from_numpy(order[torch.randperm(50, generator=generator).numpy()]).split(25):
            nearest = table[(v - table).norm(dim=1).argmin()]
            optimizer.zero_grad()
            loss((nearest - v).detach() + v, index).backward()
            optimizer.step()
        k = int((v - table).norm(dim=1).argmin())
        course.append((k, float(loss(table[k][None], torch.arange(50)).detach())))

    slots = TokenSlots(denoiser.condition, table, torch.ones(1, 40, dtype=torch.bool))
    search = Descent(optimiser=Optimiser.published(), batch=25, shuffle=True, stop=Stop(loops=6, patience=None))
    terms = [Likelihood(denoiser, scheduler=scheduler)]
    (found,) = DiscreteInverter(denoiser, slots, search=search, terms=terms, plan=plan).fit(x0)
    assert [point.rows[0] for point in found.trace] == [k for k, _ in course]
    assert [point.nats for point in found.trace] == pytest.approx([value for _, value in course])
    assert len({k for k, _ in course}) > 1
    assert int(found.rows) == min(course, key=lambda point: point[1])[0] == 17


def test_published_settings() -> None:
    search = Descent.published()
    assert (search.batch, search.shuffle, search.restarts, search.stop) == (25, True, 1, Stop(loops=20, patience=None))
    optimiser = search.optimiser
    assert (optimiser.lr, optimiser.relative, optimiser.betas, optimiser.weight_decay) == (1e-2, False, (0.9, 0.999), 0.01)
    assert (optimiser.start, search.projector) == ("published", Nearest(metric="l2"))


# Networks


def test_remembering_changes_no_bit_on_digits() -> None:
    denoiser = GuidedPipeline.from_pretrained("digits").denoiser
    prompts = [digits.with_articles(f"a {ink} {name}") for ink in ("red", "blue") for name in digits.DIGITS]
    slots = ConditionSlot(denoiser, denoiser.condition(prompts=prompts))
    x0 = denoiser.encode(digits.draw("test", 1, seed=5).images)
    search = Descent(optimiser=Optimiser(lr=0.2), batch=2, shuffle=True, stop=Stop(loops=20, patience=None))
    plan = PairPlan(count=4)
    one, other = (
        DiscreteInverter(denoiser, slots, search=search, plan=plan, batch_size=8, memoise=memoise).fit(x0)[0]
        for memoise in (True, False)
    )
    assert len({point.rows for point in one.trace}) > 1
    assert one.trace == other.trace
    assert other.evaluations == 20 * 3 * 4
    assert one.evaluations <= other.evaluations / 4


@pytest.mark.parametrize("family", ["dit", "sd3", "pixart_alpha"])
def test_networks_find_what_enumeration_finds(family: str) -> None:
    denoiser = Denoiser.of(tiny.pipeline(family))
    cond, x0 = conditions(denoiser), samples(denoiser)
    plan = PairPlan(count=8)
    slots = ConditionSlot(denoiser, cond)
    found = DiscreteInverter(denoiser, slots, search=Leaps(patience=3), plan=plan, batch_size=8).fit(x0)
    table = denoiser.losses(x0, plan.pairs(denoiser.pipe.scheduler, x0.shape[1:]), cond).mean(2)
    assert [int(each.rows) for each in found] == table.argmin(1).tolist()
    assert [each.nats for each in found] == pytest.approx(table.amin(1).tolist(), rel=1e-5)


def test_the_network_is_left_as_it_was() -> None:
    denoiser = Denoiser.of(tiny.pipeline("dit"))
    denoiser.network.train().requires_grad_(True)
    slots = ConditionSlot(denoiser, denoiser.condition(labels=[1, 2]))

    def fail(_: int) -> None:
        assert not denoiser.network.training
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        DiscreteInverter(denoiser, slots).fit(samples(denoiser, 1), progress=fail)
    assert denoiser.network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in denoiser.network.parameters())


def test_progress_counts_what_the_result_says() -> None:
    denoiser = Denoiser.of(tiny.pipeline("dit"))
    slots = ConditionSlot(denoiser, denoiser.condition(labels=[1, 2, 3, 4]))
    counts: list[int] = []
    found = DiscreteInverter(denoiser, slots, plan=PairPlan(count=8), batch_size=8).fit(
        samples(denoiser, 2), progress=counts.append
    )
    assert sum(counts) == sum(each.evaluations for each in found)


def test_results_do_not_depend_on_other_samples() -> None:
    denoiser = Denoiser.of(tiny.pipeline("stable_diffusion"))
    x0 = samples(denoiser)
    inverter = DiscreteInverter(
        denoiser, ConditionSlot(denoiser, conditions(denoiser)), search=Descent(stop=Stop(loops=2)), batch_size=16
    )
    together, alone = inverter.fit(x0), inverter.fit(x0[1:2])
    assert together[1].trace == alone[0].trace


# Layouts


@pytest.mark.parametrize(("codec", "paint"), [("gligen", 0), ("gligen", 5), ("tokens", 0)])
def test_layouts_are_slots(codec: str, paint: int) -> None:
    pipe = tiny_layouts(codec, paint)
    denoiser = Denoiser.of(pipe)
    slots = LayoutSlots(denoiser)
    layout = Layout(["star", "circle"], [(0.0, 1 / 3, 1.0, 1.0), (2 / 9, 0.0, 5 / 9, 4 / 9)])  # on the grid of 10 points
    rows, free = slots.encode([layout, Layout([], [])])
    nothing = torch.zeros(*rows.shape, slots.table.shape[1], requires_grad=True)
    with slots.condition(rows, nothing, free) as cond:
        own, told = cond.tensors, denoiser.condition([layout, Layout([], [])]).tensors
        torch.testing.assert_close(own["layout_embeds"], told["layout_embeds"])
        if paint:
            canvases = [painted(each["layout_objects"], each["layout_known"], 8, 8) for each in (own, told)]
            torch.testing.assert_close(*canvases)
        assert torch.autograd.grad(cond.tensors["layout_embeds"].square().sum(), nothing)[0][0].abs().sum() > 0
    again = slots.layout(rows[0], None if free is None else free[0])
    assert again.labels == layout.labels
    np.testing.assert_allclose(again.boxes, layout.boxes, atol=1e-6)
    assert slots.layout(rows[1], None if free is None else free[1]).labels == []
    search = [Descent(restarts=2, stop=Stop(loops=1)), Leaps(first=0, pairs=2, patience=2, finalists=1)]
    x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (found,) = DiscreteInverter(denoiser, slots, search=search, plan=PairPlan(count=8, weighting="elbo")).fit(x0)
    assert slots.check(found.rows) is not None
    assert (found.free is None) == (codec == "tokens")
    slots.layout(found.rows, found.free)
    packed = slots.packed(rows, free)
    assert packed[:, :, 0].tolist() == [[2, 0, -1], [-1, -1, -1]]
    torch.testing.assert_close(packed[0, :2, 1:], torch.tensor(layout.boxes))


@pytest.mark.parametrize("codec", ["gligen", "tokens"])
def test_objects_are_left_out_one_at_a_time(codec: str) -> None:
    denoiser = Denoiser.of(tiny_layouts(codec))
    slots = LayoutSlots(denoiser)
    both = Layout(["star", "circle"], [(0.0, 1 / 3, 1.0, 1.0), (2 / 9, 0.0, 5 / 9, 4 / 9)])
    rows, free = slots.encode([both])
    first, second, whole = (slots.layout(each, None if free is None else free[0]).labels for each in slots.without(rows[0]))
    assert (first, second, whole) == (["circle"], ["star"], ["star", "circle"])
    prior = Prior(lambda rows, free: (slots.packed(rows, free)[..., 0] >= 0).sum().double())
    inverter = DiscreteInverter(
        denoiser, slots, plan=PairPlan(count=8, weighting="elbo"), terms=[Likelihood(denoiser), prior], batch_size=4
    )
    x0 = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    gains = leave_one_out(inverter, x0, rows[0], None if free is None else free[0])
    assert gains.shape == (3,)
    assert gains[2] == 0
    alone = Layout(["circle"], [both.boxes[1]])
    losses = denoiser.losses(
        x0[None], inverter.plan.pairs(denoiser.pipe.scheduler, x0.shape), denoiser.condition([both, alone]), batch_size=4
    )
    nats = (losses * inverter.plan.pairs(denoiser.pipe.scheduler, x0.shape).weight).mean(2)[0]
    if codec == "gligen":  # of tokens the empty slot is another one here, which their positions tell apart
        assert float(gains[0]) == pytest.approx(float(nats[1] - nats[0]) - 1, abs=1e-3)
    with pytest.raises(ValueError, match=r"ConditionSlot has no objects"):
        leave_one_out(DiscreteInverter(denoiser, condition_slot(denoiser, both, alone)), x0, rows[0])


def condition_slot(denoiser: Denoiser, *layouts: Layout) -> ConditionSlot:
    return ConditionSlot(denoiser, denoiser.condition(list(layouts)))


def test_boxes_are_refined_when_the_classes_are_known() -> None:
    denoiser = Denoiser.of(tiny_layouts("gligen"))
    slots = LayoutSlots(denoiser)
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"plan": PairPlan(count=4, weighting="elbo"), "batch_size": 8}
    leaps = Leaps(pairs=2, first=2, patience=2)
    refine = Descent(optimiser=Optimiser(lr=0.0, free_lr=0.02), batch=4, stop=Stop(loops=5, patience=None))
    first, refined = (DiscreteInverter(denoiser, slots, search=s, **settings).fit(x0) for s in (leaps, [leaps, refine]))
    for before, after in zip(first, refined, strict=True):
        assert torch.equal(before.rows, after.rows)
        assert after.nats < before.nats
        assert not torch.equal(before.free, after.free)
        assert 0 <= after.free.min() <= after.free.max() <= 1


def test_a_token_slot_holds_its_own_part_of_the_table() -> None:
    slots = LayoutSlots(Denoiser.of(tiny_layouts("tokens")))
    assert slots.allowed.sum(1).tolist() == [4, 101, 101] * 3
    with pytest.raises(ValueError, match="Slot 0 may not hold row 3 of 101"):
        slots.check(torch.tensor([3, 5, 6] + [100] * 6))


def test_other_models_have_no_layout() -> None:
    with pytest.raises(ValueError, match=r"DiT has no layout condition. Use a layout-to-image model"):
        LayoutSlots(Denoiser.of(tiny.pipeline("dit")))


# What is refused


def toy_inverter(**settings: object) -> DiscreteInverter:
    denoiser = LinearDenoiser(torch.ones(4, 2), 1.0)
    slots = TokenSlots(denoiser.condition, torch.eye(2), torch.ones(1, 2, dtype=torch.bool))
    terms = [Likelihood(denoiser, scheduler=tiny.pipeline("dit").scheduler)]
    return DiscreteInverter(denoiser, slots, **{"terms": terms} | settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vocabulary(torch.zeros(3)), r"A vocabulary is a table \(V, D\), got \(3,\)"),
        (lambda: Vocabulary(torch.full((3, 2), torch.nan)), "not finite"),
        (lambda: Vocabulary(torch.zeros(3, 2), torch.ones(2, 4).bool()), r"The masks are \(2, 4\) of torch.bool, for 3 rows"),
        (lambda: Vocabulary(torch.zeros(3, 2), torch.ones(2, 3)), "of torch.float32"),
        (lambda: Vocabulary(torch.zeros(3, 2), torch.tensor([[True] * 3, [False] * 3])), "Slot 1 may hold no row"),
        (lambda: Vocabulary(torch.zeros(3, 2)).check(torch.tensor([[3]])), "Slot 0 may not hold row 3 of 3"),
        (lambda: Vocabulary(torch.zeros(3, 2)).check(torch.tensor([[-1]])), "Slot 0 may not hold row -1 of 3"),
        (lambda: Vocabulary(torch.zeros(3, 2)).check(torch.tensor([[1, 2]])), "do not fit 1 slots"),
        (lambda: Vocabulary(torch.zeros(3, 2)).check(torch.tensor([[0.5]])), "Give whole numbers"),
        (lambda: Free((1,), 1.0, 1.0), "range from 1.0 to 1.0 is empty"),
        (lambda: Nearest(metric="l3"), "Unknown metric of the vocabulary 'l3'"),
        (lambda: Softmax(tau=0.0), "tau=0.0 must be positive"),
        (lambda: Gumbel(tau=-1.0), "tau=-1.0 must be positive"),
        (lambda: Optimiser(lr=-1.0), "lr=-1.0 must be finite and not negative"),
        (lambda: Optimiser(free_lr=float("nan")), "free_lr=nan must be finite"),
        (lambda: Optimiser(start="zero"), "Unknown start 'zero'"),
        (lambda: Stop(loops=0), "loops=0 and patience=2"),
        (lambda: Descent(batch=0), "batch=0 must be at least 1"),
        (lambda: Leaps(pairs=0), "Leaps need pairs"),
        (lambda: Leaps(step=0.0), "step=0.0 must be positive"),
        (lambda: LogPrior(torch.tensor([1.0, 0.0])), "must be positive and finite for every row"),
        (lambda: LogPrior(torch.ones(2), weight=-1.0), "weight=-1.0 of LogPrior"),
        (lambda: Likelihood(LinearDenoiser(torch.ones(4, 2), 1.0), scheduler=0, metric="l3"), "Unknown metric 'l3'"),
        (lambda: LinearDenoiser(torch.ones(4), 1.0), r"weight \(4,\) must be"),
        (lambda: toy_inverter(batch_size=0), "batch_size=0"),
        (lambda: toy_inverter(terms=[]), "at least one term"),
        (lambda: toy_inverter(search=[]), "Give at least one search"),
        (lambda: toy_inverter(search=Descent(batch=64)), "A step wants 64 pairs, but the plan has 32"),
        (lambda: toy_inverter(search=Leaps(first=33)), "Leaps want 33 pairs, but the plan has 32"),
        (lambda: toy_inverter(terms=[1, 2], plan=PairPlan(count=32)), "Terms add up in nats"),
        (lambda: toy_inverter().fit(torch.zeros(0, 4)), "There are no samples"),
        (lambda: toy_inverter(terms=[LogPrior(torch.ones(3))]).fit(torch.zeros(1, 4)), r"The prior is \(1, 3\), but"),
        (lambda: toy_inverter().score(torch.zeros(1, 4), torch.tensor([[2]])), "Slot 0 may not hold row 2"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_losses_that_are_not_finite_stop_the_search() -> None:
    with pytest.raises(FloatingPointError, match=r"The loss of rows \[[01]\] on pair 0 is nan"):
        toy_inverter().fit(torch.full((1, 4), torch.nan))


def test_a_prior_alone_can_be_asked() -> None:
    # No gradient, no network: the answer is its mode.
    inverter = toy_inverter(terms=[LogPrior(torch.tensor([0.2, 0.8]))], search=Leaps(first=0))
    (found,) = inverter.fit(torch.zeros(1, 4))
    assert int(found.rows) == 1
    assert found.nats == pytest.approx(-np.log(0.8))
    assert DiffusionPrior(inverter.denoiser, scheduler=0).weight == 1
