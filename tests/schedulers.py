"""Every scheduler family of diffusers that genkit claims to understand, and the clean sample that each computes itself.

`CASES` lists scheduler factories with a reader each. A reader calls the host's own `step` and returns the next sample with the
host's own idea of "x0" or "eps" there, from its output, from its internal conversion, or solved from the step it took.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import torch
from torch import Tensor

Read = tuple[Tensor, str, Tensor]  # next sample, "x0" or "eps", its value by the host
EPS, X0, V, FLOW = "epsilon", "sample", "v_prediction", "flow_prediction"


class Case(NamedTuple):
    """A scheduler configuration."""

    label: str  # without the prediction type
    name: str
    make: Callable[[int], Any]  # number of steps -> scheduler, ready to step
    read: Callable[[Any, Tensor, Tensor, Tensor, int], Read]  # (scheduler, output, t, x, index)
    stochastic: bool = False
    consistency: bool = False  # every step jumps to x0: it does not converge for a denoiser that is no consistency function


def scheduler_class(name: str) -> Any:
    """A scheduler class by name. Those that need torchsde for their noise get an empty module in its place; tests set the noise."""
    if name not in ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"):
        return getattr(diffusers, name)
    module = {"DPMSolverSDEScheduler": "dpmsolver_sde", "CosineDPMSolverMultistepScheduler": "cosine_dpmsolver_multistep"}[name]
    missing = importlib.util.find_spec("torchsde") is None
    if missing:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        return getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{module}"), name)
    finally:
        if missing:
            del sys.modules["torchsde"]


def maker(name: str, timesteps: dict[str, Any] | None = None, **config: Any) -> Callable[[int], Any]:
    """A factory of `name(**config)` with `set_timesteps(n, **timesteps)`; builds each once, since some take half a second."""

    @functools.cache
    def prototype(n: int) -> Any:
        scheduler = scheduler_class(name)(**config)
        scheduler.set_timesteps(n, **(timesteps or {}))
        if hasattr(scheduler, "noise_sampler"):
            module = sys.modules[type(scheduler).__module__]
            scheduler.noise_sampler = lambda *_: module.randn_tensor((1,)) if hasattr(module, "randn_tensor") else torch.zeros(1)
        return scheduler

    return lambda n: copy.deepcopy(prototype(n))


@contextlib.contextmanager
def noise_of(scheduler: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    """Replaces the noise that this scheduler draws by `function(shape)`."""
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", lambda shape, **_: function(shape), create=True):
        yield


# Readers


def predicted(scheduler, output, t, x, index) -> Read:
    """`pred_original_sample` of the step's output."""
    step = scheduler.step(output, t, x)
    return step.prev_sample, "x0", step.pred_original_sample


def converted(what: str):
    """What `convert_model_output` returns inside the step: x0 for most, eps for some."""

    def read(scheduler, output, t, x, index) -> Read:
        seen = []
        convert = type(scheduler).convert_model_output

        def spy(self, *arguments, **keywords):
            seen.append(convert(self, *arguments, **keywords))
            return seen[-1]

        with mock.patch.object(type(scheduler), "convert_model_output", spy):
            x_next = scheduler.step(output, t, x).prev_sample
        return x_next, what, seen[0]

    return read


def denoised(scheduler, output, t, x, index) -> Read:
    """LCM: denoised = c_skip x + c_out x0."""
    step = scheduler.step(output, t, x)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
    return step.prev_sample, "x0", (step.denoised - skip * x) / out


def noised(scheduler, output, t, x, index) -> Read:
    """TCD with eta 0 goes to sqrt(abar) x0 + sqrt(1 - abar) eps at the next timestep: solved for x0 with x's own equation."""
    step = scheduler.step(output, t, x, eta=0.0)
    following = int(scheduler.timesteps[index + 1]) if index + 1 < len(scheduler.timesteps) else 0
    here, there = (scheduler.alphas_cumprod[i].double() for i in (int(t), following))
    return step.prev_sample, "x0", _solve(x, here, step.pred_noised_sample, there)


def transferred(scheduler, output, t, x, index) -> Read:
    """PNDM: its transfer of this output alone to the previous timestep, solved for x0."""
    previous = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alone = scheduler._get_prev_sample(x, t, previous, output)
    final = scheduler.final_alpha_cumprod
    here, there = (scheduler.alphas_cumprod[i].double() if i >= 0 else final.double() for i in (int(t), previous))
    return scheduler.step(output, t, x).prev_sample, "x0", _solve(x, here, alone, there)


def straight(scheduler, output, t, x, index) -> Read:
    """Flow matching: x_next = x + (s' - s) u and x0 = x - s u."""
    s, s_next = scheduler.sigmas[index].double(), scheduler.sigmas[index + 1].double()
    x_next = scheduler.step(output, t, x).prev_sample
    return x_next, "x0", x - s * (x_next - x) / (s_next - s)


def straight_heun(scheduler, output, t, x, index) -> Read:
    """Flow matching with Heun: the second stage goes on from where the first began, with the mean of two slopes."""
    if index % 2 == 0:
        return straight(scheduler, output, t, x, index)
    start, first, dt, s = scheduler.sample, scheduler.prev_derivative, scheduler.dt, scheduler.sigmas[index].double()
    x_next = scheduler.step(output, t, x).prev_sample
    return x_next, "x0", x - s * (2 * (x_next - start) / dt - first)


def renoised(scheduler, output, t, x, index) -> Read:
    """Flow LCM without noise: x_next = (1 - s') x0."""
    with noise_of(scheduler, lambda shape: torch.zeros(shape)):
        x_next = scheduler.step(output, t, x).prev_sample
    return x_next, "x0", x_next / (1 - scheduler.sigmas[index + 1].double())


def _solve(x, abar, y, abar_next) -> Tensor:
    """x0 from x = a x0 + s eps and y = a' x0 + s' eps, with a = sqrt(abar) and s = sqrt(1 - abar)."""
    a, s, a_next, s_next = abar.sqrt(), (1 - abar).sqrt(), abar_next.sqrt(), (1 - abar_next).sqrt()
    return (s_next * x - s * y) / (s_next * a - s * a_next)


def _cases() -> Iterator[Case]:
    def case(label, cls, read, types, *, stochastic=False, consistency=False, timesteps=None, **config) -> Iterator[Case]:
        for kind in types:
            make = maker(cls, timesteps, **config, **({} if kind is None else {"prediction_type": kind}))
            yield Case(label, f"{label}-{kind}" if kind else label, make, read, stochastic, consistency)

    vp = {"clip_sample": False}
    yield from case("ddpm", "DDPMScheduler", predicted, [EPS, X0, V], stochastic=True, **vp)
    yield from case("ddim", "DDIMScheduler", predicted, [EPS, X0, V], **vp)
    yield from case("ddim-trailing", "DDIMScheduler", predicted, [EPS], timestep_spacing="trailing", **vp)
    yield from case("ddim-zero-snr", "DDIMScheduler", predicted, [X0, V], timestep_spacing="trailing",
                    rescale_betas_zero_snr=True, **vp)  # fmt: skip
    # With abar[0] for the final level, the last step goes nowhere and tells nothing.
    yield from case("pndm", "PNDMScheduler", transferred, [EPS, V], skip_prk_steps=True, set_alpha_to_one=True)
    yield from case("pndm-prk", "PNDMScheduler", transferred, [EPS], skip_prk_steps=False, set_alpha_to_one=True)
    yield from case("lcm", "LCMScheduler", denoised, [EPS, X0, V], stochastic=True, consistency=True, **vp)
    yield from case("tcd", "TCDScheduler", noised, [EPS, X0, V], consistency=True)
    yield from case("unclip", "UnCLIPScheduler", predicted, [EPS, X0], stochastic=True, **vp)

    solvers = [("dpm-multi", "DPMSolverMultistepScheduler"), ("dpm-single", "DPMSolverSinglestepScheduler")]
    for label, cls in solvers:
        yield from case(f"{label}++", cls, converted("x0"), [EPS, X0, V], algorithm_type="dpmsolver++")
        yield from case(f"{label}++-sde", cls, converted("x0"), [EPS, X0, V], algorithm_type="sde-dpmsolver++", stochastic=True)
        # Without "++" the last sigma cannot be zero.
        old = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
        yield from case(f"{label}-eps", cls, converted("eps"), [EPS, X0, V], **old)
        for spacing in ("karras_sigmas", "exponential_sigmas", "beta_sigmas"):
            yield from case(f"{label}++-{spacing}", cls, converted("x0"), [EPS], **{f"use_{spacing}": True})
        yield from case(f"{label}++-flow", cls, converted("x0"), [FLOW, EPS, X0], use_flow_sigmas=True, flow_shift=3.0)
        yield from case(f"{label}++-sigma-min", cls, converted("x0"), [EPS], final_sigmas_type="sigma_min")
        yield from case(f"{label}++-order-3", cls, converted("x0"), [V], solver_order=3)
    yield from case("dpm-multi++-lu", "DPMSolverMultistepScheduler", converted("x0"), [EPS], use_lu_lambdas=True)
    yield from case("dpm-multi-sde-eps", "DPMSolverMultistepScheduler", converted("eps"), [EPS, V], stochastic=True,
                    algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min")  # fmt: skip
    for label, cls, what in [("unipc", "UniPCMultistepScheduler", "x0"), ("deis", "DEISMultistepScheduler", "eps")]:
        yield from case(label, cls, converted(what), [EPS, X0, V])
        yield from case(f"{label}-karras", cls, converted(what), [EPS], use_karras_sigmas=True)
        yield from case(f"{label}-flow", cls, converted(what), [FLOW], use_flow_sigmas=True, flow_shift=3.0)
    yield from case("unipc-eps", "UniPCMultistepScheduler", converted("eps"), [EPS, X0, V], predict_x0=False, solver_type="bh1",
                    final_sigmas_type="sigma_min")  # fmt: skip
    yield from case("sa", "SASolverScheduler", converted("x0"), [EPS, X0, V], stochastic=True)
    yield from case("sa-eps", "SASolverScheduler", converted("eps"), [EPS, V], stochastic=True, algorithm_type="noise_prediction")

    yield from case("euler", "EulerDiscreteScheduler", predicted, [EPS, X0, "original_sample", V])
    for spacing in ("karras_sigmas", "exponential_sigmas", "beta_sigmas"):
        yield from case(f"euler-{spacing}", "EulerDiscreteScheduler", predicted, [EPS], **{f"use_{spacing}": True})
        yield from case(f"heun-{spacing}", "HeunDiscreteScheduler", predicted, [EPS], **{f"use_{spacing}": True})
    yield from case("euler-continuous", "EulerDiscreteScheduler", predicted, [V], timestep_type="continuous")
    yield from case("euler-sigma-min", "EulerDiscreteScheduler", predicted, [EPS], final_sigmas_type="sigma_min")
    yield from case("euler-a", "EulerAncestralDiscreteScheduler", predicted, [EPS, V], stochastic=True)
    yield from case("heun", "HeunDiscreteScheduler", predicted, [EPS, X0, V])
    yield from case("lms", "LMSDiscreteScheduler", predicted, [EPS, X0, V])
    yield from case("lms-karras", "LMSDiscreteScheduler", predicted, [EPS], use_karras_sigmas=True)
    yield from case("kdpm2", "KDPM2DiscreteScheduler", predicted, [EPS, V])
    yield from case("kdpm2-karras", "KDPM2DiscreteScheduler", predicted, [EPS], use_karras_sigmas=True)
    yield from case("kdpm2-a", "KDPM2AncestralDiscreteScheduler", predicted, [EPS, V], stochastic=True)
    yield from case("dpm-sde", "DPMSolverSDEScheduler", predicted, [EPS, V], stochastic=True)

    yield from case("flow-euler", "FlowMatchEulerDiscreteScheduler", straight, [None], shift=3.0)
    yield from case("flow-euler-dynamic", "FlowMatchEulerDiscreteScheduler", straight, [None], use_dynamic_shifting=True,
                    timesteps={"mu": 0.8})  # fmt: skip
    yield from case("flow-heun", "FlowMatchHeunDiscreteScheduler", straight_heun, [None], shift=3.0)
    yield from case("flow-lcm", "FlowMatchLCMScheduler", renoised, [None], stochastic=True, consistency=True, shift=3.0)

    yield from case("edm-euler", "EDMEulerScheduler", predicted, [EPS, V])
    yield from case("edm-euler-exponential", "EDMEulerScheduler", predicted, [EPS], sigma_schedule="exponential")
    yield from case("edm-dpm", "EDMDPMSolverMultistepScheduler", converted("x0"), [EPS, V])
    yield from case("edm-dpm-sde", "EDMDPMSolverMultistepScheduler", converted("x0"), [EPS], algorithm_type="sde-dpmsolver++",
                    stochastic=True)  # fmt: skip
    yield from case("cosine-dpm", "CosineDPMSolverMultistepScheduler", converted("x0"), [V], stochastic=True, sigma_min=0.01)


CASES = list(_cases())
