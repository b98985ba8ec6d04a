"""Distillation where every number is known: (i) to (vi) of section 8 of the distillation spec."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from genkit.denoisers.analytic import GaussianDenoiser
from genkit.distill.losses import approximate_r1, distillation, distribution_matching, gan_d, r1
from genkit.distill.samplers import SIGMA_DATA, LevelSampler, NoiseSampler
from genkit.levels import Level
from genkit.prediction import KINDS, Prediction
from tests import oracles

MEAN, STD = 1.0, 0.5
AWAY = 0.8  # from the mean, where the student's output is


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vp(alpha: float) -> Level:
    return Level(alpha, (1 - alpha**2) ** 0.5, 0)


def paired(count: int) -> Tensor:
    """Noise (count, 1) and its negative: what is affine in the noise has its exact expectation as its mean."""
    eps = torch.randn(count // 2, 1, dtype=torch.float64, generator=generator())
    return torch.cat([eps, -eps])


# (i) the distillation loss pulls to the mean


@pytest.mark.parametrize(("alpha", "printed"), [(0.9, 0.7745), (0.5, 1.4769), (0.1, 1.5960)])
def test_gradient_of_distillation(alpha, printed):
    """E grad_y |y - x0_teacher|^2 = 2 (1 - k alpha)(y - mean), k = alpha std^2 / (alpha^2 std^2 + sigma^2)."""
    teacher, level = GaussianDenoiser(MEAN, STD), vp(alpha)
    y = torch.tensor(MEAN + AWAY, dtype=torch.float64, requires_grad=True)
    student = y.expand(1000, 1)
    x = level.diffuse(student.detach(), paired(1000))
    distillation(student, teacher(x, level).x0, level, "const").backward()
    k = alpha * STD**2 / (alpha**2 * STD**2 + level.sigma**2)
    assert y.grad.item() == pytest.approx(2 * (1 - k * alpha) * AWAY, rel=1e-9)
    assert y.grad.item() == pytest.approx(printed, abs=6e-5)


@pytest.mark.parametrize("weight", ["alpha", "sds", "const"])
def test_distillation_alone_collapses_to_the_mean(weight):
    teacher, level = GaussianDenoiser(MEAN, STD), vp(0.5)
    outputs = (MEAN + STD * torch.randn(64, 1, dtype=torch.float64, generator=generator())).requires_grad_()
    optimizer = torch.optim.SGD([outputs], lr=20.0)
    noise = generator(1)
    for _ in range(400):
        eps = torch.randn(64, 1, dtype=torch.float64, generator=noise)
        x = level.diffuse(outputs.detach(), eps)
        optimizer.zero_grad()
        distillation(outputs, teacher(x, level).x0, level, weight).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.99
    assert float(outputs.detach().std()) < STD / 5
    assert outputs.mean().item() == pytest.approx(MEAN, abs=0.05)


def test_the_sds_weight_is_the_gradient_of_score_distillation():
    """w (eps_teacher - eps) in every value, w = sigma^2 (Poole et al. 2022, arXiv 2209.14988)."""
    teacher, level = GaussianDenoiser(MEAN, STD), vp(0.7)
    y = torch.linspace(-1, 3, 8, dtype=torch.float64)[:, None].requires_grad_()
    eps = torch.randn(8, 1, dtype=torch.float64, generator=generator())
    prediction = teacher(level.diffuse(y.detach(), eps), level)
    distillation(y, prediction.x0, level, "sds").backward()
    torch.testing.assert_close(y.grad * 8, level.sigma**2 * (prediction.eps - eps))


# (ii) the finite difference is the gradient penalty


def test_approximate_r1_of_a_linear_discriminator():
    """48.18 in the spec's case, where 48.32 was simulated."""
    torch.manual_seed(0)
    head = nn.Linear(50, 1, bias=False).double()
    with torch.no_grad():
        head.weight.mul_(48.18**0.5 / head.weight.norm())
    count, std = 200_000, 0.01
    x = torch.randn(1, 50, dtype=torch.float64).expand(count, -1)
    with torch.no_grad():
        found = approximate_r1(head(x), head(x + std * torch.randn(count, 50, dtype=torch.float64)), std)
    error = 48.18 * (2 / count) ** 0.5
    assert found.item() == pytest.approx(48.18, abs=4 * error)
    leaf = x[:4].clone().requires_grad_()
    assert r1(head(leaf), [leaf]).item() == pytest.approx(48.18)


def test_clean_samples_with_a_little_noise_are_no_approximation():
    """The public mistake: noised reals against clean reals with a little noise. The difference does not shrink with the step."""
    torch.manual_seed(0)
    head, level = nn.Linear(50, 1, bias=False).double(), vp(0.6)
    x0, eps, n = torch.randn(3, 1000, 50, dtype=torch.float64).unbind()
    x, std = level.diffuse(x0, eps), 0.01
    exact = float(head.weight.detach().square().sum())
    with torch.no_grad():
        right = approximate_r1(head(x), head(x + std * n), std).item()
        wrong = approximate_r1(head(x), head(x0 + std * n), std).item()
    assert right == pytest.approx(exact, rel=0.2)
    assert wrong > 100 * exact


# (iii) what optimal discriminators are


def quantiles(mean: float, std: float, count: int) -> Tensor:
    """`count` numbers that stand for N(mean, std^2)."""
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return mean + std * torch.special.ndtri(p)


def test_a_logistic_discriminator_is_the_log_density_ratio():
    """With features (1, x, x^2), of two Gaussians: the quadratic log p - log q."""
    (m, s), (n, r) = oracles.REAL, oracles.MODEL
    head = nn.Linear(3, 1, bias=False).double()
    real, fake = (torch.stack([x**0, x, x**2], 1) for x in (quantiles(m, s, 20_000), quantiles(n, r, 20_000)))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = gan_d(head(real), head(fake), "softplus")
        value.backward()
        return value

    optimizer.step(loss)
    expected = [np.log(r / s) - m**2 / (2 * s**2) + n**2 / (2 * r**2), m / s**2 - n / r**2, 1 / (2 * r**2) - 1 / (2 * s**2)]
    assert head.weight[0].tolist() == pytest.approx(expected, abs=5e-3)


def test_the_hinge_only_tells_which_density_is_larger():
    (m, s), (n, r) = oracles.REAL, oracles.MODEL
    edges = torch.linspace(-1, 3, 41, dtype=torch.float64)
    real, fake = (torch.bucketize(quantiles(*setting, 4000), edges) for setting in (oracles.REAL, oracles.MODEL))
    table = nn.Parameter(torch.zeros(42, dtype=torch.float64))
    optimizer = torch.optim.SGD([table], lr=2.0)
    for _ in range(500):
        optimizer.zero_grad()
        gan_d(table[real], table[fake], "hinge").backward()
        optimizer.step()
    p, q = (scipy.stats.norm(*setting).cdf(edges.numpy()) for setting in ((m, s), (n, r)))
    difference = torch.as_tensor(np.diff(p) - np.diff(q))
    clear = difference.abs() > 2e-3
    assert int(clear.sum()) > 20
    torch.testing.assert_close(table.detach()[1:-1][clear], difference[clear].sign(), rtol=0, atol=0.2)


# (iv) distribution matching rests where the distributions match


def test_distribution_matching_vanishes_when_both_scores_agree():
    level = vp(0.5)
    real, same, other = GaussianDenoiser(MEAN, STD), GaussianDenoiser(MEAN, STD), GaussianDenoiser(MEAN + 1, STD)
    x = torch.randn(16, 1, dtype=torch.float64, generator=generator()).requires_grad_()
    noisy = level.diffuse(x.detach(), paired(16))
    for fake in (same, other):
        x.grad = None
        distribution_matching(x, fake(noisy, level).x0, real(noisy, level).x0).backward()
        zero = float(x.grad.abs().max()) == 0
        assert zero == (fake is same)
    # Samples of the other distribution are told to go back: the step -grad lowers them.
    assert bool((x.grad > 0).all())


# (v) parameterisations


@pytest.mark.parametrize(
    "level", [vp(0.9), vp(0.068), Level(0.3, 0.7, 0), Level(1.0, 14.6, 0)], ids=lambda v: f"{v.alpha:g}-{v.sigma:g}"
)
def test_conversions_round_trip(level):
    x, raw = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator()).unbind()
    for kind in KINDS:
        start = Prediction(x, level, raw, kind)
        for via in KINDS:
            back = start.to(via).to(kind)
            assert float((back.raw - raw).abs().max()) < 1e-6, f"{kind} by way of {via}"


def test_trigflow_is_rectified_flow_in_other_words():
    """x_t = cos t x0 + sin t z, z ~ N(0, sd^2); s = sin t / (cos t + sin t), u = x_t / sd sqrt(s^2 + (1 - s)^2)."""
    sd, mean, std = SIGMA_DATA, 0.4, 0.7
    flow = GaussianDenoiser(mean / sd, std / sd, kind="flow")  # of x0 / sd, which has noise of size 1
    for t in (0.05, 0.6, 1.0, 1.5):
        t = torch.tensor(t, dtype=torch.float64)
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        s = t.sin() / (t.cos() + t.sin())
        n = (s**2 + (1 - s) ** 2).sqrt()
        u = x / sd * n
        prediction = flow(u, Level(float(1 - s), float(s), 0))
        network = ((1 - 2 * s) * u + (1 - 2 * s + 2 * s**2) * prediction.raw) / n
        x0 = t.cos() * x - sd * t.sin() * network
        torch.testing.assert_close(x0, sd * prediction.x0, rtol=0, atol=1e-12)
        exact = oracles.gaussian_x0(x, float(t.cos()), float(sd * t.sin()), mean, std)
        torch.testing.assert_close(x0, exact, rtol=0, atol=1e-12)
        # The same change of variable is how the discriminator's noise is drawn.
        sampler = NoiseSampler.parse("atan-lognormal:0,1")
        share = scipy.stats.norm.cdf(np.log(sd * np.tan(float(t))))
        assert sampler.quantile(torch.tensor(share, dtype=torch.float64)).item() == pytest.approx(float(s))


# (vi) distributions of levels and noise

NOISES = ["logit-normal:1,1", "logit-normal:-.5,.3", "uniform", "uniform:0,.75", "shifted:3", "atan-lognormal:-.6,1"]


def draws(text: str, count: int, batch: int) -> np.ndarray:
    sampler, source = NoiseSampler.parse(text), generator()
    return torch.cat([sampler.draw(batch, source) for _ in range(count // batch)]).numpy()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("text", NOISES)
def test_noise_has_its_distribution(text, batch):
    """Kolmogorov-Smirnov, for single draws and for draws that share a batch."""
    sampler = NoiseSampler.parse(text)
    drawn = draws(text, 4000, batch)
    assert scipy.stats.kstest(drawn, lambda u: sampler.cdf(torch.as_tensor(u)).numpy()).pvalue > 0.01


def test_the_logit_of_logit_normal_noise_is_normal():
    """Against scipy's normal distribution, and not another one."""
    u = draws("logit-normal:1,1", 4000, 1)
    assert scipy.stats.kstest(scipy.special.logit(u), scipy.stats.norm(1, 1).cdf).pvalue > 0.01
    assert scipy.stats.kstest(scipy.special.logit(u), scipy.stats.norm(0.9, 1).cdf).pvalue < 0.001


@pytest.mark.parametrize(("step", "expected"), [(0, [0, 0, 0.5, 0.5]), (600, [0.7, 0.1, 0.1, 0.1])])
def test_level_frequencies(step, expected):
    """Chi-square, of draws alone in their batch."""
    sampler = LevelSampler.parse("1,.75,.5,.25", "warmup:500:0,0,.5,.5;.7,.1,.1,.1")
    source = generator()
    drawn = torch.cat([sampler.draw(1, step, source) for _ in range(4000)])
    counts = np.array([int((drawn == u).sum()) for u in sampler.levels])
    possible = np.array(expected) > 0
    assert counts[~possible].sum() == 0
    assert scipy.stats.chisquare(counts[possible], 4000 * np.array(expected)[possible]).pvalue > 0.01
    assert scipy.stats.chisquare(counts, np.full(4, 1000)).pvalue < 1e-6, "not uniform"
