"""The sampling loop and `model_output`: the host's step gets exactly what it would have got, for every scheduler and every kind."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UnCLIPScheduler,
)

from genkit import _host
from genkit.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from genkit.guidance import Guidance
from genkit.levels import kind_of, levels_of
from genkit.noise import generators
from genkit.prediction import KINDS, Prediction
from genkit.sampling import model_output, sample
from tests.genkit.test_levels import STEPS, raw_prediction
from tests.oracles import MODEL, REAL
from tests.schedulers import CASES, Case, maker, noise_of

BY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def run(case: Case, n: int, denoiser, x=None, noise=None, **arguments):
    """A run of n steps in float64, from x (B, 1) in units of the initial standard deviation."""
    scheduler = case.make(n)
    x = torch.tensor([[0.0], [1.0], [-0.5]], dtype=torch.float64) if x is None else x
    generator = torch.Generator().manual_seed(0)
    draw = noise or (lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64))
    with noise_of(scheduler, draw):
        return sample(denoiser, scheduler, x * float(getattr(scheduler, "init_noise_sigma", 1.0)), **arguments)


# model_output


@BY_CASE
def test_round_trip(case: Case):
    """step(model_output(prediction)) = step(raw), whatever kind the prediction is turned into on the way."""
    scheduler, generator = case.make(STEPS), torch.Generator().manual_seed(0)
    _host.begin(scheduler)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    for level, t in zip(levels_of(scheduler), scheduler.timesteps, strict=True):
        raw = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        prediction = raw_prediction(scheduler, x, level, raw)
        outcomes = []
        for kind in (prediction.kind, *KINDS):
            if level.alpha == 0 and kind in ("eps", "x0") and kind != prediction.kind:
                continue  # the sample is pure noise: eps is x, and says nothing about x0 (nor x0 about eps)
            fresh = copy.deepcopy(scheduler)
            output = model_output(fresh, prediction.to(kind))
            with noise_of(fresh, lambda shape: torch.full(shape, 0.5)):
                outcomes.append(fresh.step(output, t, x).prev_sample)
        with noise_of(scheduler, lambda shape: torch.full(shape, 0.5)):
            expected = scheduler.step(raw, t, x).prev_sample
        scale = max(1.0, float(x.abs().max()), float(expected.abs().max())) / min(1.0, level.alpha or 1.0)
        for outcome in outcomes:
            assert (outcome - expected).abs().max() < 1e-5 * scale
        x = expected.double() / max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_learned_variance_goes_through(variance_type, prediction_type):
    scheduler = DDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    level, t = levels_of(scheduler)[3], scheduler.timesteps[3]
    x, raw, variance = torch.randn(3, 2, 4, 4, 4).double().unbind()
    variance = variance.abs()
    output = model_output(scheduler, Prediction(x, level, raw, kind_of(scheduler), variance))
    torch.testing.assert_close(output, torch.cat([raw, variance], dim=1))
    scheduler.step(output, t, x)


def test_schedulers_that_ignore_a_learned_variance_do_not_get_it():
    """DPM-Solvers take `output[:, :3]`, which is wrong for latents: what they get is the prediction alone."""
    x, raw, variance = torch.randn(3, 2, 4, 4, 4).double().unbind()
    for scheduler in (DPMSolverMultistepScheduler(variance_type="learned_range"), DDIMScheduler(), EulerDiscreteScheduler()):
        scheduler.set_timesteps(STEPS)
        output = model_output(scheduler, Prediction(x, levels_of(scheduler)[0], raw, "eps", variance))
        assert torch.equal(output, raw)


# Parametrisation


@BY_CASE
def test_the_kind_of_the_denoiser_does_not_matter(case: Case):
    # Pure-noise samples (alpha = 0) determine eps but not x0, and the other way round.
    kinds = [kind for kind in KINDS if kind != "eps" or levels_of(case.make(STEPS))[0].alpha > 0]
    results = [run(case, STEPS, GaussianDenoiser(*REAL, kind=kind)) for kind in kinds]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "types"),
    [
        ("DDIMScheduler", {"clip_sample": False}, ["epsilon", "sample", "v_prediction"]),
        ("DDPMScheduler", {"clip_sample": False}, ["epsilon", "sample", "v_prediction"]),
        ("LCMScheduler", {"clip_sample": False}, ["epsilon", "sample", "v_prediction"]),
        ("TCDScheduler", {}, ["epsilon", "sample", "v_prediction"]),
        ("DPMSolverMultistepScheduler", {}, ["epsilon", "sample", "v_prediction"]),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, ["epsilon", "sample", "flow_prediction"]),
        ("DPMSolverSinglestepScheduler", {}, ["epsilon", "sample", "v_prediction"]),
        ("UniPCMultistepScheduler", {}, ["epsilon", "sample", "v_prediction"]),
        ("DEISMultistepScheduler", {}, ["epsilon", "sample", "v_prediction"]),
        ("SASolverScheduler", {}, ["epsilon", "sample", "v_prediction"]),
        ("EulerDiscreteScheduler", {}, ["epsilon", "sample", "v_prediction"]),
        ("EulerAncestralDiscreteScheduler", {}, ["epsilon", "v_prediction"]),
        ("HeunDiscreteScheduler", {}, ["epsilon", "sample", "v_prediction"]),
        ("LMSDiscreteScheduler", {}, ["epsilon", "sample", "v_prediction"]),
        ("KDPM2DiscreteScheduler", {}, ["epsilon", "v_prediction"]),
        ("KDPM2AncestralDiscreteScheduler", {}, ["epsilon", "v_prediction"]),
        ("DPMSolverSDEScheduler", {}, ["epsilon", "v_prediction"]),
        ("EDMEulerScheduler", {}, ["epsilon", "v_prediction"]),
        ("EDMDPMSolverMultistepScheduler", {}, ["epsilon", "v_prediction"]),
    ],
)
def test_the_prediction_type_of_the_scheduler_does_not_matter(name, config, types):
    """All but PNDM, which averages its outputs over several levels before it converts them."""
    results = [run(Case("", "", maker(name, prediction_type=p, **config), None), STEPS, GaussianDenoiser(*REAL)) for p in types]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


# Convergence


def mean_and_std(case: Case, n: int, denoiser, **arguments) -> tuple[float, float]:
    """Of an affine sampler, from its response to each unit of noise: row 0 has none, row 1 the initial one, row 2 + i draw i."""
    rows = 2 + 2 * n
    x = torch.zeros(rows, 1, dtype=torch.float64)
    x[1] = 1.0
    draws = iter(range(2, rows))

    def impulse(shape):
        noise = torch.zeros(rows, 1, dtype=torch.float64)
        noise[next(draws)] = 1.0
        return noise

    out = run(case, n, denoiser, x, impulse, **arguments)[:, 0]
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


# The prediction type makes no difference (above), so one of each is enough.
ONE_TYPE = list({case.label: case for case in CASES if not case.consistency}.values())


@pytest.mark.parametrize("case", ONE_TYPE, ids=lambda case: case.name)
def test_converges_to_the_data(case: Case):
    # 250 divides 1,000: with "trailing" spacing DDIM's own idea of the previous timestep is wrong otherwise. First-order samplers
    # are 1 to 3 % off here, and some schedules start at a sigma of 15, which costs 2 % of the mean.
    assert mean_and_std(case, 250, GaussianDenoiser(*REAL, kind="x0")) == pytest.approx(REAL, abs=0.05)


# The loop


class Count:
    """Counts what passes."""

    def __init__(self, denoiser) -> None:
        self.calls = 0
        denoiser.network.register_forward_hook(self)

    def __call__(self, *_) -> None:
        self.calls += 1


def euler(n: int = STEPS) -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(n)
    return scheduler


def test_one_evaluation_an_entry():
    denoiser, scheduler = GaussianDenoiser(*REAL), HeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    count = Count(denoiser)
    sample(denoiser, scheduler, torch.randn(2, 1))
    assert count.calls == len(scheduler.timesteps) == 2 * STEPS - 1


def test_starts_at_the_first_sigma():
    """Sigmas beyond those of training have the last timestep; looked up by it, the run would start at the second."""
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(sigmas=[80.0, 40.0, 5.0, 1.0, 0.0])
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    point = GaussianDenoiser(1.0, 0.0)  # of a single point every Euler path is straight
    seen = []
    sample(point, scheduler, torch.tensor([[81.0]]), on_step=lambda state, prediction, x_next: seen.append(x_next.item()))
    assert seen == pytest.approx([41, 6, 2, 1])


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, LMSDiscreteScheduler])
def test_schedulers_do_not_complain_about_the_input(cls, caplog, recwarn):
    scheduler = cls()
    scheduler.set_timesteps(5)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    sample(GaussianDenoiser(*REAL), scheduler, torch.randn(1, 1))
    logger.removeHandler(caplog.handler)
    assert "scale_model_input" not in caplog.text + " ".join(str(w.message) for w in recwarn)


def test_unclip_is_told_where_to_go():
    scheduler = UnCLIPScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    seen = []
    step = scheduler.step

    def spy(output, t, x, prev_timestep=None, generator=None, return_dict=True):
        seen.append(None if prev_timestep is None else int(prev_timestep))
        return step(output, t, x, prev_timestep=prev_timestep, generator=generator, return_dict=return_dict)

    scheduler.step = spy
    sample(GaussianDenoiser(*REAL), scheduler, torch.randn(1, 1))
    assert seen == [*scheduler.timesteps[1:].tolist(), None]


def test_eta_reaches_ddim():
    def go(eta):
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS)
        return sample(GaussianDenoiser(*REAL), scheduler, torch.ones(2, 1), eta=eta, generator=torch.Generator().manual_seed(0))

    assert torch.equal(go(0.0)[0], go(0.0)[1])
    assert not torch.equal(go(1.0)[0], go(1.0)[1])


def test_generators_make_rows_independent_of_the_batch():
    def go(seeds):
        scheduler = DDPMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS)
        return sample(GaussianDenoiser(*REAL), scheduler, torch.ones(len(seeds), 3, 4, 4), generator=generators(seeds))

    torch.testing.assert_close(go([3, 7, 1])[1:2], go([7]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    out = sample(GaussianDenoiser(*REAL), euler(), torch.zeros(1, 1, dtype=dtype))
    assert out.item() == pytest.approx(1.0, abs=0.02)
    assert out.dtype == torch.promote_types(dtype, torch.float32)


def test_classes_and_classifier_free_guidance():
    denoiser = GaussianMixtureDenoiser([-1.0, 1.0], 0.1)
    x = torch.tensor([[0.1], [0.1]]) * euler().init_noise_sigma
    cond = denoiser.condition([0, 1])
    out = sample(denoiser, euler(100), x, cond)
    assert out[:, 0].tolist() == pytest.approx([-1, 1], abs=0.2)
    prediction = [denoiser(x, levels_of(euler())[2], cond, guidance_scale=w).raw for w in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(prediction[2], prediction[0] + 3 * (prediction[1] - prediction[0]))


def test_gradients_flow_through_the_sampler():
    x = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    out = sample(GaussianDenoiser(*REAL), scheduler, x)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        moved = sample(GaussianDenoiser(*REAL), scheduler, x + 1)
    assert torch.autograd.grad(out.sum(), x)[0].item() == pytest.approx((moved - out).item(), rel=1e-9)


def test_on_step_sees_and_replaces():
    indices = []

    def on_step(state, prediction, x_next):
        indices.append(state.level.index)
        assert torch.equal(prediction.x, state.x)
        return torch.zeros_like(x_next) if state.level.index == STEPS - 1 else None

    out = sample(GaussianDenoiser(*REAL), euler(), torch.ones(2, 1), on_step=on_step)
    assert indices == list(range(STEPS))
    assert torch.equal(out, torch.zeros(2, 1))


def test_interrupted():
    seen = []
    arguments = {"on_step": lambda *_: seen.append(1), "interrupted": lambda: len(seen) == 3}
    sample(GaussianDenoiser(*REAL), euler(), torch.ones(1, 1), **arguments)
    assert len(seen) == 3


class Spoil(Guidance):
    name = "spoil"

    def shift(self, state, prediction):
        c = torch.zeros_like(prediction.x)
        c[1] = float("nan") if state.level.index == 2 else 0.0
        return c


def test_not_finite_names_step_and_guidance():
    with pytest.raises(FloatingPointError, match=r"Evaluation 3 of 10 .*guidance 'spoil'.* for 1 of 3 samples"):
        sample(GaussianDenoiser(*REAL), euler(), torch.randn(3, 1), guidance=Spoil())
    with pytest.raises(FloatingPointError, match=r"Evaluation 1 of 10 .*the model alone"):
        sample(GaussianDenoiser(*MODEL), euler(), torch.full((1, 1), float("inf")))
