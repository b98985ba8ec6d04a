"""AdamW without a first moment: the updates of torch's, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from genkit.distill.optimizer import MomentumFreeAdamW


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    return network, copy.deepcopy(network)


def update(network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(step))
    network(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_those_of_adamw_at_beta_1_of_0(weight_decay: float) -> None:
    ours, theirs = networks()
    one = MomentumFreeAdamW(ours.parameters(), lr=0.1, weight_decay=weight_decay)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.0, 0.99), weight_decay=weight_decay, fused=True)
    for step in range(5):
        update(ours, one, step)
        update(theirs, other, step)
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(set(state) == {"step", "exp_avg_sq"} for state in one.state.values())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"])


def test_two_updates_by_hand() -> None:
    """v_1 = (1 - b) g^2, so the first step is lr sign(g) to eps; the second has v = .99 v_1 + .01 g^2 over 1 - .99^2."""
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = MomentumFreeAdamW([p], lr=0.5)
    p.grad = torch.tensor([4.0])
    optimizer.step()
    assert float(p) == pytest.approx(0.5, abs=1e-6)
    p.grad = torch.tensor([-2.0])
    optimizer.step()
    v = (0.99 * 0.01 * 16 + 0.01 * 4) / (1 - 0.99**2)
    assert float(p) == pytest.approx(0.5 + 0.5 * 2 / v**0.5, abs=1e-6)


def test_parameters_without_a_gradient_stay_and_have_no_state() -> None:
    network, before = networks()
    optimizer = MomentumFreeAdamW(network.parameters(), lr=0.1)
    network[0].requires_grad_(False)
    update(network, optimizer, 0)
    assert torch.equal(network[0].weight, before[0].weight)
    assert set(optimizer.state) == set(network[2].parameters())


def test_a_loaded_state_goes_on_to_the_bit() -> None:
    unbroken, broken = networks()
    one, first = (MomentumFreeAdamW(network.parameters(), lr=0.1) for network in (unbroken, broken))
    for step in range(2):
        update(unbroken, one, step)
        update(broken, first, step)
    second = MomentumFreeAdamW(broken.parameters(), lr=0.3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    update(unbroken, one, 2)
    update(broken, second, 2)
    assert all(torch.equal(p, q) for p, q in zip(unbroken.parameters(), broken.parameters(), strict=True))
