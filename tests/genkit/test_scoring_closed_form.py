"""Diffusion classifiers on Gaussian data, where every number is known: T1 to T6 of the spec of discriminative tasks.

An optimal denoiser of Gaussian data is affine in the noise, so its expected squared error is exact on 2 d sigma points +-sqrt(d)
e_i: the real denoiser and the real losses run, and nothing is random.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from scipy.stats import norm
from torch import Tensor

from genkit.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from genkit.denoisers.base import Cond
from genkit.levels import Level
from genkit.prediction import KINDS
from genkit.scoring import PairPlan, Scorer
from genkit.scoring.losses import row_losses


def sigma_points(dim: int) -> Tensor:
    """(2 d, d) with mean 0 and covariance 1: the mean of any quadratic function over them is its expectation."""
    points = math.sqrt(dim) * torch.eye(dim, dtype=torch.float64)
    return torch.cat([points, -points])


def of_log_snr(lam: Tensor) -> Level:
    """Variance-preserving levels of lambda = ln(alpha^2 / sigma^2)."""
    return Level(torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt(), torch.zeros_like(lam))


def expected_errors(mean: Tensor, std: Tensor | float, x0: Tensor, lam: Tensor) -> Tensor:
    """E ||eps - eps^||^2 (n,) of the optimal denoiser of N(mean, std^2) at x0 (d,), for each lambda (n,)."""
    denoiser, eps = GaussianDenoiser(mean, std), sigma_points(len(x0))
    rows = len(lam) * len(eps)
    level = of_log_snr(lam.repeat_interleave(len(eps)))
    losses = row_losses(denoiser, x0.expand(rows, -1), level, eps.repeat(len(lam), 1), Cond({}))
    return losses.view(len(lam), len(eps)).mean(1) * len(x0)


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_t1_the_integral_of_the_errors_is_the_log_likelihood_ratio(std: float) -> None:
    g = torch.Generator().manual_seed(1)
    x0, mean_0, mean_1 = (torch.randn(4, generator=g, dtype=torch.float64) for _ in range(3))
    lam = torch.linspace(-12, 14, 4001, dtype=torch.float64)
    errors = [expected_errors(mean, std, x0, lam) for mean in (mean_0, mean_1)]
    ratio = 0.5 * torch.trapezoid(errors[1] - errors[0], lam)
    gaps = [((x0 - mean) ** 2).sum() for mean in (mean_0, mean_1)]
    exact = (gaps[1] - gaps[0]) / (2 * std**2)
    assert ratio.item() == pytest.approx(exact.item(), abs=4e-5 * abs(exact.item()) + 2e-5)
    # A truncated range multiplies it by 1 / (1 + r_min s^2) - 1 / (1 + r_max s^2), r = e^lambda.
    inner = torch.linspace(-2, 3, 4001, dtype=torch.float64)
    part = 0.5 * torch.trapezoid(expected_errors(mean_1, std, x0, inner) - expected_errors(mean_0, std, x0, inner), inner)
    factor = 1 / (1 + math.exp(-2) * std**2) - 1 / (1 + math.exp(3) * std**2)
    assert part.item() == pytest.approx((exact * factor).item(), rel=1e-6)


def test_t1_of_classes_with_different_variances() -> None:
    g = torch.Generator().manual_seed(2)
    x0, mean_0, mean_1 = (torch.randn(4, generator=g, dtype=torch.float64) for _ in range(3))
    lam = torch.linspace(-14, 16, 4001, dtype=torch.float64)
    errors = [expected_errors(m, s, x0, lam) for m, s in ((mean_0, 0.8), (mean_1, 1.3))]
    ratio = 0.5 * torch.trapezoid(errors[1] - errors[0], lam)
    log_p = [torch.distributions.Normal(m, s).log_prob(x0).sum() for m, s in ((mean_0, 0.8), (mean_1, 1.3))]
    assert ratio.item() == pytest.approx((log_p[0] - log_p[1]).item(), abs=2e-4)


def test_t1_expected_error_formula() -> None:
    x0, mean, s = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64), torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64), 0.7
    lam = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)
    a2, s2 = torch.sigmoid(lam), torch.sigmoid(-lam)
    gap = ((x0 - mean) ** 2).sum()
    formula = (a2**2 * s**4 * 3 + a2 * s2 * gap) / (a2 * s**2 + s2) ** 2
    torch.testing.assert_close(expected_errors(mean, s, x0, lam), formula)


def test_elbo_weights_give_nats() -> None:
    # What the plan's weights add up to is the same integral, on the schedule's own range of lambda.
    scheduler, x0 = DDPMScheduler(), torch.tensor([0.4, -0.2, 0.9], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5]], dtype=torch.float64)
    pairs = PairPlan(count=1000, order="grid", weighting="elbo").pairs(scheduler, (3,))
    lam = torch.as_tensor(pairs.level.log_snr)
    scores = [(expected_errors(mean, 1.0, x0, lam) / 3 * pairs.weight).mean().item() for mean in means]
    gaps = [((x0 - mean) ** 2).sum().item() for mean in means]
    assert scores[1] - scores[0] == pytest.approx((gaps[1] - gaps[0]) / 2, rel=2e-3)


def test_t2_uniform_and_elbo_weights_agree_for_equal_isotropic_covariances() -> None:
    g = torch.Generator().manual_seed(3)
    means = torch.randn(2, 6, generator=g, dtype=torch.float64)
    x0 = torch.randn(40, 6, generator=g, dtype=torch.float64)
    decisions = []
    for weighting in ("uniform", "elbo"):
        pairs = PairPlan(count=50, order="grid", weighting=weighting).pairs(DDPMScheduler(), (6,))
        lam = torch.as_tensor(pairs.level.log_snr)
        score = [torch.stack([(expected_errors(m, 1.0, x, lam) * pairs.weight).sum() for x in x0]) for m in means]
        decisions.append(score[0] < score[1])
    assert torch.equal(*decisions)


def test_t3_uniform_weights_lose_where_covariances_are_anisotropic() -> None:
    # Decisions are linear in x0, so each accuracy is a normal probability, from the gradients of the expected errors at x0 = 0.
    std = torch.tensor([1.0] * 8 + [0.02] * 8, dtype=torch.float64)
    shift = torch.tensor([0.6] + [0.0] * 7 + [0.014] * 8, dtype=torch.float64)

    def accuracy(weighting: str) -> float:
        pairs = PairPlan(count=1000, order="grid", weighting=weighting).pairs(DDPMScheduler(), (16,))
        lam = torch.as_tensor(pairs.level.log_snr)[::4]

        def margin(x0: Tensor) -> Tensor:
            errors = [expected_errors(m, std, x0, lam) for m in (torch.zeros_like(shift), shift)]
            return ((errors[1] - errors[0]) * pairs.weight[::4]).sum()

        origin = margin(torch.zeros(16, dtype=torch.float64))
        slope = torch.stack([margin(e) - origin for e in torch.eye(16, dtype=torch.float64)])
        spread = (slope**2 * std**2).sum().sqrt()
        correct = [norm.cdf((origin / spread).item()), norm.cdf((-(origin + slope @ shift) / spread).item())]
        return float(np.mean(correct))

    bayes = norm.cdf(0.5 * (shift**2 / std**2).sum().sqrt().item())
    assert bayes == pytest.approx(0.849, abs=1e-3)
    assert accuracy("elbo") == pytest.approx(0.849, abs=1e-3)
    assert accuracy("uniform") == pytest.approx(0.688, abs=0.012)


def test_t4_every_parameterisation_has_the_same_eps_error() -> None:
    g = torch.Generator().manual_seed(4)
    x0, eps = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.1, 0.4, 1.0, 3.0, 9.0], dtype=torch.float64)
    n = (1 + sigma**2).sqrt()
    exploding = Level(torch.ones_like(sigma), sigma, sigma)
    preserving = Level(1 / n, sigma / n, sigma)
    flow = Level(1 / (1 + sigma), sigma / (1 + sigma), sigma)
    mean = torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64)
    losses = [
        row_losses(GaussianDenoiser(mean, 0.6, kind=kind), x0, level, eps, Cond({}))
        for kind in KINDS
        for level in (exploding, preserving, flow)
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("abar", "measured", "formula"), [(0.9, 402, 452), (0.5, 119, 124), (0.1, 82, 87)])
def test_t5_pairing_reduces_the_variance(abar: float, measured: float, formula: float) -> None:
    d, gap = 4096, 100.0
    g = torch.Generator().manual_seed(5)
    means = torch.zeros(2, d)
    means[1, 0] = math.sqrt(gap)
    denoiser = GaussianMixtureDenoiser(means, 1.0)
    denoiser.network.float()
    rows = 512
    x0 = torch.randn(1, d, generator=g).expand(2 * rows, -1)
    level = Level(math.sqrt(abar), math.sqrt(1 - abar), 0)
    cond = denoiser.condition([0, 1])
    eps = torch.randn(2 * rows, d, generator=g)

    def losses(label: int, noise: Tensor) -> Tensor:
        return row_losses(denoiser, x0[: len(noise)], level, noise, cond[[label] * len(noise)]) * d

    paired = (losses(1, eps) - losses(0, eps)).var()
    unpaired = (losses(1, eps[:rows]) - losses(0, eps[rows:])).var()
    snr = abar / (1 - abar)
    assert (d * (2 + snr) + gap) / gap == pytest.approx(formula, rel=0.01)
    assert (unpaired / paired).item() == pytest.approx(measured, rel=0.2)
    antithetic = (losses(1, eps) - losses(0, eps) + losses(1, -eps) - losses(0, -eps)) / 2
    assert antithetic.var() < 1e-4 * paired


def test_t5_antithetic_noise_has_no_variance_in_float64() -> None:
    g = torch.Generator().manual_seed(6)
    denoiser = GaussianMixtureDenoiser(torch.tensor([[0.0] * 64, [1.25] * 64]), 1.0)
    x0, eps = (torch.randn(rows, 64, generator=g, dtype=torch.float64) for rows in (1, 200))
    cond, level = denoiser.condition([0, 1]), Level(math.sqrt(0.5), math.sqrt(0.5), 0)
    loss = [[row_losses(denoiser, x0.expand(200, -1), level, s * eps, cond[[k] * 200]) for s in (1, -1)] for k in (0, 1)]
    difference = (loss[1][0] + loss[1][1] - loss[0][0] - loss[0][1]) / 2
    assert difference.var() < 1e-25


def test_differences_are_as_exact_as_their_inner_product_form() -> None:
    # Losses of about 1 that differ by 1e-6: the mean of squares in float32 has lost the difference.
    g = torch.Generator().manual_seed(7)
    eps = torch.randn(1, 4096, generator=g)
    e1 = eps + torch.randn(1, 4096, generator=g)
    e2 = e1 + 1e-6 * torch.randn(1, 4096, generator=g)

    class Constant(GaussianDenoiser):
        def _evaluate(self, x, level, tensors):
            return self.value, None

    losses = []
    for value in (e1, e2):
        denoiser = Constant(0.0, 1.0)
        denoiser.value = value
        losses.append(row_losses(denoiser, torch.zeros(1, 4096), Level(0.6, 0.8, 0), eps, Cond({})))
    inner = ((e2 - e1).double() * (e1.double() + e2.double() - 2 * eps.double())).mean()
    assert (losses[1] - losses[0]).item() == pytest.approx(inner.item(), rel=1e-6)
    naive = ((e2 - eps) ** 2).mean() - ((e1 - eps) ** 2).mean()
    assert abs(naive.item() - inner.item()) > 0.02 * abs(inner.item())


def test_t6_discrete_prior() -> None:
    # An unconditional denoiser of atoms: half the integral of its error at atom k is -ln pi_k.
    g = torch.Generator().manual_seed(8)
    atoms = torch.randn(8, 32, generator=g, dtype=torch.float64)
    weights = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.08, 0.06, 0.05, 0.01], dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser(atoms, 0.0, weights)
    lam = torch.linspace(-12, 10, 221, dtype=torch.float64)
    for k in (0, 2, 7):
        errors = []
        for part in lam.split(17):
            eps = torch.randn(400 * len(part), 32, generator=g, dtype=torch.float64)
            level = of_log_snr(part.repeat_interleave(400))
            losses = row_losses(denoiser, atoms[k].expand(len(eps), -1), level, eps, Cond({})) * 32
            errors.append(losses.view(-1, 400).mean(1))
        nats = 0.5 * torch.trapezoid(torch.cat(errors), lam)
        assert nats.item() == pytest.approx(-weights[k].log().item(), rel=0.03)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("weighting", ["uniform", "elbo"])
def test_scores_under_every_schedule_find_the_right_gaussian(scheduler: object, weighting: str) -> None:
    g = torch.Generator().manual_seed(9)
    means = 2 * torch.randn(3, 16, generator=g)
    denoiser = GaussianMixtureDenoiser(means, 0.5)
    x0 = means.repeat(4, 1) + 0.5 * torch.randn(12, 16, generator=g)
    scorer = Scorer(denoiser, PairPlan(count=32, weighting=weighting), scheduler=scheduler)
    table = scorer.table(x0, denoiser.condition([0, 1, 2])).mean(2)
    assert table.argmin(1).tolist() == [0, 1, 2] * 4
