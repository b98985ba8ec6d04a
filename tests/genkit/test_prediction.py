"""Conversions between kinds of prediction, and the one-line rule for adding a score."""

from __future__ import annotations

import math

import pytest
import torch

from genkit.levels import Level
from genkit.prediction import KINDS, Prediction

LEVELS = {
    "vp": Level(0.6, 0.8, 0),
    "vp-noisy": Level(0.01, math.sqrt(1 - 1e-4), 0),
    "vp-clean": Level(math.sqrt(1 - 1e-6), 1e-3, 0),
    "ve": Level(1.0, 5.0, 0),
    "ve-noisy": Level(1.0, 80.0, 0),
    "flow": Level(0.3, 0.7, 0),
    "per-sample": Level(torch.tensor([0.6, 1.0]).double(), torch.tensor([0.8, 3.0]).double(), torch.tensor([1.0, 2.0])),
}
BY_LEVEL = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)


def draw():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64).unbind()


def expand(value):
    return value.view(-1, 1, 1, 1) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("kind", KINDS)
@BY_LEVEL
def test_conversions_by_their_definitions(level, kind):
    x0, eps = draw()
    a, s = expand(level.alpha), expand(level.sigma)
    truth = {
        "x0": x0,
        "eps": eps,
        "v": (a * eps - s * x0) / (a**2 + s**2) ** 0.5,
        "flow": eps - x0,
        "score": -eps / s,
    }
    prediction = Prediction(level.diffuse(x0, eps), level, truth[kind], kind)
    # Going from eps to x0 divides by alpha, and back by sigma: so many digits are lost.
    alphas, sigmas = torch.as_tensor(a), torch.as_tensor(s)
    condition = float((1 / alphas + 1 / sigmas + 1).max()) * float(sigmas.max() + 1)
    for name, expected in truth.items():
        scale = condition * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(getattr(prediction, name), expected, rtol=0, atol=1e-14 * scale)
    for other in KINDS:
        there = prediction.to(other)
        assert there.kind == other
        torch.testing.assert_close(there.to(kind).raw, truth[kind], rtol=1e-6, atol=1e-9)
    assert prediction.to(kind) is prediction


@BY_LEVEL
def test_a_shift_is_the_same_for_every_kind(level):
    x0, eps = draw()
    c = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prediction = Prediction(level.diffuse(x0, eps), level, eps, "eps")
    s, a = expand(level.sigma), expand(level.alpha)
    for kind in KINDS:
        shifted = prediction.to(kind).shifted(c)
        assert shifted.kind == kind
        torch.testing.assert_close(shifted.score, prediction.score + c, rtol=1e-6, atol=1e-6 * float(prediction.score.abs().max()))
        torch.testing.assert_close(shifted.eps, eps - s * c, rtol=1e-6, atol=1e-6 * float(1 + torch.as_tensor(s).max()))
        torch.testing.assert_close(shifted.x0, x0 + s**2 / a * c, rtol=1e-6, atol=1e-9 * float((s**2 / a * c).abs().max() + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_shift_changes_no_bit(kind):
    x0, eps = draw()
    prediction = Prediction(LEVELS["vp"].diffuse(x0, eps), LEVELS["vp"], eps, kind)
    assert torch.equal(prediction.shifted(torch.zeros_like(eps)).raw, prediction.raw)


@pytest.mark.parametrize("alpha", [0.0, torch.zeros(2, dtype=torch.float64)], ids=["number", "per-sample"])
def test_pure_noise(alpha):
    """At alpha = 0: what is known stays finite, and only eps can be shifted."""
    level = Level(alpha, 1.0 if isinstance(alpha, float) else torch.ones(2, dtype=torch.float64), 0)
    x0, x = draw()
    c = torch.ones_like(x)
    for kind, raw in (("x0", x0), ("v", -x0), ("flow", x - x0)):
        prediction = Prediction(x, level, raw, kind)
        torch.testing.assert_close(prediction.x0, x0)
        torch.testing.assert_close(prediction.eps, x)
        torch.testing.assert_close(prediction.v, -x0)
        torch.testing.assert_close(prediction.flow, x - x0)
        assert torch.equal(prediction.shifted(c).raw, raw)
    torch.testing.assert_close(Prediction(x, level, x, "eps").shifted(c).eps, x - c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_in_float32(dtype):
    x0, eps = draw()
    level = LEVELS["vp-noisy"]
    x = level.diffuse(x0, eps).to(dtype)
    prediction = Prediction(x, level, eps.to(dtype), "eps")
    assert prediction.x0.dtype == torch.float32
    torch.testing.assert_close(prediction.x0, (x.float() - level.sigma * eps.to(dtype).float()) / level.alpha)
    assert prediction.shifted(torch.ones_like(x)).raw.dtype == torch.float32
    assert Prediction(x.double(), level, eps.to(dtype), "eps").x0.dtype == torch.float64


def test_conversions_are_differentiable():
    x0, eps = draw()
    raw = eps.clone().requires_grad_(True)
    for kind in KINDS:
        prediction = Prediction(x0, LEVELS["flow"], raw, kind)
        for name in (*KINDS, "score"):
            if name != kind:
                assert torch.autograd.grad(getattr(prediction, name).sum(), raw)[0].abs().min() > 0


def test_the_learned_variance_stays():
    x0, eps = draw()
    prediction = Prediction(x0, LEVELS["vp"], eps, "eps", variance=x0)
    assert prediction.to("v").variance is x0
    assert prediction.shifted(eps).variance is x0


def test_errors_name_what_was_wrong():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"Unknown kind of prediction 'noise'\. Known: eps, x0, v, flow\."):
        Prediction(x, LEVELS["vp"], x, "noise")
    with pytest.raises(ValueError, match=r"sample is \(2, 3\) but the network output is \(2, 6\)"):
        Prediction(x, LEVELS["vp"], torch.zeros(2, 6), "eps")
