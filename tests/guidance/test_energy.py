"""EnergyGuidance: routes, scale, spaces, errors."""

from __future__ import annotations

import pytest
import torch

from genkit.denoisers.analytic import GaussianDenoiser
from genkit.guidance import EnergyGuidance, State
from genkit.levels import Level

LEVEL = Level(alpha=0.8, sigma=0.6, t=500)


def state_at(x, level=LEVEL, codec=None):
    return State(x=x, level=level, levels=[level], codec=codec)


def predict_with(denoiser, state):
    def predict(*, grad=False):
        x = state.x.detach().requires_grad_(True) if grad else state.x
        with torch.set_grad_enabled(grad):
            return denoiser(x, state.level)

    return predict


def test_routes_agree_on_gaussian_data():
    """On N(m, s^2) data the detached route with sigma_data = s is the exact chain rule."""
    denoiser = GaussianDenoiser(torch.full((1, 4, 4), 0.3), 0.7)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = state_at(x)

    def energy(z):
        return -(z - 1).square().flatten(1).sum(1)

    through = EnergyGuidance(energy, 0.5, "through_denoiser")(state, predict_with(denoiser, state))
    detached = EnergyGuidance(energy, 0.5, "x0_detached", sigma_data=0.7)(state, predict_with(denoiser, state))
    torch.testing.assert_close(through.eps, detached.eps, rtol=1e-10, atol=1e-12)
    assert not through.raw.requires_grad
    plain = denoiser(x, LEVEL)
    assert energy(through.x0).gt(energy(plain.x0)).all()


def test_direct_route_sees_the_noisy_sample_and_the_level():
    seen = {}

    def energy(z, level):
        seen["x"], seen["level"] = z.detach().clone(), level
        return z.flatten(1).sum(1)

    x = torch.randn(2, 1, 4, 4)
    state = state_at(x)
    denoiser = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)
    guided = EnergyGuidance(energy, 2.0, "direct")(state, predict_with(denoiser, state))
    assert torch.equal(seen["x"], x)
    assert seen["level"] is LEVEL
    torch.testing.assert_close(guided.score, denoiser(x, LEVEL).score + 2.0, rtol=1e-6, atol=1e-6)


def test_latent_space_needs_no_decoder_and_image_space_uses_it():
    class Codec:
        def decode(self, z):
            return 3 * z

    values = []

    def energy(z):
        values.append(z.detach().clone())
        return z.flatten(1).sum(1)

    state = state_at(torch.randn(2, 1, 4, 4), codec=Codec())
    prediction = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)(state.x, LEVEL)
    latent = EnergyGuidance(energy, space="latent").gradient(state, prediction)
    image = EnergyGuidance(energy, space="image").gradient(state, prediction)
    torch.testing.assert_close(values[1], 3 * values[0])
    torch.testing.assert_close(image, 3 * latent)


def test_works_under_no_grad_and_inference_mode():
    state = state_at(torch.randn(2, 1, 4, 4))
    guidance = EnergyGuidance(lambda z: -z.square().flatten(1).sum(1))
    denoiser = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)
    with torch.no_grad():
        one = guidance(state, predict_with(denoiser, state)).raw
    with torch.inference_mode():
        two = guidance(state, predict_with(denoiser, state)).raw
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"route": "sideways"}, "sideways"),
        ({"space": "pixel"}, "pixel"),
        ({"scale": float("nan")}, "nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EnergyGuidance(lambda z: z.flatten(1).sum(1), **arguments)


def test_energy_of_wrong_shape_or_value():
    state = state_at(torch.randn(2, 1, 4, 4))
    prediction = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)(state.x, LEVEL)
    with pytest.raises(ValueError, match=r"shape \(2,\); got \(\)"):
        EnergyGuidance(lambda z: z.sum()).shift(state, prediction)
    with pytest.raises(FloatingPointError, match="evaluation 1 of 1"):
        EnergyGuidance(lambda z: (z * float("nan")).flatten(1).sum(1)).shift(state, prediction)


def test_duplicated_halves_get_identical_shifts():
    """Pipelines that double the batch for classifier-free guidance pass both halves on."""
    half = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    state = state_at(torch.cat([half, half]))
    prediction = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)(state.x, LEVEL)
    shift = EnergyGuidance(lambda z: -z.pow(4).flatten(1).sum(1), 2.0).shift(state, prediction)
    assert torch.equal(*shift.chunk(2))
