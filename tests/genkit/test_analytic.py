"""The exact denoisers against sums of densities, automatic differentiation, and their limits."""

from __future__ import annotations

import math

import pytest
import torch

from genkit.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from genkit.levels import Level
from genkit.prediction import KINDS
from tests import oracles

LEVELS = {
    "vp": Level(0.6, 0.8, 0),
    "ve": Level(1.0, 5.0, 0),
    "flow": Level(0.3, 0.7, 0),
    "noise": Level(0.0, 1.0, 0),
    "clean": Level(1.0, 1e-3, 0),
}
BY_LEVEL = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
POINTS = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
MEANS, STDS, WEIGHTS = [-1.0, 0.5, 2.0], [0.5, 0.1, 0.8], [1.0, 2.0, 5.0]


def pictures():
    """Three components over (2, 3, 3) pictures, each with its own means and standard deviations."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2, 3, 3, generator=generator, dtype=torch.float64)
    stds = torch.rand(3, 2, 3, 3, generator=generator, dtype=torch.float64) + 0.1
    return means, stds, torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@BY_LEVEL
def test_gaussian(level, kind):
    prediction = GaussianDenoiser(1.0, 0.5, kind=kind)(POINTS, level)
    setting = (level.alpha, level.sigma, 1.0, 0.5)
    x0, eps = oracles.gaussian_x0(POINTS, *setting), oracles.gaussian_eps(POINTS, *setting)
    n = math.hypot(level.alpha, level.sigma)
    truth = {"x0": x0, "eps": eps, "v": (level.alpha * eps - level.sigma * x0) / n, "flow": eps - x0}
    assert prediction.kind == kind
    torch.testing.assert_close(prediction.raw, truth[kind], rtol=1e-12, atol=1e-12)
    if level.alpha or kind in ("v", "flow"):
        torch.testing.assert_close(prediction.score, oracles.gaussian_score(POINTS, *setting), rtol=1e-6, atol=1e-6)


@BY_LEVEL
def test_mixture(level):
    denoiser = GaussianMixtureDenoiser(MEANS, STDS, WEIGHTS)
    setting = (level.alpha, level.sigma, MEANS, STDS, WEIGHTS)
    near = POINTS / 4  # far out, a sum of densities underflows where the log-density does not
    expected = torch.tensor([oracles.mixture_score(x.item(), *setting) for x in near], dtype=torch.float64)[:, None]
    torch.testing.assert_close(denoiser(near, level).score, expected, rtol=1e-9, atol=1e-9)
    densities = torch.tensor([oracles.mixture_log_density(x.item(), *setting) for x in near], dtype=torch.float64)
    torch.testing.assert_close(denoiser.log_density(near, level), densities, rtol=1e-9, atol=1e-9)


@BY_LEVEL
def test_score_is_the_gradient_of_the_log_density(level):
    means, stds, x = pictures()
    denoiser = GaussianMixtureDenoiser(means, stds, WEIGHTS)
    x = (x * (1 + level.sigma)).requires_grad_(True)
    for cond in (None, denoiser.condition([0, 1, 2, 1])):
        (gradient,) = torch.autograd.grad(denoiser.log_density(x, level, cond).sum(), x)
        torch.testing.assert_close(denoiser(x, level, cond).score, gradient, rtol=1e-9, atol=1e-9)


def test_second_derivatives_are_exact():
    """The Jacobian of x0 in x, which guidance through the denoiser needs, is alpha / sigma^2 times the posterior variance."""
    x = torch.tensor([[0.7]], dtype=torch.float64)
    denoiser, level = GaussianMixtureDenoiser([-1.0, 1.0], 0.5), Level(0.6, 0.8, 0)
    assert torch.autograd.gradcheck(lambda z: denoiser(z, level).x0, x.requires_grad_(True))
    assert torch.autograd.gradcheck(lambda z: denoiser.log_density(z, level), x)
    a, s, v = 0.6, 0.8, 0.36 * 0.25 + 0.64
    p = torch.softmax(torch.tensor([-((0.7 + a) ** 2), -((0.7 - a) ** 2)], dtype=torch.float64) / (2 * v), 0)
    each = torch.tensor([m + a * 0.25 / v * (0.7 - a * m) for m in (-1.0, 1.0)], dtype=torch.float64)
    variance = (s**2 * 0.25 / v + (p * each**2).sum() - (p * each).sum() ** 2).item()
    (jacobian,) = torch.autograd.grad(denoiser(x, level).x0.sum(), x)
    assert jacobian.item() == pytest.approx(a / s**2 * variance, rel=1e-9)


def test_density_integrates_to_one():
    x = torch.linspace(-30, 30, 60001, dtype=torch.float64)[:, None]
    denoiser = GaussianMixtureDenoiser(MEANS, STDS, WEIGHTS)
    for cond in (None, denoiser.condition([2]).repeat(len(x))):
        density = denoiser.log_density(x, Level(0.8, 0.6, 0), cond).exp()
        assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1, abs=1e-9)


def test_far_out_nothing_underflows():
    denoiser, level = GaussianMixtureDenoiser([-1.0, 1.0], 0.01), Level(1.0, 0.01, 0)
    x = torch.tensor([[1e4], [-1e4]], dtype=torch.float64)
    prediction = denoiser(x, level)
    torch.testing.assert_close(prediction.x0, (x + torch.tensor([[1.0], [-1.0]])) / 2)
    assert torch.isfinite(denoiser.log_density(x, level)).all()


def test_conditions():
    means, stds, x = pictures()
    level = LEVELS["vp"]
    denoiser = GaussianMixtureDenoiser(means, stds, WEIGHTS, classes=[7, 4, 7])
    cond = denoiser.condition(labels=[4, 7, 7, 4])
    assert len(cond) == 4
    alone = GaussianDenoiser(means[1], stds[1])(x, level)
    torch.testing.assert_close(denoiser(x, level, cond).raw[[0, 3]], alone.raw[[0, 3]])
    pair = GaussianMixtureDenoiser(means[[0, 2]], stds[[0, 2]], [1.0, 5.0])(x, level)
    torch.testing.assert_close(denoiser(x, level, cond).raw[[1, 2]], pair.raw[[1, 2]])
    whole = denoiser(x, level)
    torch.testing.assert_close(denoiser(x, level, cond.null()).raw, whole.raw)
    torch.testing.assert_close(denoiser(x, level, cond, guidance_scale=0.0).raw, whole.raw)
    guided = denoiser(x, level, cond, guidance_scale=2.5).raw
    torch.testing.assert_close(guided, whole.raw + 2.5 * (denoiser(x, level, cond).raw - whole.raw))
    torch.testing.assert_close(denoiser.condition(torch.tensor([4, 7])).tensors["components"], cond[0:2].tensors["components"])
    with pytest.raises(ValueError, match=r"No component has the class 5\. Known: \[4, 7\]"):
        denoiser.condition([4, 5])


def test_bayes_rule():
    """log p(x) = log sum_k w_k p(x | k)."""
    means, stds, x = pictures()
    denoiser, level = GaussianMixtureDenoiser(means, stds, WEIGHTS), LEVELS["flow"]
    each = torch.stack([denoiser.log_density(x, level, denoiser.condition([k] * 4)) for k in range(3)], 1)
    prior = (torch.tensor(WEIGHTS).double() / sum(WEIGHTS)).log()
    torch.testing.assert_close(denoiser.log_density(x, level), torch.logsumexp(prior + each, 1))


def test_levels_of_each_sample():
    means, stds, x = pictures()
    denoiser = GaussianMixtureDenoiser(means, stds)
    alphas, sigmas = torch.tensor([0.6, 1.0, 0.3, 0.0]).double(), torch.tensor([0.8, 5.0, 0.7, 1.0]).double()
    together = denoiser(x, Level(alphas, sigmas, torch.zeros(4)))
    for i in range(4):
        one = denoiser(x[i : i + 1], Level(alphas[i].item(), sigmas[i].item(), 0))
        torch.testing.assert_close(together.raw[i : i + 1], one.raw)


def test_templates():
    """std 0: the posterior is a softmax over squared distances."""
    means, _, x = pictures()
    level = Level(0.8, 0.6, 0)
    weights = torch.softmax(-((x[:, None] - 0.8 * means) ** 2).flatten(2).sum(2) / (2 * 0.36), 1)
    torch.testing.assert_close(GaussianMixtureDenoiser(means, 0.0)(x, level).x0, torch.einsum("bk,k...->b...", weights, means))


def test_scalar_means_fit_any_shape():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    level = LEVELS["vp"]
    everywhere = GaussianMixtureDenoiser(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4), 0.5)
    torch.testing.assert_close(GaussianMixtureDenoiser([-1.0, 1.0], 0.5)(x, level).raw, everywhere(x, level).raw)
    assert everywhere.latent_shape() == (3, 4, 4)
    with pytest.raises(ValueError, match="not 8 x 4"):
        everywhere.latent_shape(height=8)
    with pytest.raises(ValueError, match="Give means"):
        GaussianDenoiser(0.0, 1.0).latent_shape()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    """Inside it is float64, outside as every denoiser: at least float32."""
    denoiser = GaussianDenoiser(1.0, 0.5)
    x = torch.full((2, 1), 0.3, dtype=dtype)
    out = denoiser(x, LEVELS["clean"]).raw
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    expected = oracles.gaussian_eps(x.double(), 1.0, 1e-3, 1.0, 0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-9)
    assert denoiser.dtype == torch.float64
    denoiser.network.float()
    assert denoiser.dtype == torch.float32
    assert denoiser.log_density(x, LEVELS["clean"]).dtype == torch.promote_types(dtype, torch.float32)


def test_errors():
    with pytest.raises(ValueError, match="Unknown kind of prediction 'noise'"):
        GaussianDenoiser(0.0, 1.0, kind="noise")
    with pytest.raises(ValueError, match="zero or positive"):
        GaussianDenoiser(0.0, -1.0)
    with pytest.raises(ValueError, match="Weights must be positive"):
        GaussianMixtureDenoiser([0.0, 1.0], 1.0, [1.0, 0.0])
    with pytest.raises(ValueError, match=r"means of shape \(2,\) for 3 weights"):
        GaussianMixtureDenoiser([0.0, 1.0], 1.0, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"stds of shape \(3,\) do not fit means of shape \(2,\)"):
        GaussianMixtureDenoiser([0.0, 1.0], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="2 components but 3 class labels"):
        GaussianMixtureDenoiser([0.0, 1.0], 1.0, classes=[0, 1, 2])
    means, stds, _ = pictures()
    with pytest.raises(ValueError, match=r"samples are \(5,\) but the means are \(2, 3, 3\)"):
        GaussianMixtureDenoiser(means, stds)(torch.zeros(1, 5), LEVELS["vp"])
