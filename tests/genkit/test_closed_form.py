"""Guidance on Gaussian and mixture data, where every number is known: T1, T2, T4 to T9 of the guidance spec.

The real loop, the real diffusers schedulers and the real guidance objects run; the tables come from the spec. All of setting G is
affine, so nothing is random here.
"""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from torch import nn

from genkit.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from genkit.guidance import ClassifierEnergy, EluCDEDM, EnergyGuidance, Guidance, State, softplus_activations, temperature_energy
from genkit.levels import Level, levels_of
from genkit.prediction import KINDS
from genkit.sampling import sample
from tests import oracles
from tests.oracles import MODEL, REAL

PRINTED = 5e-6


class DensityRatio(Guidance):
    """Exact discriminator guidance of setting G: c = grad log p_data / p_model."""

    def shift(self, state, prediction):
        return oracles.ratio_gradient(prediction.x, state.level.alpha, state.level.sigma)


class ReusedRatio(DensityRatio):
    """Evaluates at first order, and uses sigma^power * c again in the corrector (power 1: the eps shift, 0: the score shift)."""

    def __init__(self, power: int) -> None:
        self.power = power

    def shift(self, state, prediction):
        unit = state.level.sigma**self.power
        if state.level.order == 1:
            state.cache[self] = super().shift(state, prediction) * unit
        return state.cache[self] / unit


class MissingChainFactor(DensityRatio):
    """The bug of taking the gradient at z = x / sqrt(1 + sigma^2) for the one at x."""

    def shift(self, state, prediction):
        return super().shift(state, prediction) * state.level.norm


def by_order(first: float, second: float) -> Guidance:
    """DG (first, second): a weight for Euler slopes and one for Heun corrections."""
    return DensityRatio().scheduled(lambda state: (first, second)[state.level.order - 1])


# T1: guided = data, for every parameterisation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "level",
    [
        Level(1.0, 0.002, 0), Level(1.0, 1.0, 0), Level(1.0, 80.0, 0), Level(0.6, 0.8, 0), Level(0.01, (1 - 1e-4) ** 0.5, 0),
        Level(0.7, 0.3, 0), Level(0.5, 0.5, 0), Level(0.05, 0.95, 0),
    ],
    ids=lambda level: f"{level.alpha:g}-{level.sigma:g}",
)  # fmt: skip
def test_t1_guided_model_is_the_data(kind, level):
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    model, data = (GaussianDenoiser(*setting, kind=kind)(x, level) for setting in (MODEL, REAL))
    guided = model.shifted(oracles.ratio_gradient(x, level.alpha, level.sigma))
    # Relative to the largest coefficient of the kind: v and flow divide by alpha.
    scale = max(1.0, float(data.raw.abs().max()), float(model.raw.abs().max()))
    torch.testing.assert_close(guided.raw / scale, data.raw / scale, rtol=0, atol=1e-10)
    for other in ("eps", "x0", "v", "flow", "score"):
        expected, got = getattr(data, other), getattr(guided, other)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(
    ("t", "x", "u_model", "c", "u_data"), [(0.3, 0.3, -0.555996, 1.585029, -1.235294), (0.5, -0.8, -1.082927, 1.477073, -2.56)]
)
def test_t1_flow_numbers(t, x, u_model, c, u_data):
    level, x = Level(1 - t, t, t), torch.tensor([[x]], dtype=torch.float64)
    model = GaussianDenoiser(*MODEL, kind="flow")(x, level)
    shift = oracles.ratio_gradient(x, level.alpha, level.sigma)
    assert model.raw.item() == pytest.approx(u_model, abs=PRINTED)
    assert shift.item() == pytest.approx(c, abs=PRINTED)
    assert model.shifted(shift).raw.item() == pytest.approx(u_data, abs=PRINTED)


# T2: the EDM sampler


def edm_heun(n: int) -> HeunDiscreteScheduler:
    """Karras et al. 2022, algorithm 1, on their schedule: rho 7, sigma 80 to 0.002, then 0."""
    scheduler = HeunDiscreteScheduler(use_karras_sigmas=True)
    # `_convert_to_karras` reads these two from the config, where this class does not put them itself.
    scheduler.register_to_config(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(n)
    return scheduler


def edm_euler(n: int) -> EDMEulerScheduler:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(n)
    return scheduler


def edm(n: int, setting=MODEL, guidance=None, make=edm_heun, kind="eps"):
    denoiser = GaussianDenoiser(*setting, kind=kind)
    return oracles.affine(lambda x: sample(denoiser, make(n), x, guidance=guidance), 80.0)


@pytest.mark.parametrize("n", [18, 36, 256])
def test_t2_schedule(n):
    sigmas = [level.sigma for level in levels_of(edm_heun(n))]
    np.testing.assert_allclose(sigmas[::2], oracles.karras_sigmas(n), rtol=1e-6)
    np.testing.assert_allclose(sigmas[1::2], sigmas[2::2], rtol=0)
    np.testing.assert_allclose([level.sigma for level in levels_of(edm_euler(n))], oracles.karras_sigmas(n), rtol=1e-6)


T2 = {
    "data": ({"setting": REAL}, [(0.993405, 0.527625), (0.993674, 0.506097), (0.993749, 0.500095)]),
    "unguided": ({}, [(0.593713, 0.838309), (0.593936, 0.808472), (0.593999, 0.800110)]),
    "DG (2,0)": ({"guidance": by_order(2, 0)}, [(0.905708, 0.588050), (0.958386, 0.533793), (0.989597, 0.503687)]),
    "DG (1,0)": ({"guidance": by_order(1, 0)}, [(0.764829, 0.704667), (0.799340, 0.658415), (0.821570, 0.635067)]),
    "reuse eps units": ({"guidance": ReusedRatio(1)}, [(0.971028, 0.557675), (0.985599, 0.519091), (0.992873, 0.501720)]),
    "reuse raw c": ({"guidance": ReusedRatio(0)}, [(0.885783, 0.625299), (0.944285, 0.554050), (0.987251, 0.506749)]),
    "DG (1,1), tau >= .01": (
        {"guidance": DensityRatio().scheduled(lambda state: float(state.level.sigma >= oracles.sigma_of_tau(0.01)))},
        [(0.992963, 0.528508), (0.993049, 0.507299), (0.993085, 0.501357)],
    ),
    "Euler, DG": (
        {"guidance": DensityRatio(), "make": edm_euler},
        [(0.994712, 0.423031), (0.994238, 0.460996), (0.993819, 0.494445)],
    ),
    "bug: chain factor missing": ({"guidance": MissingChainFactor()}, [(1.548934, 0.423084), (1.573725, 0.396621)]),
    "bug: sign flipped": ({"guidance": -1.0 * DensityRatio()}, [(-0.155627, 1.343771), (-0.141827, 1.294645)]),
}


@pytest.mark.parametrize(
    ("row", "n", "expected"), [(row, n, e) for row, (_, cells) in T2.items() for n, e in zip((18, 36, 256), cells, strict=False)]
)
def test_t2_table(row, n, expected):
    assert edm(n, **T2[row][0]) == pytest.approx(expected, abs=PRINTED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [18, 36, 256])
def test_t2_dg_1_1_is_the_data_denoiser(n, kind):
    assert edm(n, guidance=by_order(1, 1), kind=kind) == pytest.approx(edm(n, REAL), abs=1e-12)


def test_t2_euler_guided_is_data():
    assert edm(18, guidance=DensityRatio(), make=edm_euler) == pytest.approx(edm(18, REAL, make=edm_euler), abs=PRINTED)


# T4: variance-preserving and flow


def ddim(n: int) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True
    )
    scheduler.set_timesteps(n)
    return scheduler


def flow_euler(n: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n).tolist())
    return scheduler


def vp_or_flow(make, n, setting=MODEL, guidance=None, kind="eps"):
    denoiser = GaussianDenoiser(*setting, kind=kind)
    return oracles.affine(lambda x: sample(denoiser, make(n), x, guidance=guidance), 1.0)


@pytest.mark.parametrize(("n", "expected"), [(20, (0.995534, 0.433734)), (50, (0.996370, 0.472439)), (250, (0.996763, 0.494286))])
def test_t4_ddim(n, expected):
    assert vp_or_flow(ddim, n, REAL) == pytest.approx(expected, abs=PRINTED)
    assert vp_or_flow(ddim, n, guidance=DensityRatio()) == pytest.approx(vp_or_flow(ddim, n, REAL), abs=1e-10)


def test_t4_ddim_unguided():
    assert vp_or_flow(ddim, 50) == pytest.approx((0.596460, 0.767772), abs=PRINTED)


@pytest.mark.parametrize("kind", ["flow", "x0"])
@pytest.mark.parametrize(("n", "expected"), [(20, (0.990226, 0.464248)), (50, (0.996038, 0.485397)), (200, (0.999002, 0.496309))])
def test_t4_flow_euler(n, expected, kind):
    # At t = 1 the sample holds no signal; `Prediction.shifted` leaves these kinds alone there.
    assert vp_or_flow(flow_euler, n, guidance=DensityRatio(), kind=kind) == pytest.approx(expected, abs=PRINTED)
    assert vp_or_flow(flow_euler, n, REAL, kind=kind) == pytest.approx((1.0, expected[1]), abs=PRINTED)


# T5: adding c to the mean of an ancestral step is not exact


def ancestral(n: int) -> DDPMScheduler:
    scheduler = DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="linspace",
        variance_type="fixed_large",
    )
    # The host's float32 table costs 5e-6 in 1,000 steps.
    scheduler.alphas_cumprod = torch.from_numpy(oracles.linear_abar())
    scheduler.set_timesteps(n)
    return scheduler


class MeanShift(DensityRatio):
    """mu += beta c, or with the posterior variance for beta: what guided-diffusion does (Dhariwal & Nichol 2021)."""

    def __init__(self, posterior: bool) -> None:
        self.posterior = posterior

    def shift(self, state, prediction):
        return None

    def after(self, state: State, x_next):
        here, following = state.level, state.levels[state.level.index + 1 :]
        abar, abar_next = here.alpha**2, following[0].alpha ** 2 if following else 1.0
        variance = 1 - abar / abar_next
        if self.posterior:
            variance *= (1 - abar_next) / (1 - abar)
        return x_next + variance * oracles.ratio_gradient(state.x, here.alpha, here.sigma)


def stochastic(scheduler, denoiser, guidance=None) -> tuple[float, float]:
    """Mean and std of an affine stochastic sampler started at N(0, 1), from its response to each single unit of noise."""
    steps = len(scheduler.timesteps)
    responses = torch.zeros(steps + 2, 1, dtype=torch.float64)  # row 0: no noise at all; row 1: x_T = 1; row 2 + i: noise of step i
    responses[1] = 1.0
    rows = iter(range(2, steps + 2))

    def impulse(shape, **_):
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[next(rows)] = 1.0
        return noise

    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", impulse):
        out = sample(denoiser, scheduler, responses, guidance=guidance)[:, 0]
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


T5 = {
    "data": ([(0.99999, 0.517574), (0.99999, 0.503334), (0.99999, 0.500752)], REAL, None),
    "eps shift": ([(0.99999, 0.517574), (0.99999, 0.503334), (0.99999, 0.500752)], MODEL, DensityRatio()),
    "mu + beta c": ([(0.989562, 0.522631), (0.997950, 0.504357), (0.999483, 0.501007)], MODEL, MeanShift(False)),
    "mu + posterior variance c": ([(0.928515, 0.596262), (0.984231, 0.522669), (0.995870, 0.505993)], MODEL, MeanShift(True)),
}


@pytest.mark.parametrize(
    ("row", "n", "expected"), [(row, n, e) for row, cells in T5.items() for n, e in zip((50, 250, 1000), cells[0], strict=True)]
)
def test_t5_ancestral(row, n, expected):
    _, setting, guidance = T5[row]
    mean, std = stochastic(ancestral(n), GaussianDenoiser(*setting), guidance)
    # The spec prints the mean of the first rows to five digits.
    assert mean == pytest.approx(expected[0], abs=1e-5 if expected[0] == 0.99999 else PRINTED)
    assert std == pytest.approx(expected[1], abs=PRINTED)


# T6: a classifier of a mixture, along three gradient routes

MIXTURE = GaussianMixtureDenoiser([-1.0, 1.0], 0.5)
PLUS = 1
T6 = [  # sigma, x, exact, x0, clean classifier's gradient at x0, J, through the denoiser
    (1.0, 0.0, 0.8, 0.0, 4.0, 0.84, 3.36),
    (1.0, 0.7, 0.393618, 0.546382, 0.099841, 0.674854, 0.067378),
    (2.0, -1.3, 0.305103, -0.355705, 7.560743, 0.260784, 1.971720),
]


def log_class(x, level):
    """log p(+ | x) up to a constant, at any level."""
    return MIXTURE.log_density(x, level, MIXTURE.condition([PLUS] * len(x))) - MIXTURE.log_density(x, level)


def clean_log_class(x):
    return log_class(x, Level(1.0, 0.0, 0))


def gradient_of(guidance: EnergyGuidance, x: float, level: Level) -> tuple[float, float]:
    """(bare gradient, shift) of a guidance at x."""
    state = State(torch.tensor([[x]], dtype=torch.float64), level, [level])
    leaf = state.x.clone().requires_grad_(guidance.needs_graph)
    prediction = MIXTURE(leaf, level)
    return guidance.gradient(state, MIXTURE(leaf, level)).item(), guidance.shift(state, prediction).item()


@pytest.mark.parametrize(("sigma", "x", "exact", "x0", "clean", "jacobian", "through"), T6)
def test_t6_three_routes(sigma, x, exact, x0, clean, jacobian, through):
    level = Level(1.0, sigma, 0)
    assert MIXTURE(torch.tensor([[x]], dtype=torch.float64), level).x0.item() == pytest.approx(x0, abs=PRINTED)

    direct = EnergyGuidance(log_class, route="direct")
    assert gradient_of(direct, x, level)[1] == pytest.approx(exact, abs=PRINTED)

    detached = EnergyGuidance(clean_log_class, route="x0_detached")
    bare, shift = gradient_of(detached, x, level)
    assert bare == pytest.approx(clean, abs=PRINTED)
    assert shift == pytest.approx(bare * 0.25 / (0.25 + sigma**2), rel=1e-9)

    graph = EnergyGuidance(clean_log_class, route="through_denoiser")
    bare_through, shift_through = gradient_of(graph, x, level)
    assert shift_through == pytest.approx(through, abs=PRINTED)
    assert bare_through / bare == pytest.approx(jacobian, abs=PRINTED)


@pytest.mark.parametrize(("sigma", "x"), [(1.0, 0.0), (1.0, 0.7), (2.0, -1.3), (0.1, 0.4)])
def test_t6_guided_mixture_is_the_class(sigma, x):
    level, x = Level(1.0, sigma, 0), torch.tensor([[x]], dtype=torch.float64)
    state = State(x, level, [level])
    guided = EnergyGuidance(log_class, route="direct")(state, lambda grad=False: MIXTURE(x, level))
    expected = MIXTURE(x, level, MIXTURE.condition([PLUS]))
    torch.testing.assert_close(guided.x0, expected.x0, rtol=0, atol=1e-10)


# T7 to T9: the parts of EluCD


@pytest.mark.parametrize(
    ("tau1", "tau2", "gradient", "value"),
    [
        (1, 1, 0.143890, -0.018150), (1, 0.5, 1.476812, -0.376928), (1, 0.3, 1.955541, -0.613282),
        (1, 0, 2.0, -1.193147), (0.5, 0.5, 0.476812, -0.126928),
    ],
)  # fmt: skip
def test_t7_temperatures(tau1, tau2, gradient, value):
    x = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    logits = -((x[:, None] - torch.tensor([-1.0, 1.0])) ** 2) / 0.5
    energy = temperature_energy(logits, torch.tensor([1]), tau1, tau2)
    assert energy.item() == pytest.approx(value, abs=PRINTED)
    assert torch.autograd.grad(energy.sum(), x)[0].item() == pytest.approx(gradient, abs=PRINTED)


@pytest.mark.parametrize(("beta", "at", "minus", "slope"), [(3, 0.567138, 0.067138, 0.817574), (5, 0.515778, 0.015778, 0.924142)])
def test_t8_softplus(beta, at, minus, slope):
    shared = nn.ReLU()
    network = nn.Sequential(shared, nn.Sequential(nn.Identity(), nn.Identity()))
    x = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    with softplus_activations(network, beta) as count:
        y = network(x)
    assert count == 1
    assert y.tolist() == pytest.approx([at, minus], abs=PRINTED)
    assert torch.autograd.grad(y[0], x)[0][0].item() == pytest.approx(slope, abs=PRINTED)
    assert network[0] is shared
    assert torch.equal(network(x), x.relu())


class QuadraticClassifier(nn.Module):
    """Logits (B, 2) -|x - m_k|^2 / 2 of images."""

    def forward(self, x):
        return torch.stack([-((x - m) ** 2).flatten(1).sum(1) / 2 for m in (-1.0, 1.0)], dim=1)


NUDGES = [4.000, 4.007, 3.978, 3.880, 3.687, 3.382, 2.959, 2.425, 1.796, 1.098]


@pytest.mark.parametrize(("n", "total"), [(10, 0.031213), (18, 0.053506), (36, 0.103376)])
def test_t9_state_nudge(n, total):
    guidance = EluCDEDM(ClassifierEnergy(QuadraticClassifier(), 1, tau2=0.0), m=0.004, gamma=0.3)
    levels = levels_of(edm_heun(n))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.tensor([0.3, 1, 5, 80]).view(4, 1, 1, 1)
    strengths = []
    for level in levels:
        nudged = guidance.before(State(x, level, levels))
        if level.order == 2:
            assert nudged is x
            continue
        ratio = (nudged - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        assert ratio.tolist() == pytest.approx([ratio[0].item()] * 4, rel=1e-9)
        alone = guidance.before(State(x[2:3], level, levels))
        torch.testing.assert_close(alone, nudged[2:3], rtol=1e-12, atol=1e-12)
        strengths.append(ratio[0].item())
    assert math.fsum(strengths) == pytest.approx(total, abs=5e-7)
    if n == 10:
        assert [1e3 * r for r in strengths] == pytest.approx(NUDGES, abs=5e-4)
