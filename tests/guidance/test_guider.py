"""`as_guider`: guidance in the stock blocks of Modular Diffusers, on tiny random models."""

from __future__ import annotations

import functools
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, BaseGuidance, ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

from genkit.guidance import EnergyGuidance, Guidance, as_guider, attach
from genkit.latents import LatentCodec
from genkit.levels import levels_of
from genkit.pipelines import GuidedPipeline
from tests import tiny
from tests.guidance.test_attach import Look, Push, Wander, redness, smallness

BLOCKS = {"sd3": StableDiffusion3AutoBlocks, "sdxl": StableDiffusionXLAutoBlocks}
CALL = {"prompt": ["a red seven", "a blue cat"], "height": 16, "width": 16, "num_inference_steps": 3}


@functools.cache
def classic(family):
    return tiny.pipeline(family)


def noise(family):
    channels = 16 if family == "sd3" else 4
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@functools.cache
def modular(family):
    """The stock blocks with the components of the tiny classic pipeline."""
    pipe = BLOCKS[family]().init_pipeline()
    components = {k: v for k, v in classic(family).components.items() if k in pipe._component_specs and v is not None}
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, family, guider=None, **arguments):
    """Final latents of a modular pipeline, with classifier-free guidance of 3 unless a guider is given."""
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0) if guider is None else guider)
    return pipe(**CALL | arguments, negative_prompt=["", ""], latents=noise(family), output="latents")


def guided(pipe, family, guidance, **arguments):
    inner = ClassifierFreeGuidance(guidance_scale=3.0)
    return run(pipe, family, as_guider(guidance, pipe.scheduler, LatentCodec.of(pipe), guider=inner), **arguments)


def energies(route="x0_detached"):
    return {"image": EnergyGuidance(redness, 2.0, route), "latent": EnergyGuidance(smallness, 1.0, route, "latent")}


@pytest.mark.parametrize(("family", "space"), [("sd3", "latent"), ("sdxl", "image")])
def test_the_guider_is_the_attached_guidance(family, space):
    pipe, guidance = modular(family), energies()[space]
    out = guided(pipe, family, guidance)
    with attach(pipe, guidance):
        expected = run(pipe, family)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert (out - run(pipe, family)).abs().max() > 1e-3


@pytest.mark.parametrize("route", ["x0_detached", "through_denoiser"])
def test_the_guider_is_the_own_loop(route):
    guidance = energies(route)["latent"]
    own = GuidedPipeline.from_pipe(classic("sd3"))(
        **CALL, latents=noise("sd3"), guidance=guidance, guidance_scale=3.0, output_type="latent"
    )
    torch.testing.assert_close(guided(modular("sd3"), "sd3", guidance), own.images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "EDMEulerScheduler"])
def test_samplers(name):
    """Heun evaluates twice a step, DPM-Solver does not scale its input, EDM preconditions input and output."""
    scheduler = getattr(diffusers, name)(**({} if name.startswith("EDM") else tiny.SCHEDULE))
    pipe, look = modular("sdxl"), Look()
    original = pipe.scheduler
    pipe.update_components(scheduler=scheduler)
    out = guided(pipe, "sdxl", energies()["latent"] + look)
    assert [level for level, *_ in look.seen] == levels_of(scheduler)
    with attach(pipe, energies()["latent"]):
        expected = run(pipe, "sdxl")
    pipe.update_components(scheduler=original)
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(out / size, expected / size, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", list(BLOCKS))
def test_through_denoiser_differentiates_the_network(family):
    """To the end of one step of Euler, the shift is the gradient of the energy of x0 with respect to x: by finite differences."""
    pipe, kept = modular(family), {}

    class Keep(EnergyGuidance):
        def shift(self, state, prediction):
            kept["x"], kept["gradient"] = state.x.detach().clone(), self.gradient(state, prediction)
            kept["value"] = state.log[self.name]
            return 0.0 * kept["gradient"]

    def value(offset):
        latents = noise(family) + offset
        guider = as_guider(Keep(smallness, 1.0, "through_denoiser", "latent"), pipe.scheduler, guider=ClassifierFreeGuidance(3.0))
        pipe.update_components(guider=guider)
        pipe(**CALL | {"num_inference_steps": 1}, negative_prompt=["", ""], latents=latents, output="latents")
        return kept["value"], kept["gradient"], kept["x"]

    direction = torch.randn(noise(family).shape, generator=torch.Generator().manual_seed(1))
    _, gradient, _ = value(0.0)
    high, _, x_high = value(0.01 * direction)
    low, _, x_low = value(-0.01 * direction)
    expected = (gradient * (x_high - x_low)).flatten(1).sum(1)
    torch.testing.assert_close(high - low, expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "guidance"), [("sd3", 0.0 * EnergyGuidance(redness)), ("sdxl", EnergyGuidance(redness, 0.0, "through_denoiser"))]
)
def test_weight_zero_changes_no_bit_and_costs_nothing(family, guidance):
    pipe, calls = modular(family), []
    network = pipe.transformer if family == "sd3" else pipe.unet
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    bare, count = run(pipe, family), len(calls)
    assert torch.equal(guided(pipe, family, guidance), bare)
    assert len(calls) == 2 * count
    handle.remove()


def test_each_call_is_a_run():
    pipe, look = modular("sd3"), Look()
    guider = as_guider(look, pipe.scheduler)
    run(pipe, "sd3", guider)
    run(pipe, "sd3", guider)
    assert [cached for *_, cached in look.seen] == [0, 1, 2] * 2


class Noting(ClassifierFreeGuidance):
    """Notes the state of the network between preparation and clean-up."""

    def prepare_models(self, denoiser):
        super().prepare_models(denoiser)
        self.prepared = denoiser
        self.notes = [*getattr(self, "notes", []), self.is_conditional]

    def cleanup_models(self, denoiser):
        assert self.prepared is denoiser
        self.prepared = None


def test_another_inner_guider():
    """The inner guider prepares the network, counts its conditions and combines them as before."""
    pipe = modular("sd3")
    bare = run(pipe, "sd3", AdaptiveProjectedGuidance(3.0, eta=0.5))
    assert torch.equal(
        run(pipe, "sd3", as_guider(Guidance(), pipe.scheduler, guider=AdaptiveProjectedGuidance(3.0, eta=0.5))), bare
    )
    assert not torch.equal(bare, run(pipe, "sd3"))
    inner = Noting(3.0)
    run(pipe, "sd3", as_guider(Guidance(), pipe.scheduler, guider=inner))
    assert inner.notes == [True, False] * 3
    assert inner.prepared is None


def test_what_a_guider_is():
    guider = as_guider(redness, classic("sd3").scheduler, cond=["c"], seeds=[3])
    assert isinstance(guider, BaseGuidance)
    assert guider.num_conditions == 2
    assert guider.guidance_scale == 7.5
    guider.disable()
    assert (guider.num_conditions, guider.guider._enabled) == (1, False)
    guider.enable()
    assert guider.num_conditions == 2
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = guider.nothing_of_the_kind
    assert "ClassifierFreeGuidance" not in type(guider).__name__
    assert "num_conditions" in repr(guider)


def test_the_network_is_left_as_it_was():
    pipe = modular("sd3")

    class Fail(Guidance):
        def shift(self, state, prediction):
            raise RuntimeError("on purpose")

    before = set(pipe.transformer.__dict__)
    with pytest.raises(RuntimeError, match="on purpose"):
        guided(pipe, "sd3", Fail())
    assert set(pipe.transformer.__dict__) == before
    with mock.patch.object(pipe.transformer.norm_out, "forward", Fail.shift), pytest.raises(TypeError):
        guided(pipe, "sd3", Guidance())
    assert set(pipe.transformer.__dict__) == before


@pytest.mark.parametrize("guidance", [Push(before=1.0), Push(after=1.0) + EnergyGuidance(redness), 2.0 * Push()])
def test_displacements_are_refused(guidance):
    with pytest.raises(ValueError, match="displaces samples"):
        as_guider(guidance, classic("sd3").scheduler)


def test_schedulers_of_no_known_family():
    with pytest.raises(ValueError, match="CMStochasticIterativeScheduler is not supported"):
        as_guider(redness, diffusers.CMStochasticIterativeScheduler())


def test_a_guidance_that_replaces_the_sample():
    class Own(Guidance):
        def __call__(self, state, predict):
            return Wander.__call__(Wander("last"), state, predict)

    pipe = modular("sd3")
    with pytest.raises(ValueError, match="another sample"):
        run(pipe, "sd3", as_guider(Own(), pipe.scheduler))


def test_an_input_that_is_not_the_sample():
    guider = as_guider(redness, classic("sd3").scheduler)
    guider.scheduler.set_timesteps(2)
    network = torch.nn.Conv2d(9, 4, 1)
    guider.set_state(0, 2, guider.scheduler.timesteps[0])
    batches = guider.prepare_inputs({"hidden_states": (torch.zeros(1, 9, 2, 2),) * 2})
    for batch in batches:
        guider.prepare_models(network)
        batch.noise_pred = network(batch.hidden_states)
        guider.cleanup_models(network)
    with pytest.raises(ValueError, match=r"\(1, 9, 2, 2\) but predicts \(1, 4, 2, 2\)"):
        guider(batches)


def test_set_state_comes_first():
    guider, network = as_guider(redness, classic("sd3").scheduler), torch.nn.Linear(2, 2)
    guider.prepare_models(network)
    with pytest.raises(ValueError, match="set_state"):
        network(torch.zeros(1, 2))


def test_not_finite_names_the_guidance():
    pipe = modular("sd3")
    with pytest.raises(FloatingPointError, match=r"'energy' gave NaN.*evaluation 2 of 3"):
        guided(pipe, "sd3", EnergyGuidance(lambda images: redness(images) * float("nan")))
