"""The activation swap is exact, counted and reversible."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genkit.guidance import softplus_activations


@pytest.mark.parametrize(
    ("beta", "values", "slope"), [(3.0, (0.567138, 0.067138), 0.817574), (5.0, (0.515778, 0.015778), 0.924142)]
)
def test_values_of_the_spec(beta, values, slope):
    network = nn.Sequential(nn.ReLU())
    x = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    with softplus_activations(network, beta) as count:
        y = network(x)
    assert count == 1
    assert y.tolist() == pytest.approx(values, abs=5e-7)
    (gradient,) = torch.autograd.grad(y[0], x)
    assert gradient[0].item() == pytest.approx(slope, abs=5e-7)
    assert torch.equal(network(x), x.relu())


def test_counts_places_and_restores_the_same_objects():
    shared = nn.ReLU()
    network = nn.Sequential(shared, nn.Sequential(shared, nn.GELU()), nn.ReLU(inplace=True))
    before = list(network.modules())
    with softplus_activations(network, 3.0) as count:
        assert not any(isinstance(m, nn.ReLU) for m in network.modules())
    assert count == 3
    assert [a is b for a, b in zip(network.modules(), before, strict=True)] == [True] * len(before)


def test_restores_after_an_exception():
    network = nn.Sequential(nn.ReLU())

    def fail():
        with softplus_activations(network, 1.0):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert isinstance(network[0], nn.ReLU)


def test_bad_beta():
    with pytest.raises(ValueError, match="beta=0"), softplus_activations(nn.Identity(), 0):
        pass
