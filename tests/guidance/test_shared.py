"""Networks that several energies share: one evaluation within a joint evaluation, nothing special outside."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from genkit.guidance import EnergyGuidance, Guidance, State
from genkit.guidance.base import differentiate
from genkit.guidance.shared import shared, sharing
from genkit.levels import Level
from genkit.prediction import Prediction

LEVEL = Level(0.8, 0.6, 500)


class Trunk(nn.Module):
    """A linear map that counts its calls and remembers its outputs, weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()
        self.calls, self.outputs = 0, []

    def forward(self, x, *extra):
        self.calls += 1
        out = self.linear(x).tanh()
        self.outputs.append(weakref.ref(out))
        return out

    def double(self, x):
        return 2 * self(x)


@pytest.fixture
def trunk():
    torch.manual_seed(0)
    return Trunk().requires_grad_(False)


def heads(trunk, count=3):
    weights = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [lambda x, level, w=w: (shared(trunk, x, level) * w).sum(1) for w in weights]


def state_and_prediction():
    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = State(x, LEVEL, [LEVEL])
    return state, Prediction(x, LEVEL, 0.1 * x, "eps")


def test_energies_on_one_trunk_evaluate_it_once(trunk):
    state, prediction = state_and_prediction()
    parts = [EnergyGuidance(head, 0.5 + i, "direct", "latent") for i, head in enumerate(heads(trunk))]
    apart = sum(part.shift(state, prediction) for part in parts)
    assert trunk.calls == 3
    total = parts[0] + parts[1].between(0, 1) + parts[2]
    together = total.contribution(state, prediction, lambda **_: prediction)
    assert trunk.calls == 4
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


def test_outside_a_joint_evaluation_it_simply_runs(trunk):
    x = torch.zeros(1, 6, dtype=torch.float64)
    assert torch.equal(shared(trunk, x), shared(trunk, x))
    assert trunk.calls == 2


def test_what_counts_as_the_same(trunk):
    x = torch.zeros(1, 6, dtype=torch.float64)
    with sharing():
        assert shared(trunk, x) is shared(trunk, x)
        assert shared(trunk, x, 1, (2, 3)) is shared(trunk, x, 1, (2, 3))
        assert shared(trunk, x, 1) is not shared(trunk, x, 1.0)
        assert shared(trunk, x) is not shared(trunk, x.clone())
        assert shared(trunk.double, x) is shared(trunk.double, x)
        assert shared(trunk.double, x) is not shared(trunk, x)
        with torch.no_grad():
            assert shared(trunk, x) is shared(trunk, x)
    assert trunk.calls == 7


def test_a_result_without_a_graph_does_not_serve_one_with(trunk):
    x = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    with sharing():
        with torch.no_grad():
            assert not shared(trunk, x).requires_grad
        assert shared(trunk, x).requires_grad


def test_the_identity_of_a_temporary_is_not_mistaken(trunk):
    """Python gives a new tensor the identity of one that is gone, unless somebody keeps it."""
    with sharing():
        values = [shared(trunk, torch.full((1, 6), float(i), dtype=torch.float64)).sum().item() for i in range(20)]
    assert len(set(values)) == 20


def test_inner_evaluations_remember_for_themselves(trunk):
    """An energy may itself differentiate something; that backward pass must not free the outer graph."""

    def energy(x):
        first = shared(trunk, x).sum(1)
        differentiate(lambda z: shared(trunk, z).sum(1), x)
        return first + shared(trunk, x).square().sum(1)

    value, gradient = differentiate(energy, torch.ones(2, 6, dtype=torch.float64))
    assert trunk.calls == 2
    assert torch.isfinite(gradient).all()
    assert not value.requires_grad


def test_nothing_is_kept_afterwards(trunk):
    state, prediction = state_and_prediction()
    total: Guidance = EnergyGuidance(heads(trunk)[0], 1.0, "direct") + EnergyGuidance(heads(trunk)[1], 1.0, "direct")
    total.contribution(state, prediction, lambda **_: prediction)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), sharing():
        shared(trunk.linear, shared(trunk, state.x))
    gc.collect()
    assert trunk.calls == 2
    assert [output() for output in trunk.outputs] == [None, None]
    assert not state.log["energy"].requires_grad
