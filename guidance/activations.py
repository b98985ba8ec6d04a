"""The activation swap of EluCD: ReLU -> Softplus(beta) makes a classifier's gradient smooth (Ma et al. 2024, section 4).

softplus_beta(x) = ln(1 + exp(beta x)) / beta        f(0) = ln 2 / beta, and f -> relu as beta -> infinity
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def softplus_activations(module: nn.Module, beta: float) -> Iterator[int]:
    """Replace every `nn.ReLU` in `module` by `nn.Softplus(beta)` inside the block, and put the same objects back after it.

    Yields:
        How many places were replaced. A ReLU that is used at several places of the module tree counts at each; a ReLU called as a
        function (`F.relu`) cannot be replaced and does not count.

    Raises:
        ValueError: `beta` is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive.")
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.ReLU)
    ]
    softplus = nn.Softplus(beta)
    for parent, name, _ in places:
        parent._modules[name] = softplus
    try:
        yield len(places)
    finally:
        for parent, name, relu in places:
            parent._modules[name] = relu
