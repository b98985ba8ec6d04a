"""Mixed conditions: weighted means of several conditions, differentiable in the weights, for text and for class labels alike.

For text, each tensor of the condition is sum_k w_k c_k. A class label is a number; what is mixed are the rows of every embedding
table that looks it up (diffusers' DiT has one in each block), by hooks for as long as the context lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genkit.denoisers.base import Cond, Denoiser


@contextmanager
def mixed(denoiser: Denoiser, cond: Cond, weights: Tensor) -> Iterator[Cond]:
    """The condition of B samples, each a weighted mean of the K rows of `cond`.

    Args:
        cond: K conditions.
        weights: (B, K); may require a gradient. Rows should sum to 1.

    Raises:
        ValueError: the condition has whole numbers whose embedding is not known.

    Example:
        >>> with mixed(denoiser, cond, weights) as condition:
        ...     loss = denoiser(x, level, condition).eps.square().mean()
    """
    count = len(weights)
    tensors: dict[str, Tensor] = {}
    hooks: list[Any] = []
    for name, value in cond.tensors.items():
        if bool((value == value[:1]).all()):
            # Nothing to mix (Flux's distilled guidance, equal masks), and weights that are not quite normalised must not change it.
            tensors[name] = value[:1].expand(count, *value.shape[1:])
        elif value.is_floating_point():
            tensors[name] = torch.einsum("bk,k...->b...", weights.to(value.dtype), value)
        elif name == "class_labels":
            tables = label_tables(denoiser.network)
            if not tables:
                raise ValueError(f"The class embedding of {denoiser.family} was not found, so classes cannot be mixed.")
            tensors[name] = value[:1].expand(count)
            hooks += [table.register_forward_hook(_mixing(value, weights)) for table in tables]
        elif name.endswith("attention_mask"):  # whatever any of the prompts has a token for
            tensors[name] = value.amax(0, keepdim=True).expand(count, *value.shape[1:])
        else:
            raise ValueError(f"The condition {name!r} of {denoiser.family} is made of whole numbers and cannot be mixed.")
    try:
        yield Cond(tensors)
    finally:
        for hook in hooks:
            hook.remove()


def label_tables(network: nn.Module) -> list[nn.Embedding]:
    """Every embedding table in which the network looks up a class label."""
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and ("class_embed" in name or "embedding_table" in name)
    ]


def _mixing(labels: Tensor, weights: Tensor) -> Any:
    def hook(table: nn.Embedding, arguments: Any, output: Tensor) -> Tensor:
        rows = table.weight[labels]
        return weights.to(rows.dtype) @ rows

    return hook
