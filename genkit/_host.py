"""Every private touch point of diffusers, in one place; `tests/genkit/test_host.py` has a version test for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from genkit.errors import unknown


def is_ready(scheduler: Any) -> bool:
    """Whether `set_timesteps` was called. DDPM forgets the number of steps when it is given custom timesteps."""
    return getattr(scheduler, "num_inference_steps", None) is not None or getattr(scheduler, "custom_timesteps", False)


def begin(scheduler: Any) -> None:
    """Start at entry 0 of `timesteps`, and do not let `step` complain about an input that was scaled elsewhere.

    Left alone, a scheduler looks its first timestep up and starts at the second entry where rounding made the first two equal.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True


def is_flow(scheduler: Any) -> bool:
    """Flow matching: `FlowMatch*` schedulers, which have sigmas but neither betas nor a scaled model input."""
    return hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "scale_model_input")


def is_preconditioned(scheduler: Any) -> bool:
    """EDM: the scheduler scales the network's input and output itself (Karras et al. 2022, table 1)."""
    return hasattr(scheduler, "precondition_outputs")


def takes_variance(scheduler: Any) -> bool:
    """Whether `step` wants the learned variance behind the prediction. DPM-Solvers throw it away, and only if it has 3 channels."""
    return hasattr(scheduler, "_get_variance") and str(scheduler.config.get("variance_type")).startswith("learned")


def is_second_order(scheduler: Any) -> bool:
    """Heun, KDPM2, DPM-SDE: two network evaluations a step, counted in `timesteps`."""
    return hasattr(type(scheduler), "state_in_first_order")


def evaluation_orders(scheduler: Any) -> list[int]:
    """1 or 2 for each entry of `timesteps`."""
    count = len(scheduler.timesteps)
    return [1 + i % 2 for i in range(count)] if is_second_order(scheduler) else [1] * count


def starts_step(scheduler: Any, index: int) -> bool:
    """Whether `step` at this entry of `timesteps` goes on from the sample that it is given, not from that of an earlier stage."""
    if is_second_order(scheduler):
        return index % 2 == 0
    if hasattr(scheduler, "prk_timesteps"):  # PNDM: Runge-Kutta steps of four stages, then a first step of two
        warm_up = len(scheduler.prk_timesteps)
        return index % 4 == 0 if index < warm_up else index != 1 or warm_up > 0
    orders = getattr(scheduler, "order_list", None)  # DPMSolverSinglestep
    return orders is None or orders[index] == 1


def forget_history(scheduler: Any) -> None:
    """Tell a multistep scheduler that its sample was replaced: the next step is of first order and has no corrector.

    DPM-Solver, UniPC, DEIS and SA extrapolate differences of predictions, which fresh noise in between would spoil; the linear
    combinations of LMS and PNDM stand it.
    """
    if hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = 0
    if hasattr(scheduler, "last_sample"):
        scheduler.last_sample = None


def final_alpha_sigma(scheduler: Any) -> tuple[float, float]:
    """(alpha, sigma) of the sample that the last step returns."""
    sigmas = getattr(scheduler, "sigmas", None)
    if evaluation_sigmas(scheduler) is not None and isinstance(sigmas, Tensor):
        return alpha_sigma(scheduler, float(sigmas[-1]))
    abar = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return abar**0.5, (1 - abar) ** 0.5


def evaluation_sigmas(scheduler: Any) -> list[float] | None:
    """The sigma at which the network is evaluated at each entry of `timesteps`; None for abar-indexed schedulers.

    KDPM2 evaluates at interpolated sigmas in its second stage, DPM-SDE at the geometric mean of two.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    # Consistency and score-SDE schedulers have sigmas too, but precondition in their own ways.
    known = hasattr(scheduler, "alphas_cumprod") or is_flow(scheduler) or is_preconditioned(scheduler)
    if not known or not isinstance(sigmas, Tensor):
        return None
    values = sigmas.double().tolist()
    if not is_second_order(scheduler):
        return values
    name = type(scheduler).__name__
    if name == "KDPM2DiscreteScheduler":
        middle = scheduler.sigmas_interpol.double().tolist()
    elif name == "KDPM2AncestralDiscreteScheduler":
        middle = [0.0, *scheduler.sigmas_interpol.double().tolist()]
    elif name == "DPMSolverSDEScheduler":
        middle = [0.0] + [(a * b) ** 0.5 for a, b in itertools.pairwise(values)]
    else:
        middle = values
    return [middle[i] if i % 2 else values[i] for i in range(len(scheduler.timesteps))]


def alpha_sigma(scheduler: Any, sigma: float) -> tuple[float, float]:
    """(alpha, sigma) of a schedule's sigma."""
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, std = scheduler._sigma_to_alpha_sigma_t(torch.tensor(sigma, dtype=torch.float64))
        return float(alpha), float(std)
    return (1 - sigma, sigma) if is_flow(scheduler) else (1.0, sigma)


def alphas_cumprod(scheduler: Any) -> Tensor:
    """The table of abar, or a clear error for a scheduler of no known family."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise ValueError(
            f"{type(scheduler).__name__} is not supported: its noise levels follow no known convention. "
            "Use a DDIM, DPM-Solver, Euler or flow-matching scheduler."
        )
    return table


def is_offloaded(pipe: Any) -> bool:
    """Whether any component has an accelerate hook or group offloading that moves its weights."""
    if getattr(pipe, "_all_hooks", None):
        return True
    modules = [c for c in pipe.components.values() if isinstance(c, torch.nn.Module)]
    return any(hasattr(m, "_hf_hook") or _is_group_offloaded(m) for m in modules)


def _is_group_offloaded(module: torch.nn.Module) -> bool:
    """Group offloading sits on blocks or leaves, not on the component itself."""
    registries: list[Any] = [m._diffusers_hook for m in module.modules() if hasattr(m, "_diffusers_hook")]
    return any(registry.get_hook("group_offloading") is not None for registry in registries)


_PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SanaAttnProcessor2_0")


def cross_attentions(network: Any) -> list[Any]:
    """A network's attentions to its text, if keys and values are `to_k(text)` and `to_v(text)` in all of them, and nothing else (a
    compiler, a hook, a foreign processor) has its hands in the network; otherwise none.
    """
    from diffusers.models.attention_processor import Attention

    modules: list[Any] = list(network.modules())
    changed = any(hasattr(m, "_diffusers_hook") or m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules)
    if changed or network.config.get("dual_cross_attention"):  # which gives each attention a part of the text
        return []
    attentions = [m for m in modules if isinstance(m, Attention) and m.is_cross_attention]
    return attentions if all(_is_plain(a) for a in attentions) else []


def _is_plain(attention: Any) -> bool:
    extras = ("group_norm", "spatial_norm", "norm_cross", "add_k_proj")
    return (
        type(attention.processor).__name__ in _PLAIN_PROCESSORS
        and not getattr(attention, "fused_projections", False)
        and all(getattr(attention, name, None) is None for name in extras)
    )


def attention_backend(processor: Any) -> str | None:
    """What a processor of a model on diffusers' dispatcher computes attention with, by name; None for processors that are not.

    A backend of None means the default of the process, which `set_attention_backend` of any model changes for all.
    """
    if not hasattr(processor, "_attention_backend"):
        return None
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(backend, "value", backend))


@contextmanager
def on_native_attention(network: torch.nn.Module) -> Iterator[None]:
    """Inside the block, a network on diffusers' dispatcher uses `scaled_dot_product_attention`, as all others do."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    processors: dict[int, Any] = {
        id(p): p for p in (getattr(m, "processor", None) for m in network.modules()) if hasattr(p, "_attention_backend")
    }
    before = [(processor, processor._attention_backend) for processor in processors.values()]
    try:
        for processor, _ in before:
            processor._attention_backend = AttentionBackendName.NATIVE
        yield
    finally:
        for processor, backend in before:
            processor._attention_backend = backend


def hub_backend(name: str) -> str:
    """diffusers' name of a backend from the Hub: "flash" is "flash_hub", "flash_3" is "_flash_3_hub".

    Raises:
        ValueError: diffusers knows no such backend; the message lists those it does.
    """
    from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY

    known = {backend.value.removesuffix("_hub").lstrip("_"): backend.value for backend in _HUB_KERNELS_REGISTRY}
    short = name.removesuffix("_hub").lstrip("_")
    if short not in known:
        raise unknown("Hub kernel", name, sorted(known))
    return known[short]


def why_backend_unusable(name: str) -> str | None:
    """What diffusers says is missing for a backend; None if nothing is."""
    from diffusers.models import attention_dispatch

    try:
        attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(name))
    except RuntimeError as error:
        return str(error)
    return None


def attention_function(name: str) -> Callable[..., Tensor]:
    """diffusers' function for a backend, with the arguments and the layout (B, H, L, D) of `scaled_dot_product_attention`.

    A Hub kernel is downloaded and run. What the function does not know is refused, where diffusers drops it without a word.
    """
    from diffusers.models import attention_dispatch as dispatch

    backend = dispatch.AttentionBackendName(name)
    dispatch._maybe_download_kernel_for_backend(backend)
    known = dispatch._AttentionBackendRegistry._supported_arg_names[backend]

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        given = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        wanted = [n for n, value in given.items() if isinstance(value, Tensor) or value]
        ignored = [n for n in wanted if n not in known]
        if ignored:
            raise ValueError(f"Attention {name!r} would ignore {', '.join(ignored)}. Use --attn auto.")
        out = dispatch.dispatch_attention_fn(*(t.transpose(1, 2) for t in (query, key, value)), **given, backend=backend)
        return out.transpose(1, 2)

    return attend
