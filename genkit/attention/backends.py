"""One switch for what computes attention, `use_attention(model, "flash")`, and what of it is usable here.

It sits on `scaled_dot_product_attention` (SDPA), the one interface that all hosts share, so it works alike for UNets, whose
processors call SDPA, and for models on diffusers' dispatcher, whose default backend calls it too. (diffusers' own
`set_attention_backend` does nothing for the former, and changes the default of the whole process for the latter.)

    flash, efficient, cudnn, math     SDPA restricted to that kernel, inside the network's attention modules
    xformers, hub:NAME                SDPA replaced by diffusers' function for that backend, there
    varlen                            SDPA replaced by `torch.nn.attention.varlen`, there

Text encoders and VAEs keep torch's choice: their shapes (masks, head dimension 512) would be refused. No GPU has run any of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from genkit import _host
from genkit.attention import _torch
from genkit.attention.choices import AUTO, CHOICES, KERNELS, POLICIES, check_choice
from genkit.attention.guard import excused, only
from genkit.attention.places import modules_of
from genkit.attention.varlen import attend_varlen

_SDP = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_modes: list[str] = []


def current_mode() -> str:
    """The choice of the innermost `use_attention`; "auto" outside of any."""
    return _modes[-1] if _modes else AUTO


@contextmanager
def use_attention(model: Any, choice: str = AUTO) -> Iterator[None]:
    """Inside the block, the model's network computes attention as chosen. Everything is put back at the end.

    "auto" and "strict" are about attention that is not fused: pipelines, scorers and trainers of genkit say it, or stop.

    Args:
        model: a pipeline (of diffusers or genkit), a denoiser, or a module.
        choice: see `genkit.attention.choices.CHOICES`.

    Raises:
        ValueError: an unknown choice, one that is not usable here (with the reason, and what is), or a compiled network.
        UnfusedAttentionError: in the block, from a call that the chosen kernel does not take.

    Example:
        >>> with use_attention(pipe, "flash"):
        ...     pipe("a red seven")
    """
    choice = check_choice(choice)
    networks = _networks(model)
    if choice not in POLICIES:
        _require_usable(choice, _device(networks))
    with ExitStack() as stack:
        _modes.append(choice)
        stack.callback(_modes.remove, choice)
        if choice not in POLICIES:
            scope = _scope_of(choice)
            for network in networks:
                stack.enter_context(_host.on_native_attention(network))
                for module in _attention_modules(network):
                    stack.enter_context(_around(module, scope))
        yield


def why_unusable(choice: str, device: str | torch.device = "cpu") -> str | None:
    """Why a choice cannot be used on a device; None if it can. Nothing is downloaded."""
    choice, kind = check_choice(choice), torch.device(device).type
    if choice in (*POLICIES, "math"):
        return None
    try:
        if choice in KERNELS:
            _try(lambda q: F.scaled_dot_product_attention(q, q, q), device, _SDP[choice])
        elif choice == "varlen":
            if kind != "cuda":
                return f"torch.nn.attention.varlen has no kernel for {kind}"
            _try(attend_varlen, device)
        else:
            reason = _host.why_backend_unusable(_backend(choice))
            if reason is None and kind != "cuda":
                reason = f"its kernels do not run on {kind}"
            if reason is None and choice == "xformers":
                _try(_host.attention_function("xformers"), device)
            return reason
    except Exception as error:  # a broken installation fails as it likes
        reason = " ".join(str(error).split())
        return f"torch has no such kernel for {kind}" if "No viable backend" in reason else reason[:300]
    return None


def _require_usable(choice: str, device: torch.device) -> None:
    reason = why_unusable(choice, device)
    if reason is not None:
        usable = [name for name in CHOICES if ":" not in name and why_unusable(name, device) is None]
        raise ValueError(f"Attention {choice!r} is not usable here: {reason}. Usable: {', '.join(usable)}.")


def _try(attend: Callable[..., Tensor], device: str | torch.device, *kernels: SDPBackend) -> None:
    """One small call, which raises where there is no kernel."""
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    q = torch.zeros(1, 1, 16, 64, dtype=dtype, device=device)
    with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(list(kernels)) if kernels else ExitStack():
        warnings.simplefilter("ignore")
        attend(q) if kernels else attend(q, q, q)


def _backend(choice: str) -> str:
    """diffusers' name of a choice."""
    return _host.hub_backend(choice.removeprefix("hub:")) if choice.startswith("hub:") else choice


def _scope_of(choice: str) -> Callable[[], Any]:
    """What makes the scope around a call of an attention module."""
    if choice == "math":
        return lambda: excused("attention math")
    if choice in KERNELS:
        # The unfused one stays allowed, since it knows why it was reached. It raises.
        note, order = f" by the {choice} kernel, which alone is allowed", (_SDP[choice], SDPBackend.MATH)
        return lambda: _both(only(note), _torch.kernels_in_order(*order))
    function = attend_varlen if choice == "varlen" else _host.attention_function(_backend(choice))
    return lambda: _both(only(f" by {choice}, which alone is allowed"), _Instead(function))


@contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


class _Instead(TorchFunctionMode):
    """Another function in the place of `scaled_dot_product_attention`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.function if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


@contextmanager
def _around(module: nn.Module, scope: Callable[[], Any]) -> Iterator[None]:
    """Every call of a module inside a scope of its own; also when gradient checkpointing computes it again."""
    open_scopes: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered = scope()
        entered.__enter__()
        open_scopes.append(entered)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_scopes.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _networks(model: Any) -> list[nn.Module]:
    """What denoises: a module itself; of a pipeline what has attention and is no text encoder, image encoder or VAE."""
    if isinstance(model, nn.Module):
        return [model]
    others = ("vae", "text_encoder", "image_encoder", "safety_checker", "vqvae")
    return [m for name, m in modules_of(model).items() if not name.startswith(others)]


def _attention_modules(network: nn.Module) -> list[nn.Module]:
    """The modules that call SDPA: those with processors, or else the network as a whole."""
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in network.modules()):
        raise ValueError(f"{type(network).__name__} is compiled, so its attention is fixed. Choose the attention before compiling.")
    found = [m for m in network.modules() if hasattr(getattr(m, "processor", None), "__call__")]  # noqa: B004
    return found or [network]


def _device(networks: list[nn.Module]) -> torch.device:
    tensors = (value for network in networks for value in (*network.parameters(), *network.buffers()))
    return next((value.device for value in tensors), torch.device("cpu"))
