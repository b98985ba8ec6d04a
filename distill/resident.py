"""What of a pretrained model stays in memory while a student learns from it.

A teacher of which only features are read needs nothing behind the deepest tap, and no text encoder where the prompts are encoded
already. What is left out here is left out of a second module tree with the same Parameters: the model that was given stays whole,
for as long as somebody holds it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Set
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from genkit.denoisers import Denoiser
from genkit.denoisers.base import network_name

D = TypeVar("D", bound=Denoiser)


def shared_copy(network: Any, dtype: torch.dtype | None = None) -> Any:
    """A second module tree with the same Parameters and buffers, but those of another dtype, which are cast.

    What is added to one tree is not in the other.
    """

    def shared(value: Tensor) -> Tensor:
        if dtype is None or value.dtype == dtype or not value.is_floating_point():
            return value
        cast = value.detach().to(dtype)
        return nn.Parameter(cast, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else cast

    return copy.deepcopy(network, {id(value): shared(value) for value in (*network.parameters(), *network.buffers())})


def with_components(denoiser: D, **components: Any) -> D:
    """The same adapter on a copy of its pipeline that has other components."""
    shell = copy.copy(denoiser)
    shell.pipe = copy.copy(denoiser.pipe)
    for name, component in components.items():
        setattr(shell.pipe, name, component)
    return shell


def in_dtype(denoiser: D, dtype: torch.dtype | None) -> D:
    """The same adapter on a module tree of its own, cast to a dtype, if one is given; otherwise as `shared_copy`."""
    return with_components(denoiser, **{network_name(denoiser.pipe): shared_copy(denoiser.network, dtype)})


def without_encoders(denoiser: D, *, text: bool, pictures: bool) -> D:
    """The same adapter without encoders; it takes latents, and conditions that are stored or encoded already.

    Args:
        text, pictures: whether to keep text encoders, and a VAE. Anything else beside the network goes in any case.
    """
    kept = {network_name(denoiser.pipe)}
    kept |= {"text_encoder", "text_encoder_2", "text_encoder_3"} if text else set()
    kept |= {"vae", "vqvae"} if pictures else set()
    networks = {name for name, part in vars(denoiser.pipe).items() if isinstance(part, nn.Module)}
    shell = with_components(denoiser, **dict.fromkeys(networks - kept))
    if shell.codec is not None and not pictures:
        shell.codec = dataclasses.replace(shell.codec, vae=None)
    return shell


def called(network: nn.Module, run: Callable[[], Any]) -> Set[str]:
    """Names of the modules that are called while `run` evaluates a network."""
    found: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: found.add(name))
        for name, module in network.named_modules()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def only(network: Any, kept: Set[str]) -> Any:
    """A second module tree with the same Parameters, of which the modules `kept` can be called; others have none."""
    tree = shared_copy(network)
    gone: list[str] = []
    for name, module in list(tree.named_modules()):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not name.startswith(tuple(gone)) and not any(f"{other}.".startswith(f"{name}.") for other in kept):
            parent, _, last = name.rpartition(".")
            setattr(tree.get_submodule(parent), last, _Absent())
            gone.append(f"{name}.")
    return tree


class _Absent(nn.Module):
    """In the place of a module that is never called."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        raise RuntimeError("This part of the network was left out, since no feature that is read lies behind it.")
