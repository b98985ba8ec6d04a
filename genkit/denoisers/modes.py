"""A network in eval mode, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in eval mode inside the block: dropout, of labels above all, would be noise; each module then goes back."""
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network in eval mode and without gradients of its weights, which activations would be kept for; then as it was."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        network.requires_grad_(False)
        with evaluating(network):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True
