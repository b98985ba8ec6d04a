"""EnergyGuidance: routes, scale, spaces, errors."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from genkit.denoisers.analytic import GaussianDenoiser
from genkit.guidance import EnergyGuidance, Guidance, State, as_guidance
from genkit.guidance.energy import ROUTES
from genkit.levels import Level
from genkit.pipelines import GuidedPipeline
from tests import tiny

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


# Several energies at once


class Counted(nn.Module):
    """A network that counts forward and backward passes, by hooks of torch."""

    def __init__(self, network):
        super().__init__()
        self.network, self.forwards, self.backwards = network, 0, 0
        network.register_forward_hook(self._forward)

    def _forward(self, module, inputs, output):
        self.forwards += 1
        output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient):
        self.backwards += 1


def three_energies(route):
    def first(x):
        return -(x - 0.2).square().flatten(1).mean(1)

    def second(x):
        return 2 * x[:, 0].flatten(1).mean(1)

    def third(z):
        return z.pow(3).flatten(1).mean(1)

    return [
        EnergyGuidance(first, 3.0, route),
        EnergyGuidance(second, 0.5, route).scheduled(lambda state: 2.0 - state.progress),
        EnergyGuidance(third, 0.1, route, "latent"),
    ]


@pytest.mark.parametrize("route", ROUTES)
def test_joint_evaluation_decodes_once_and_differentiates_once(route):
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    a, b, c = three_energies(route)
    network, decoder = Counted(pipe.unet), Counted(pipe.vae.decoder)

    def guided(guidance):
        for counted in (network, decoder):
            counted.forwards = counted.backwards = 0
        settings = {"seeds": [0, 1], "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        return pipe("a red seven", guidance=guidance, **settings).images

    together = guided(a + (b + c).between(0, 1))
    assert (decoder.forwards, decoder.backwards) == (2, 2)
    assert (network.forwards, network.backwards) == (2, 2 if route == "through_denoiser" else 0)
    torch.testing.assert_close(guided(c + b + a), together, rtol=1e-6, atol=1e-6)
    apart = guided(Apart(a) + Apart(b) + Apart(c))
    assert decoder.forwards == 4
    assert network.backwards == (6 if route == "through_denoiser" else 0)
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)


class Apart(Guidance):
    """A guidance that contributes on its own, whatever else there is."""

    name, needs_graph = "apart", True

    def __init__(self, guidance):
        self.guidance = guidance

    def wants_graph(self, state):
        return self.guidance.wants_graph(state)

    def contribution(self, state, prediction, predict):
        return self.guidance.contribution(state, prediction, predict)


@pytest.mark.parametrize("route", ROUTES)
def test_joint_equals_the_sum_of_the_parts_exactly(route):
    denoiser = GaussianDenoiser(torch.full((3, 4, 4), 0.3), 0.7)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    state, prediction = state_at(x.detach()), denoiser(x, LEVEL)
    parts = [*three_energies(route), EnergyGuidance(lambda x: x.flatten(1).sum(1), -0.2, route, sigma_data=0.9)]
    apart = sum(part.contribution(state, prediction, None) for part in parts)
    total = (parts[0] + parts[1]) + 1.0 * (parts[2] + parts[3])
    torch.testing.assert_close(total.contribution(state, prediction, None), apart, rtol=1e-12, atol=1e-14)


def test_overrides_are_respected_in_a_sum():
    state = state_at(torch.randn(2, 1, 4, 4, dtype=torch.float64))
    prediction = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)(state.x, LEVEL)
    plain = EnergyGuidance(lambda z: -z.square().flatten(1).sum(1), 0.5)

    class Shift(EnergyGuidance):
        def shift(self, state, prediction):
            return torch.ones_like(state.x)

    class Unit(EnergyGuidance):
        def gradient(self, state, prediction):
            return super().gradient(state, prediction).sign()

    class Whole(EnergyGuidance):
        def __call__(self, state, predict):
            return predict().shifted(3 * torch.ones_like(state.x))

    class Strong(EnergyGuidance):
        def weight(self, state):
            return 2.0

    base = plain.shift(state, prediction)
    predict = lambda **_: prediction  # noqa: E731
    sign = torch.sign(base) * plain.jacobian(LEVEL, False) * 0.5
    for other, expected in ((Shift, 1.0), (Unit, sign), (Whole, 3.0), (Strong, 2 * base)):
        both = (plain + other(plain.energy, 0.5)).contribution(state, prediction, predict)
        torch.testing.assert_close(both, base + expected)


def test_each_energy_is_reported_by_its_name():
    state = state_at(torch.randn(2, 1, 4, 4))
    prediction = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)(state.x, LEVEL)
    one, two = EnergyGuidance(lambda z: z.flatten(1).sum(1)), EnergyGuidance(lambda z: z.flatten(1).sum(1) + 1)
    named = EnergyGuidance(lambda z: z.flatten(1).sum(1) + 2, name="mine")
    (one.between(0, 1) + named + two + 0.0 * one)(state, lambda *, grad=False: prediction)
    assert list(state.log) == ["energy", "mine", "energy#2"]
    torch.testing.assert_close(state.log["energy#2"], state.log["energy"] + 1)
    assert state.energy.keys() == state.log.keys()


def test_the_culprit_of_a_joint_evaluation_is_named():
    state = state_at(torch.randn(2, 1, 4, 4))
    prediction = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)(state.x, LEVEL)
    good = EnergyGuidance(lambda z: z.flatten(1).sum(1), name="good")
    value = EnergyGuidance(lambda z: z.flatten(1).sum(1) / 0, name="infinite")
    slope = EnergyGuidance(lambda z: (0 * z).abs().sqrt().flatten(1).sum(1), name="steep")
    for bad in (value, slope):
        with pytest.raises(FloatingPointError, match=f"^Guidance '{bad.name}' gave NaN or infinity at evaluation 1 of 1"):
            (good + bad)(state, lambda *, grad=False: prediction)
    with pytest.raises(FloatingPointError, match="'infinite' and 'steep' gave"):
        (value + good + slope)(state, lambda *, grad=False: prediction)


@pytest.mark.parametrize("constant", [lambda z: torch.zeros(len(z)), lambda z: z.detach().flatten(1).sum(1)])
def test_an_energy_must_depend_on_the_samples(constant):
    state = state_at(torch.randn(2, 1, 4, 4))
    prediction = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)(state.x, LEVEL)
    with pytest.raises(ValueError, match=r"'energy' returned at evaluation 1 of 1 .* differentiable"):
        EnergyGuidance(constant).shift(state, prediction)


def test_small_weights_do_not_run_through_half_precision():
    """A weight of 1e-6 inside a float16 backward pass would leave nothing."""
    level = Level(1.0, 1000.0, 0)
    state = state_at(torch.randn(2, 1, 4, 4), level)
    prediction = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)(state.x, level)
    half = EnergyGuidance(lambda z: (z.half() * 0.01).flatten(1).sum(1))
    shift = (half + 0.0 * half).contribution(state, prediction, lambda *, grad=False: prediction)
    torch.testing.assert_close(shift, torch.full_like(shift, 0.01 * 0.25 / (0.25 + 1000**2)), rtol=2e-3, atol=0)


def test_energies_may_ask_for_level_and_seeds():
    state = state_at(torch.randn(2, 1, 4, 4))
    state.seeds = [3, 4]
    prediction = GaussianDenoiser(torch.zeros(1, 4, 4), 1.0)(state.x, LEVEL)
    seen = []

    def energy(z, level=None, *, seeds):
        seen.append((level, seeds))
        return z.flatten(1).sum(1)

    EnergyGuidance(energy).shift(state, prediction)
    assert seen == [(LEVEL, [3, 4])]


@pytest.mark.parametrize("thing", [3, "classifier", EnergyGuidance])
def test_what_is_no_guidance(thing):
    with pytest.raises(ValueError, match="is no guidance"):
        as_guidance(thing)


def test_a_function_may_stand_for_a_guidance():
    def redness(x):
        return x[:, 0].flatten(1).mean(1)

    guidance = EnergyGuidance(lambda z: z.flatten(1).sum(1))
    assert as_guidance(guidance) is guidance
    assert (guidance + redness).name == "energy + redness"
    assert (redness + guidance).name == "redness + energy"
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    settings = {"seeds": [0], "num_inference_steps": 2, "output_type": "latent"}
    by_function = pipe("a cat", guidance=redness, **settings)
    assert torch.equal(by_function.images, pipe("a cat", guidance=EnergyGuidance(redness), **settings).images)
    assert list(by_function.energy) == ["redness"]
    with pytest.raises(ValueError, match="is no guidance"):
        pipe("a cat", guidance=3, **settings)


def test_a_guide_on_another_device_is_refused_before_the_run():
    """The device "meta" stands for one that is not the pipeline's."""
    from genkit.classifiers import load_classifier
    from genkit.guidance import ClassifierGuidance, attach

    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    guide = ClassifierGuidance(load_classifier("digits-classifier").to("meta"), 7)
    says = r"AttributeClassifier of guidance 'classifier' is on meta, but the pipeline is on cpu\. Move it there with \.to\('cpu'\)"
    for guidance in (guide, guide + 2.0 * EnergyGuidance(lambda x: x.sum((1, 2, 3)))):
        with pytest.raises(ValueError, match=says):
            pipe("a red seven", guidance=guidance, num_inference_steps=1)
    with pytest.raises(ValueError, match=says), attach(pipe.host, guide):
        raise AssertionError("not reached")
