"""Plans, losses and the queue, on every family at tiny random configurations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from scipy.stats import qmc

from genkit.denoisers import Cond, Denoiser, GaussianMixtureDenoiser
from genkit.denoisers.mixing import label_tables, mixed
from genkit.levels import Level, training_level
from genkit.prediction import Prediction
from genkit.scoring import Exhaustive, PairPlan, Race, Scorer, Taylor, Verdict, fit_temperature, posterior, reduce_prompts
from genkit.scoring.losses import row_losses
from tests import tiny

CONDITIONED = [name for name in tiny.FAMILIES if name not in ("ddpm", "ddim")]


def conditions(denoiser: Denoiser) -> Cond:
    """Three conditions of a tiny pipeline."""
    if denoiser.family == "DiT":
        return denoiser.condition(labels=[0, 1, 2])
    return denoiser.condition(prompts=["a red seven", "a blue cat", "three"])


def samples(denoiser: Denoiser, count: int = 3) -> torch.Tensor:
    shape = denoiser.latent_shape(8 * denoiser.factor, 8 * denoiser.factor)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def verdicts(scorer: Scorer, x0: torch.Tensor, cond: Cond, policy: object, **settings: object) -> list[Verdict]:
    return [verdict for _, verdict in sorted(scorer.run(x0, cond, policy, **settings), key=lambda pair: pair[0])]


# Plans


@pytest.mark.parametrize("order", ["golden", "vdc"])
def test_every_prefix_is_spread_over_time(order: str) -> None:
    u = PairPlan(count=128, order=order).times(1000)
    for n in (8, 13, 32, 100):
        # At most two points per mean distance, none far from all.
        gaps = np.diff(np.concatenate([[0], np.sort(u[:n]), [1]]))
        assert gaps.max() < 2.7 / n
        assert qmc.discrepancy(u[:n, None], method="L2-star") < 1.3 / n
    assert ((u > 0) & (u < 1)).all()


def test_longer_plans_begin_with_the_shorter_one() -> None:
    short, long = (PairPlan(count=n).pairs(DDIMScheduler(), (2, 4)) for n in (8, 64))
    assert np.array_equal(short.u, long.u[:8])
    assert torch.equal(short.noise(range(8)), long.noise(range(8)))


def test_reference_grids() -> None:
    assert PairPlan.reference("dit").timesteps == tuple(range(2, 1000, 4))
    assert PairPlan.reference("text").timesteps == tuple(range(1, 1000, 2))
    assert max(PairPlan.reference("text", 300).timesteps) == 898
    pairs = PairPlan.reference("dit").pairs(DDPMScheduler(), (4, 8, 8))
    assert pairs.level.t.tolist() == list(range(2, 1000, 4))
    assert len(PairPlan.reference("dit", 10, trials=3).pairs(DDPMScheduler(), (4,))) == 30


def test_noise_is_a_function_of_seed_and_index() -> None:
    pairs = PairPlan(count=16).pairs(DDIMScheduler(), (3, 4))
    assert torch.equal(pairs.noise([5, 2])[0], pairs.noise([5])[0])
    assert not torch.equal(pairs.noise([5]), pairs.noise([2]))
    other = PairPlan(count=16, seed=43).pairs(DDIMScheduler(), (3, 4))
    assert not torch.equal(pairs.noise(range(16)), other.noise(range(16)))
    both = PairPlan(count=8, antithetic=True, trials=2).pairs(DDIMScheduler(), (3, 4))
    assert torch.equal(both.noise([0]), -both.noise([1]))
    assert both.u[0] == both.u[3]
    assert both.u[3] != both.u[4]


def test_function_weighting_gets_log_snr() -> None:
    pairs = PairPlan(count=16, weighting=lambda lam: torch.exp(-(lam**2))).pairs(DDIMScheduler(), (3,))
    lam = torch.log(pairs.level.alpha**2 / pairs.level.sigma**2)
    torch.testing.assert_close(pairs.weight, torch.exp(-(lam**2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, r"at least one pair and one trial, got count=0"),
        ({"order": "golde"}, r"Unknown order of pairs 'golde'. Did you mean 'golden'"),
        ({"weighting": "elb"}, r"Unknown weighting 'elb'. Did you mean 'elbo'"),
        ({"span": (0.5, 0.5)}, r"span=\(0.5, 0.5\) is not a part"),
        ({"timesteps": (1, 2)}, r"2 timesteps with 1 noises each, but count=64"),
    ],
)
def test_bad_plans(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairPlan(**settings)


def test_bad_references_and_weightings() -> None:
    with pytest.raises(ValueError, match=r"Unknown reference plan 'sd'"):
        PairPlan.reference("sd")
    with pytest.raises(ValueError, match=r"1001 timesteps do not fit into 1000"):
        PairPlan.reference("dit", 1001)
    with pytest.raises(ValueError, match=r"finite weights, not negative"):
        PairPlan(count=4, weighting=lambda lam: -torch.ones_like(lam)).pairs(DDIMScheduler(), (3,))


# Levels


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), EulerDiscreteScheduler()], ids=lambda s: type(s).__name__)
def test_training_levels_are_variance_preserving(scheduler: object) -> None:
    level = training_level(scheduler, [0.0, 0.25, 0.9999])
    assert level.t.tolist() == [0, 250, 999]
    torch.testing.assert_close(level.alpha**2, scheduler.alphas_cumprod[[0, 250, 999]].double())
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(3, dtype=torch.float64))
    scheduler.set_timesteps(3)
    assert torch.equal(training_level(scheduler, [0.25]).alpha, level.alpha[1:2])


def test_training_levels_of_flows_are_not_shifted() -> None:
    level = training_level(FlowMatchEulerDiscreteScheduler(shift=3.0), [0.1, 0.5])
    assert level.sigma.tolist() == [0.1, 0.5]
    assert level.alpha.tolist() == [0.9, 0.5]
    assert level.t.tolist() == [100, 500]


def test_training_levels_of_edm_span_its_sigmas() -> None:
    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=100.0)
    level = training_level(scheduler, [0.0, 0.5])
    assert level.sigma.tolist() == pytest.approx([0.01, 1.0])
    assert level.t.tolist() == pytest.approx([0.25 * np.log(0.01), 0.0])


def test_the_last_training_level() -> None:
    assert training_level(DDPMScheduler(), [1.0]).t.tolist() == [999]
    assert training_level(FlowMatchEulerDiscreteScheduler(), [1.0]).sigma.tolist() == [1.0]


def test_training_levels_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"run from 0 to 1; got 0.5 to 1.1"):
        training_level(DDPMScheduler(), [0.5, 1.1])


def test_rows_of_levels() -> None:
    level = training_level(DDPMScheduler(), [0.1, 0.2, 0.3])
    assert level[[2, 0]].t.tolist() == [300, 100]
    assert level[1:].sigma.tolist() == level.sigma[1:].tolist()
    assert Level(0.6, 0.8, 5)[[0, 0]] == Level(0.6, 0.8, 5)


# Losses on every family


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("metric", ["l2", "l1", "huber"])
def test_losses_are_those_of_single_evaluations(family: str, metric: str) -> None:
    denoiser = Denoiser.of(tiny.pipeline(family))
    x0 = samples(denoiser, 2)
    cond = Cond({}) if family in ("ddpm", "ddim") else conditions(denoiser)
    if not cond.tensors:
        pytest.skip("nothing to compare without a condition")
    pairs = PairPlan(count=3).pairs(denoiser.pipe.scheduler, x0.shape[1:])
    losses = denoiser.losses(x0, pairs, cond, metric=metric, batch_size=5)
    assert losses.shape == (2, 3, 3)
    assert losses.dtype == torch.float64
    level = pairs.level[1:2]
    eps = pairs.noise([1])
    with torch.no_grad():
        prediction = denoiser(level.diffuse(x0[1:], eps), level, cond[2])
    error = (prediction.eps - eps).double()
    expected = {"l2": error**2, "l1": error.abs(), "huber": torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5)}[metric]
    assert losses[1, 2, 1].item() == pytest.approx(expected.mean().item(), rel=1e-4)


@pytest.mark.parametrize("family", CONDITIONED)
def test_scores_do_not_depend_on_batch_order_or_padding(family: str) -> None:
    denoiser = Denoiser.of(tiny.pipeline(family))
    x0, cond = samples(denoiser), conditions(denoiser)
    plan = PairPlan(count=6)
    first = verdicts(Scorer(denoiser, plan, batch_size=64), x0, cond, Exhaustive())
    small = verdicts(Scorer(denoiser, plan, batch_size=5, pad=True), x0, cond, Exhaustive())
    order = [2, 0, 1]
    moved = verdicts(Scorer(denoiser, plan, batch_size=7), x0, cond[order], Exhaustive())
    table = Scorer(denoiser, plan).table(x0, cond).mean(2).numpy()
    for i in range(len(x0)):
        np.testing.assert_allclose(first[i].scores, table[i], rtol=1e-4)
        np.testing.assert_allclose(small[i].scores, table[i], rtol=1e-4)
        np.testing.assert_allclose(moved[i].scores, table[i][order], rtol=1e-4)


@pytest.mark.parametrize("family", CONDITIONED)
def test_slopes_are_derivatives(family: str) -> None:
    denoiser = Denoiser.of(tiny.pipeline(family))
    x0, cond = samples(denoiser, 1), conditions(denoiser)
    scorer = Scorer(denoiser, PairPlan(count=4))
    scorer.pairs(x0.shape[1:])
    weights = torch.full((1, 3), 1 / 3)
    slopes = scorer.slopes(x0, cond, weights.clone(), np.array([2]))[0]

    def loss(step: torch.Tensor) -> float:
        pairs = scorer.pairs(x0.shape[1:])
        with torch.no_grad(), mixed(denoiser, cond, weights + step) as condition:
            return row_losses(denoiser, x0, pairs.level[[2]], pairs.noise([2]), condition).item()

    h = 1e-2
    for k in range(3):
        step = torch.zeros(1, 3)
        step[0, k] = h
        numeric = (loss(step) - loss(-step)) / (2 * h)
        assert slopes[k] == pytest.approx(numeric, rel=0.05, abs=2e-4 * max(1, np.abs(slopes).max()))


def test_mixing_one_condition_is_that_condition() -> None:
    for family in ("dit", "stable_diffusion"):
        denoiser = Denoiser.of(tiny.pipeline(family))
        x0, cond = samples(denoiser, 2), conditions(denoiser)
        level = training_level(denoiser.pipe.scheduler, [0.3, 0.6])
        weights = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        with torch.no_grad():
            with mixed(denoiser, cond, weights) as condition:
                blended = denoiser(x0, level, condition).raw
            torch.testing.assert_close(blended, denoiser(x0, level, cond[1:]).raw, rtol=1e-4, atol=1e-5)
    # Every copy of DiT's table is reached, and left without a hook.
    tables = label_tables(Denoiser.of(tiny.pipeline("dit")).network)
    assert len(tables) == len(tiny.pipeline("dit").transformer.transformer_blocks)
    assert not any(table._forward_hooks for table in tables)


def test_mixing_needs_embeddings() -> None:
    denoiser = GaussianMixtureDenoiser([0.0, 1.0], 1.0)
    with (
        pytest.raises(ValueError, match=r"'components' of analytic is made of whole numbers"),
        mixed(denoiser, denoiser.condition([0, 1]), torch.ones(1, 2)),
    ):
        pass


# The queue


@pytest.fixture
def gaussians() -> tuple[Scorer, torch.Tensor, Cond]:
    g = torch.Generator().manual_seed(3)
    means = torch.randn(6, 12, generator=g)
    denoiser = GaussianMixtureDenoiser(means, 0.7)
    x0 = means.repeat(5, 1) + 0.7 * torch.randn(30, 12, generator=g)
    return Scorer(denoiser, PairPlan(count=48), scheduler=DDIMScheduler(), batch_size=32), x0, denoiser.condition(range(6))


def test_the_race_finds_the_classes_of_gaussians(gaussians: tuple[Scorer, torch.Tensor, Cond]) -> None:
    scorer, x0, cond = gaussians
    full = verdicts(scorer, x0, cond, Exhaustive())
    race = verdicts(scorer, x0, cond, Race())
    assert [v.label for v in race] == [v.label for v in full]
    assert sum(v.evaluations for v in race) < 0.5 * sum(v.evaluations for v in full)
    assert max(v.error_bound for v in race) <= 0.1


def test_batches_are_full_until_the_last_images(gaussians: tuple[Scorer, torch.Tensor, Cond]) -> None:
    scorer, x0, cond = gaussians
    sizes: list[int] = []
    results = dict(scorer.run(iter(x0), cond, Race(), progress=sizes.append))
    assert sorted(results) == list(range(30))
    assert sum(sizes) == sum(v.evaluations for v in results.values())
    short = [size for size in sizes if size < 32]
    assert len(short) < 0.3 * len(sizes)
    # Samples are taken as they are needed, so memory does not grow with the number of images.
    taken = iter(x0)
    next(scorer.run(taken, cond, Race()))
    assert len(list(taken)) > 15


def test_results_do_not_depend_on_what_else_is_scored(gaussians: tuple[Scorer, torch.Tensor, Cond]) -> None:
    scorer, x0, cond = gaussians
    together = verdicts(scorer, x0, cond, Race())
    alone = [verdicts(scorer, x0[i : i + 1], cond, Race())[0] for i in range(5)]
    for one, other in zip(alone, together, strict=False):
        assert one.label == other.label
        assert one.evaluations == other.evaluations
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-9)


def test_several_prompts_of_a_class(gaussians: tuple[Scorer, torch.Tensor, Cond]) -> None:
    scorer, x0, cond = gaussians
    classes = [[0, 1], [2, 3, 4], [5]]
    table = scorer.table(x0, cond).mean(2).numpy()
    merged = verdicts(scorer, x0, cond, Exhaustive(), classes=classes, merge=True)
    for i, verdict in enumerate(merged):
        np.testing.assert_allclose(verdict.scores, [table[i, rows].mean() for rows in classes], rtol=1e-9)
        assert verdict.evaluations == 6 * 48
    apart = verdicts(scorer, x0, cond, Race(), classes=classes)
    assert [v.label for v in apart] == table.argmin(1).tolist()
    same = verdicts(scorer, x0, cond, Race())
    assert sum(v.evaluations for v in apart) < sum(v.evaluations for v in same)


def test_taylor_ranks_with_one_backward_pass() -> None:
    denoiser = Denoiser.of(tiny.pipeline("stable_diffusion"))
    x0, cond = samples(denoiser, 2), conditions(denoiser)
    scorer = Scorer(denoiser, PairPlan(count=16), batch_size=5)
    results = verdicts(scorer, x0, cond, Taylor(pairs=4, shortlist=2, inner=Exhaustive()))
    for i, verdict in enumerate(results):
        assert verdict.evaluations == 2 * 4 + 2 * 16
        rows = torch.full((4, 3), 1 / 3)
        slopes = scorer.slopes(x0[i].expand(4, *x0.shape[1:]), cond, rows, np.arange(4)).mean(0)
        assert sorted(np.flatnonzero(verdict.counts)) == sorted(np.argsort(slopes)[:2])


def test_nothing_stays_switched_on_after_an_error() -> None:
    denoiser = Denoiser.of(tiny.pipeline("dit"))
    scorer = Scorer(denoiser, PairPlan(count=16), batch_size=4)
    x0 = samples(denoiser, 1)
    x0[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"The loss of sample 0 under condition 0 on pair 0 is nan"):
        list(scorer.run(x0, conditions(denoiser), Race()))
    assert not any(table._forward_hooks for table in label_tables(denoiser.network))


def test_bad_settings(gaussians: tuple[Scorer, torch.Tensor, Cond]) -> None:
    scorer, x0, cond = gaussians
    with pytest.raises(ValueError, match=r"Unknown metric 'l3'"):
        Scorer(scorer.denoiser, metric="l3", scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match=r"batch_size=0"):
        Scorer(scorer.denoiser, batch_size=0, scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match=r"nothing to decide between 1 classes"):
        list(scorer.run(x0, cond[:1], Race()))


# Posteriors


def test_posterior_and_temperature() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 4000)
    logits = rng.standard_normal((4000, 4)) + 2.0 * np.eye(4)[labels]
    # Scores of known temperature: with unit normal noise and a gap of 2 the true logits are 2 x.
    T = fit_temperature(-3.0 * logits, labels)
    assert pytest.approx(1.5, rel=0.1) == T
    p = posterior(-3.0 * logits, T)
    np.testing.assert_allclose(p.sum(1), 1)
    confidence = p.max(1)
    accuracy = p.argmax(1) == labels
    assert confidence.mean() == pytest.approx(accuracy.mean(), abs=0.02)
    assert posterior(np.array([1.0, np.inf])).tolist() == [1, 0]
    np.testing.assert_allclose(posterior(np.zeros(2), prior=np.array([1.0, 3.0])), [0.25, 0.75])


def test_bad_posteriors() -> None:
    with pytest.raises(ValueError, match=r"temperature=0 must be positive"):
        posterior(np.zeros(2), 0)
    with pytest.raises(ValueError, match=r"must be positive for every class"):
        posterior(np.zeros(2), prior=np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"a policy that leaves classes out cannot be calibrated"):
        fit_temperature(np.array([[0.0, np.inf]]), np.array([0]))
    with pytest.raises(ValueError, match=r"Labels run from 0 to 1, got 2 to 2"):
        fit_temperature(np.zeros((1, 2)), np.array([2]))
    with pytest.raises(ValueError, match=r"Give scores"):
        fit_temperature(np.zeros(2), np.array([0]))


def test_reductions_of_prompts() -> None:
    scores, groups = np.array([1.0, 3.0, 2.0]), np.array([0, 0, 1])
    assert reduce_prompts(scores, groups, "min").tolist() == [1, 2]
    assert reduce_prompts(scores, groups, "mean").tolist() == [2, 2]
    soft = reduce_prompts(scores, groups, "logsumexp", 0.5)
    assert soft[0] == pytest.approx(-0.5 * np.log((np.exp(-2) + np.exp(-6)) / 2))
    assert soft[1] == pytest.approx(2)
    with pytest.raises(ValueError, match=r"Unknown reduction of prompts 'max'"):
        reduce_prompts(scores, groups, "max")


def test_losses_of_a_known_prediction() -> None:
    # One sample, one class: the loss is the squared error of eps, whatever the kind.
    denoiser = GaussianMixtureDenoiser(torch.zeros(1, 3, dtype=torch.float64), 1.0, kind="v")
    level = Level(0.6, 0.8, 0)
    x0, eps = torch.tensor([[1.0, 0, 0]], dtype=torch.float64), torch.tensor([[0.0, 2.0, 0]], dtype=torch.float64)
    x = level.diffuse(x0, eps)
    expected = Prediction(x, level, 0.8 * x, "eps").eps - eps
    assert row_losses(denoiser, x0, level, eps, Cond({})).item() == pytest.approx((expected**2).mean().item())
