"""`attach`: stock pipelines, steered by a dynamic subclass of their scheduler's class, do what the own loop does."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from genkit.denoisers import Denoiser
from genkit.denoisers.analytic import GaussianDenoiser
from genkit.denoisers.flux import pack, unpack
from genkit.guidance import EnergyGuidance, Guidance, attach
from genkit.levels import kind_of, levels_of
from genkit.pipelines import GuidedPipeline
from genkit.prediction import Prediction
from genkit.sampling import model_output, sample
from tests import oracles, tiny
from tests.genkit.test_closed_form import PRINTED, DensityRatio, by_order, edm_heun
from tests.oracles import MODEL
from tests.schedulers import CASES, noise_of

STEPS = 4
SAME = {"rtol": 0, "atol": 1e-6}


def redness(images):
    return 300 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def smallness(latents):
    return -5 * latents.square().flatten(1).mean(1)


RED = EnergyGuidance(redness)
SMALL = EnergyGuidance(smallness, space="latent")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron(np.eye(2), np.ones((8, 8))).astype(np.uint8) * 255)
STOCK = {
    "controlnet": {"image": PICTURE, "height": 16, "width": 16},
    "inpaint": {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 16},
    "inpaint_concat": {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 16},
    "img2img": {"image": PICTURE, "strength": 0.5},
    "cogvideox": {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8},
    "animatediff": {"num_frames": 3, "height": 16, "width": 16},
}
pipeline = functools.cache(tiny.pipeline)


class Look(Guidance):
    """Steers nothing, and keeps what it saw."""

    name = "look"

    def __init__(self):
        self.seen = []

    def shift(self, state, prediction):
        self.seen.append((state.level, tuple(state.x.shape), state.x.dtype, len(state.cache)))
        state.cache[len(state.cache)] = None


class Push(Guidance):
    """Displaces by a constant, and pulls x0 to a target."""

    name = "push"

    def __init__(self, before=0.0, after=0.0, pull=0.0):
        self.by = before, after, pull

    def before(self, state):
        return state.x + self.by[0] if self.by[0] else state.x

    def shift(self, state, prediction):
        return self.by[2] * (0.5 - prediction.x0) if self.by[2] else None

    def after(self, state, x_next):
        return x_next + self.by[1] if self.by[1] else x_next


def stock(family, guidance=None, pipe=None, **arguments):
    """The result of a stock pipeline, as latents where it can return them, alone or with a guidance."""
    pipe = pipeline(family) if pipe is None else pipe
    values = {"prompt": "a red seven", "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    values |= {"generator": torch.Generator().manual_seed(0)} | STOCK.get(family, {}) | arguments
    if guidance is None:
        return pipe(**values)[0]
    with attach(pipe, guidance):
        return pipe(**values)[0]


# Every family: the same as the own loop


def both(family, guidance, pipe=None, **arguments):
    """Final samples of the own loop and of the attached stock pipeline, from the same latents."""
    pipe = pipeline(family) if pipe is None else pipe
    own = GuidedPipeline.from_pipe(pipe)
    pixels = family in ("ddpm", "ddim")
    side = None if pixels else 32 if family == "sana" else 16
    z = torch.randn(2, *own.denoiser.latent_shape(side, side), generator=torch.Generator().manual_seed(0))
    common = {"num_inference_steps": STEPS} | arguments
    seed = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    if pixels:
        mine = own(latents=z, guidance=guidance, generator=seed(), output_type="np", **common).images
        with mock.patch(f"diffusers.pipelines.{family}.pipeline_{family}.randn_tensor", return_value=z), attach(pipe, guidance):
            return mine, pipe(batch_size=2, generator=seed(), output_type="np", **common).images
    if family == "dit":
        type(own.denoiser).__init__(own.denoiser, pipe, original_time_embedding=False)
        mine = own(class_labels=[1, 2], latents=z, guidance=guidance, guidance_scale=3.0, output_type="np", **common).images
        with mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", return_value=z), attach(pipe, guidance):
            return mine, pipe([1, 2], guidance_scale=3.0, output_type="np", **common).images
    common |= {"prompt": ["a red seven", "a blue cat"], "height": side, "width": side, "output_type": "latent"}
    scale = 1.0 if family == "flux" else 3.0
    mine = own(latents=z, guidance=guidance, guidance_scale=scale, generator=seed(), **common).images
    extra = {"use_resolution_binning": False, "clean_caption": False} if family in ("pixart_alpha", "pixart_sigma", "sana") else {}
    with attach(pipe, guidance):
        if family == "flux":
            return mine, unpack(pipe(latents=pack(z), guidance_scale=3.5, **common).images, 4)
        return mine, pipe(latents=z, guidance_scale=scale, generator=seed(), **common, **extra).images


@functools.cache
def unguided(family):
    return both(family, Guidance())[0]


def assert_same(mine, theirs):
    """To 1e-6 of the largest value: some of these random networks give numbers in the hundreds."""
    mine, theirs = torch.as_tensor(mine), torch.as_tensor(theirs)
    size = max(1.0, float(mine.abs().max()))
    torch.testing.assert_close(theirs / size, mine / size, **SAME)


@pytest.mark.parametrize("guidance", [RED, SMALL + Push(after=0.1, pull=0.5)], ids=["image", "latent and after"])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_attached_is_the_own_loop(family, guidance):
    mine, theirs = both(family, guidance)
    assert_same(mine, theirs)
    assert np.abs(np.asarray(mine) - np.asarray(unguided(family))).max() > 1e-3


SCHEDULERS = [
    "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler",
]  # fmt: skip


def in_double_precision(family, scheduler, guidance):
    """Both samplers in float64, where rounding of the random networks does not grow along the run."""
    pipe = tiny.pipeline(family).to(torch.float64)
    pipe.scheduler = scheduler
    denoiser = Denoiser.of(pipe)
    shape = denoiser.latent_shape(16, 16)
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser.set_timesteps(scheduler, STEPS, shape)
    x = z * getattr(scheduler, "init_noise_sigma", 1.0)
    cond, seed = denoiser.condition(["a red seven", "a blue cat"]), lambda: torch.Generator().manual_seed(1)
    with torch.no_grad():
        mine = sample(denoiser, scheduler, x, cond, guidance=guidance, guidance_scale=3.0, generator=seed())
    arguments = {"prompt": ["a red seven", "a blue cat"], "height": 16, "width": 16, "latents": z, "generator": seed()}
    return mine, stock(family, guidance, pipe, **arguments)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_of_stable_diffusion(name):
    """Prediction types take turns; each sampler has each of them in `test_every_scheduler`."""
    prediction_type = ("epsilon", "v_prediction")[SCHEDULERS.index(name) % 2]
    config = tiny.SCHEDULE | {"prediction_type": prediction_type} | ({"clip_sample": False} if name.startswith("DD") else {})
    scheduler = getattr(diffusers, name)(**config)
    assert_same(*in_double_precision("stable_diffusion", scheduler, RED + Push(before=0.01, after=0.02)))


def test_heun_of_flow_matching():
    assert_same(*in_double_precision("sd3", diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), RED))


# Every scheduler, on an analytic denoiser


class Loop(DiffusionPipeline):
    """The loop that stock pipelines have, over an exact denoiser of Gaussian data."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.denoiser = GaussianDenoiser(*MODEL, kind=kind_of(scheduler))

    @torch.no_grad()
    def __call__(self, x):
        scheduler = self.scheduler
        if len(set(scheduler.timesteps[:2].tolist())) == 1:
            scheduler.set_begin_index(0)  # or the host looks the first timestep up, and begins at the second entry
        for i, (level, t) in enumerate(zip(levels_of(scheduler), scheduler.timesteps, strict=True)):
            seen = x
            if hasattr(scheduler, "scale_model_input"):
                unit = copy.deepcopy(scheduler).scale_model_input(torch.ones(1, dtype=x.dtype), t)
                seen = scheduler.scale_model_input(torch.cat([x, x]), t)[: len(x)] / unit
            output = model_output(scheduler, self.denoiser(seen, level))
            optional = {"prev_timestep": (*scheduler.timesteps, None)[i + 1], "eta": 0.0}
            optional = {k: v for k, v in optional.items() if k in inspect.signature(scheduler.step).parameters}
            x = scheduler.step(output, t, x, **optional, return_dict=False)[0]
        return x


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_scheduler(case):
    """The level of each evaluation, the conversion and the three sites, with the host's own counting of steps."""
    guidance = Push(after=0.02, pull=0.1) + Push(before=0.01)
    if not hasattr(case.make(8), "scale_model_input"):
        guidance = Push(after=0.02, pull=0.1) + Push(before=0.01).between(0.1, 1)
    results = []
    for attached in (False, True):
        scheduler = case.make(8)
        generator = torch.Generator().manual_seed(0)
        x = torch.tensor([[0.0], [1.0], [-0.5]], dtype=torch.float64) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        with noise_of(scheduler, lambda shape, g=generator: torch.randn(shape, generator=g, dtype=torch.float64)):
            if attached:
                pipe = Loop(scheduler)
                with attach(pipe, guidance):
                    results.append(pipe(x))
            else:
                results.append(sample(GaussianDenoiser(*MODEL, kind=kind_of(scheduler)), scheduler, x, guidance=guidance))
    size = max(1.0, float(results[0].abs().max()))
    torch.testing.assert_close(results[1] / size, results[0] / size, **SAME)


def attached_affine(make, n, guidance, scale):
    def run(x):
        pipe = Loop(make(n))
        with attach(pipe, guidance):
            return pipe(x)

    return oracles.affine(run, scale)


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [(DensityRatio(), (0.993405, 0.527625)), (by_order(2, 0), (0.905708, 0.588050)), (by_order(1, 0), (0.764829, 0.704667))],
    ids=["(1,1) is the data", "(2,0)", "(1,0)"],
)
def test_t2_edm(guidance, expected):
    """Table T2 of the guidance paper's setting: Heun, 18 steps; order and level of each evaluation matter."""
    assert attached_affine(edm_heun, 18, guidance, 80.0) == pytest.approx(expected, abs=PRINTED)


def linear_ddim(n):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(n)
    return scheduler


def uniform_flow(n):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, n, endpoint=False))
    return scheduler


@pytest.mark.parametrize(("n", "expected"), [(20, (0.995534, 0.433734)), (50, (0.996370, 0.472439))])
def test_t4_ddim(n, expected):
    assert attached_affine(linear_ddim, n, DensityRatio(), 1.0) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("n", "expected"), [(20, (0.990226, 0.464248)), (50, (0.996038, 0.485397))])
def test_t4_flow(n, expected):
    assert attached_affine(uniform_flow, n, DensityRatio(), 1.0) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_learned_variance_is_split_off_and_put_back(prediction_type):
    def make():
        scheduler = DDPMScheduler(variance_type="learned_range", prediction_type=prediction_type, clip_sample=False)
        scheduler.set_timesteps(STEPS)
        return scheduler

    x, raw, variance = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler, seed = make(), lambda: torch.Generator().manual_seed(1)
    level, t = levels_of(scheduler)[0], scheduler.timesteps[0]
    prediction = Prediction(x, level, raw, kind_of(scheduler), variance)
    shifted = prediction.shifted(0.5 * (0.5 - prediction.x0))
    expected = scheduler.step(torch.cat([shifted.raw, variance], 1), t, x, generator=seed()).prev_sample
    pipe = Loop(make())
    with attach(pipe, Push(pull=0.5)):
        out = pipe.scheduler.step(torch.cat([raw, variance], 1), t, x, generator=seed()).prev_sample
    torch.testing.assert_close(out, expected)


# Nothing where there is nothing to do


class Count:
    """Counts the calls of a network."""

    def __init__(self, pipe):
        self.calls, network = 0, getattr(pipe, "unet", None) or pipe.transformer
        self.handle = network.register_forward_hook(self)

    def __call__(self, *_):
        self.calls += 1


@pytest.mark.parametrize("guidance", [0.0 * RED, EnergyGuidance(redness, 0.0), Guidance(), 0.0 * Push(1.0, 1.0, 1.0)])
@pytest.mark.parametrize("family", ["stable_diffusion", "sd3", "cogvideox"])
def test_weight_zero_changes_no_bit_and_costs_nothing(family, guidance):
    count = Count(pipeline(family))
    bare, calls = stock(family), count.calls
    assert torch.equal(stock(family, guidance), bare)
    assert count.calls == 2 * calls
    count.handle.remove()


# Pipelines that the own loop does not serve


@pytest.mark.parametrize("family", list(STOCK))
def test_stock_pipelines_get_redder(family):
    """One pull of known sign on the decoded picture: a wrong sign, level or form would not do it for every one of them."""

    def colour(guidance):
        images = stock(family, guidance, output_type="pt")
        channels = images.movedim(1 if images.ndim == 4 else 2, 0)
        return float((channels[0] - channels[1:].mean(0)).mean())

    bare = colour(None)
    assert colour(0.0 * RED) == bare
    assert colour(RED) > bare + 1e-4
    assert colour(-1.0 * RED) < bare - 1e-4


def test_a_run_may_begin_in_the_middle():
    look = Look()
    stock("img2img", look, num_inference_steps=8)
    assert [level.t for level, *_ in look.seen] == [level.t for level in levels_of(pipeline("img2img").scheduler)][
        -len(look.seen) :
    ]
    assert look.seen[0][0].index > 0
    assert [level.index for level, *_ in look.seen] == sorted({level.index for level, *_ in look.seen})


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"]
)
def test_levels_of_a_run_that_begins_in_the_middle(name):
    """Of pure noise at the level, the variance of the sample tells sigma."""
    pipe = tiny.pipeline("img2img")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    look = Look()
    stock("img2img", look, pipe, num_inference_steps=10, strength=0.3)
    levels = levels_of(pipe.scheduler)
    assert [level for level, *_ in look.seen] == levels[-len(look.seen) :]
    assert 3 <= len(look.seen) < len(levels) / 2


def test_videos_are_seen_with_channels_first():
    look = Look()
    stock("cogvideox", look)
    assert {shape for _, shape, *_ in look.seen} == {(1, 4, 3, 4, 4)}
    look = Look()
    stock("animatediff", look)
    assert {shape for _, shape, *_ in look.seen} == {(1, 4, 3, 8, 8)}


@pytest.mark.parametrize("family", ["cogvideox", "animatediff"])
def test_image_energies_see_each_frame(family):
    shapes, frames = set(), {"cogvideox": 9, "animatediff": 3}[family]
    calls = []

    def energy(images):
        shapes.add(tuple(images.shape))
        calls.append(1)
        return redness(images)

    stock(family, EnergyGuidance(energy))
    side = {"cogvideox": 32, "animatediff": 16}[family]
    assert shapes == {(1, 3, side, side)}
    assert len(calls) == STEPS * frames


def test_decoded_videos_are_those_of_the_pipeline():
    """What an energy sees at the end is the video that comes out: order of axes, scale and shift of the VAE."""
    for family in ("cogvideox", "animatediff"):
        last = {}

        class Keep(Guidance):
            def after(self, state, x_next, last=last):
                last["video"] = state.decode(x_next)
                return x_next

        frames = stock(family, Keep(), output_type="pt")
        expected = (last["video"].movedim(1, 2) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(expected, frames, rtol=1e-4, atol=1e-4)


# Forms


def test_packed_latents_are_seen_unpacked():
    look = Look()
    out = stock("flux", look + SMALL, height=16, width=32, guidance_scale=3.5)
    assert out.shape == (1, 32, 64)
    assert {shape for _, shape, *_ in look.seen} == {(1, 16, 8, 16)}


def test_packed_latents_of_unknown_size():
    """The network was told no positions: here, since the scheduler is stepped without it."""
    pipe = tiny.pipeline("flux")
    pipe.scheduler.set_timesteps(2, mu=0.5)
    x = torch.randn(1, 32, 64)
    t = pipe.scheduler.timesteps[0]
    with pytest.raises(ValueError, match=r"32 tokens.*height=.*width="), attach(pipe, SMALL):
        pipe.scheduler.step(x, t, x)
    with pytest.raises(ValueError, match=r"height=16 and width=16 have 4 x 4 tokens.*32"), attach(pipe, SMALL, height=16, width=16):
        pipe.scheduler.step(x, t, x)
    look = Look()
    with attach(pipe, look, height=16, width=32):
        pipe.scheduler.step(x, t, x)
    assert look.seen[0][1] == (1, 16, 8, 16)


def test_dit_is_seen_once():
    """Its loop steps the doubled batch; a guidance with a target for each sample must not see it."""
    pipe, look = pipeline("dit"), Look()
    per_sample = EnergyGuidance(lambda images: redness(images) * torch.tensor([1.0, -1.0]))
    with attach(pipe, look + per_sample + Push(before=0.1, after=0.1)):
        pipe([1, 2], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="np")
    assert {shape[0] for _, shape, *_ in look.seen} == {2}
    with attach(pipe, look):
        pipe([1, 2, 3], guidance_scale=1.0, num_inference_steps=STEPS, output_type="np")
    assert look.seen[-1][1][0] == 3


def test_equal_samples_are_not_halves_elsewhere():
    """The same noise and prompt with two targets: two samples, not one."""
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    per_sample = EnergyGuidance(lambda images: redness(images) * torch.tensor([1.0, -1.0]))
    arguments = {"prompt": ["a cat"] * 2, "latents": z}
    out = stock("stable_diffusion", per_sample, **arguments)
    assert not torch.equal(out[0], out[1])
    pipe = pipeline("stable_diffusion")
    with attach(pipe, per_sample + Push(before=0.1), seeds=[3, 4]):
        moved = stock("stable_diffusion", **arguments, guidance_scale=1.0)
    with attach(pipe, per_sample + Push(before=0.1)):
        assert torch.equal(stock("stable_diffusion", **arguments, guidance_scale=1.0), moved)


def test_undecodable_samples():
    pipe = tiny.pipeline("cogvideox")
    pipe.scheduler.set_timesteps(2)
    x = torch.randn(1, 7, 3, 4)
    message = r"\(1, 7, 3, 4\).*AutoencoderKLCogVideoX.*space='latent'"
    with pytest.raises(ValueError, match=message), attach(pipe, RED):
        pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x)
    with attach(pipe, SMALL):
        pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x)


# Site X


def test_the_first_displacement_reaches_the_network_and_the_step():
    """Only the first: the network's input is announced before the pipeline has a batch to step."""
    assert_same(*both("stable_diffusion", Push(before=0.3).between(0, 0)))
    assert_same(*both("sdxl", Push(before=0.3).between(0, 0)))
    bare, moved = (stock("stable_diffusion", g) for g in (Guidance(), Push(before=0.3).between(0, 0)))
    assert (bare - moved).abs().max() > 1e-2


def test_displacement_that_the_pipeline_does_not_announce():
    with pytest.raises(ValueError, match=r"'push' displaces samples.*between"):
        both("ddim", Push(before=0.1))
    assert_same(*both("ddim", Push(before=0.1).between(0.1, 1)))


# Composition and runs


def test_nested_is_the_sum():
    pipe = pipeline("stable_diffusion")
    with attach(pipe, RED):
        outer = type(pipe.scheduler)
        nested = stock("stable_diffusion", SMALL + Push(after=0.1))
        assert type(pipe.scheduler) is outer
        alone = stock("stable_diffusion", None)
    assert torch.equal(nested, stock("stable_diffusion", RED + (SMALL + Push(after=0.1))))
    assert torch.equal(alone, stock("stable_diffusion", RED))


def test_nested_keeps_what_only_the_outer_was_given():
    pipe, states = pipeline("stable_diffusion"), []

    class Keep(Guidance):
        def shift(self, state, prediction):
            states.append((state.cond, state.seeds))

    with attach(pipe, Guidance(), cond=["c"], seeds=[5]), attach(pipe, Keep(), seeds=[6]):
        pipe("a cat", num_inference_steps=1, output_type="latent")
    assert states == [(["c"], [6])] * len(states)
    assert states


def test_each_call_is_a_run():
    pipe, look = tiny.pipeline("stable_diffusion"), Look()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with attach(pipe, look + RED):
        one, two = (stock("stable_diffusion", pipe=pipe) for _ in range(2))
    assert torch.equal(one, two)
    assert [cached for *_, cached in look.seen] == list(range(STEPS)) * 2
    assert [level.index for level, *_ in look.seen] == list(range(STEPS)) * 2


def test_a_function_is_an_energy():
    assert torch.equal(stock("stable_diffusion", redness), stock("stable_diffusion", RED))


# What the scheduler still is


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"]
)
def test_the_scheduler_is_what_it_was(name, tmp_path):
    cls = getattr(diffusers, name)
    pipe = Loop(cls())
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    with attach(pipe, RED):
        assert pipe.scheduler is scheduler
        assert isinstance(scheduler, cls)
        assert type(scheduler).__name__ == name
        assert inspect.signature(scheduler.step) == inspect.signature(cls().step)
        assert inspect.signature(scheduler.set_timesteps) == inspect.signature(cls().set_timesteps)
        assert hasattr(scheduler, "scale_model_input") == hasattr(cls, "scale_model_input")
        assert dict(scheduler.config) == config
        scheduler.save_pretrained(tmp_path)
        others = [
            copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), cls.from_pretrained(tmp_path),
            cls.from_config(scheduler.config), scheduler.from_config(scheduler.config), type(scheduler)(),
        ]  # fmt: skip
        assert [type(other) for other in others] == [cls] * len(others)
        assert all(isinstance(compatible, type) for compatible in scheduler.compatibles)
    assert type(scheduler) is cls
    assert f'"_class_name": "{name}"' in (tmp_path / "scheduler_config.json").read_text()
    assert copy.deepcopy(others[1]).config == scheduler.config


def test_a_pipeline_saved_within_the_block_is_a_stock_one(tmp_path):
    pipe = pipeline("stable_diffusion")
    with attach(pipe, RED):
        pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is type(pipe.scheduler)


def test_restored_after_an_exception():
    pipe = pipeline("stable_diffusion")
    cls, hooks = type(pipe.scheduler), len(pipe.unet._forward_pre_hooks)

    class Fail(Guidance):
        def shift(self, state, prediction):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        stock("stable_diffusion", Fail())
    assert type(pipe.scheduler) is cls
    flux = pipeline("flux")
    with pytest.raises(RuntimeError, match="on purpose"):
        stock("flux", Fail(), height=16, width=16)
    assert len(pipe.unet._forward_pre_hooks) == hooks
    assert not flux.transformer._forward_pre_hooks


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_type_that_step_returns(return_dict):
    pipe = Loop(linear_ddim(STEPS))
    x, t = torch.randn(1, 1), pipe.scheduler.timesteps[0]
    expected = linear_ddim(STEPS).step(x, t, x, return_dict=return_dict)
    with attach(pipe, Push(before=0.1, after=0.2).between(0.0, 0.0)), pytest.raises(ValueError, match="announce"):
        pipe.scheduler.step(x, t, x, return_dict=return_dict)
    with attach(pipe, Push(after=0.2)):
        out = pipe.scheduler.step(model_output=x, timestep=t, sample=x, return_dict=return_dict)
    assert type(out) is type(expected)
    torch.testing.assert_close(out[0], expected[0] + 0.2)
    torch.testing.assert_close(out[1], expected[1])


# Precision and gradient modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pipelines(dtype):
    pipe, look = tiny.pipeline("stable_diffusion").to(dtype), Look()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    out = stock("stable_diffusion", look + EnergyGuidance(smallness, 3.0, space="latent"), pipe)
    assert out.dtype == dtype
    assert {seen for _, _, seen, _ in look.seen} == {torch.float32}
    assert torch.isfinite(out).all()
    assert out.float().square().mean() < stock("stable_diffusion", None, pipe).float().square().mean()


def test_under_inference_mode():
    """A guidance may keep what it sees and differentiate with it later, which inference tensors do not allow."""
    kept = []

    class Keep(Guidance):
        def shift(self, state, prediction):
            kept.append(prediction.x0)
            weight = torch.ones(1, requires_grad=True)
            with torch.enable_grad():
                return torch.autograd.grad((weight * kept[0]).sum(), weight)[0] * 0 + 0.1 * (1 - prediction.x0)

    expected = stock("stable_diffusion", RED + Keep())
    kept.clear()
    with torch.inference_mode():
        out = stock("stable_diffusion", RED + Keep())
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_an_attached_step():
    """Where the caller wants them: the loop of a pipeline without its `no_grad`."""
    x = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    run = functools.partial(inspect.unwrap(Loop.__call__))

    def go(x):
        pipe = Loop(linear_ddim(STEPS))
        with attach(pipe, Push(pull=0.3)):
            return run(pipe, x)

    out = go(x)
    with torch.no_grad():
        moved = go(x + 1)
    assert torch.autograd.grad(out.sum(), x)[0].item() == pytest.approx((moved - out).item(), rel=1e-9)


# Refusals


def test_through_denoiser_needs_the_own_loop():
    for guidance in (EnergyGuidance(redness, route="through_denoiser"), RED + EnergyGuidance(redness, route="through_denoiser")):
        with pytest.raises(ValueError, match="through_denoiser needs GuidedPipeline"):
            stock("stable_diffusion", guidance)
    assert not math.isnan(float(stock("stable_diffusion", EnergyGuidance(smallness, 0.1, "direct", "latent")).sum()))


class Wander(Guidance):
    """Replaces the sample: at the given site, before or after it asks for a prediction."""

    name = "wander"

    def __init__(self, site):
        self.site = site

    def before(self, state):
        if self.site == "before":
            state.x = state.x + 1
        return state.x

    def __call__(self, state, predict):
        if self.site == "first":
            state.x = state.x + 1
        prediction = predict()
        if self.site == "last":
            state.x = state.x + 1
        return prediction


@pytest.mark.parametrize("site", ["before", "first", "last"])
def test_a_guidance_that_replaces_the_sample(site):
    with pytest.raises(ValueError, match="'wander' evaluates the denoiser at another sample"):
        stock("sd3", Wander(site))


def test_recurrence_needs_the_own_loop():
    with pytest.raises(ValueError, match="GuidedPipeline"):
        stock("stable_diffusion", RED.recurrent(2))


def test_offloaded_pipelines():
    pipe = tiny.pipeline("stable_diffusion")
    pipe.enable_sequential_cpu_offload(device="meta")
    with pytest.raises(ValueError, match="offload"), attach(pipe, RED):
        pass


def test_schedulers_of_no_known_family():
    pipe = tiny.pipeline("ddim")
    pipe.scheduler = diffusers.CMStochasticIterativeScheduler()
    with pytest.raises(ValueError, match="CMStochasticIterativeScheduler is not supported"), attach(pipe, RED):
        pass
    assert type(pipe.scheduler) is diffusers.CMStochasticIterativeScheduler


def test_pipelines_without_a_scheduler():
    pipe = pipeline("stable_diffusion")
    with pytest.raises(ValueError, match="CLIPTextModel has no scheduler"), attach(pipe.text_encoder, RED):
        pass


def test_a_scheduler_that_is_replaced_within_the_block():
    pipe = tiny.pipeline("stable_diffusion")
    with pytest.raises(ValueError, match="replaced within the block"), attach(pipe, RED):
        pipe.scheduler = DDIMScheduler()


@pytest.mark.parametrize(
    ("arguments", "message"), [({"seeds": [1, 2, 3]}, "3 seeds.*1 samples"), ({"cond": ["a", "b"]}, "2 conditions.*1 samples")]
)
def test_numbers_of_seeds_and_conditions(arguments, message):
    pipe = pipeline("stable_diffusion")
    with pytest.raises(ValueError, match=message), attach(pipe, RED, **arguments):
        pipe("a cat", num_inference_steps=2, output_type="latent")


def test_levels_of_each_token():
    pipe = Loop(uniform_flow(STEPS))
    x = torch.randn(1, 4, 2)
    with pytest.raises(ValueError, match="level for each token"), attach(pipe, Guidance()):
        pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x, per_token_timesteps=torch.ones(1, 4))


def test_timesteps_outside_of_the_schedule():
    pipe = Loop(linear_ddim(STEPS))
    x = torch.randn(1, 1)
    with pytest.raises(ValueError, match="Timestep 751 is not in the schedule of DDIMScheduler"), attach(pipe, Guidance()):
        pipe.scheduler.step(x, 751, x)


def test_a_step_from_another_sample_than_the_network_saw():
    pipe = Loop(linear_ddim(STEPS))
    x, t = torch.randn(1, 1), pipe.scheduler.timesteps[0]
    with attach(pipe, Push(before=1.0)):
        pipe.scheduler.scale_model_input(x, t)
        with pytest.raises(ValueError, match="another sample than the one it scaled"):
            pipe.scheduler.step(x, t, x + 5)


def test_not_finite_names_step_and_guidance():
    class Spoil(Guidance):
        name = "spoil"

        def shift(self, state, prediction):
            return prediction.x * (math.nan if state.level.index == 2 else 0.0)

    with pytest.raises(FloatingPointError, match=r"Evaluation 3 of 5 .*'spoil'"):
        stock("stable_diffusion", Spoil())
    nan = EnergyGuidance(lambda images: redness(images) * math.nan)
    with pytest.raises(FloatingPointError, match=r"'energy' gave NaN.*evaluation 1 of 5"):
        stock("stable_diffusion", nan)


def test_the_guidance_s_own_error_comes_through():
    with pytest.raises(ValueError, match="one value for each of the 1 samples"):
        stock("stable_diffusion", EnergyGuidance(lambda images: images.sum((1, 2, 3)).expand(2)))
