"""The average of a student's weights."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from genkit.distill.average import Average


def walk(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in parameters:
            p += torch.randn(p.shape, generator=generator)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_it_is_that_of_diffusers(decay: float) -> None:
    p = parameters()
    ours, theirs = Average(p, decay), EMAModel(p, decay=decay)
    for step in range(12):
        walk(p, step)
        ours.update(p)
        theirs.step(p)
        assert ours.decay_of(ours.updates) == theirs.cur_decay_value
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.shadow, theirs.shadow_params, strict=True))


def test_every_third_update_it_follows_by_the_product_of_the_decays() -> None:
    p = parameters()
    average = Average(p, 0.9, every=3, host=True)
    for step in range(5):
        walk(p, step)
        average.update(p)
        if step == 1:
            assert torch.equal(average.shadow[0], torch.zeros(3, 2))  # nothing yet
        if step == 2:
            assert all(torch.equal(a, b) for a, b in zip(average.shadow, p, strict=True))  # the first update has no past
            before = [s.clone() for s in average.shadow]
    walk(p, 5)
    average.update(p)
    kept = math.prod(min(0.9, n / (9 + n)) for n in (4, 5, 6))
    for s, b, q in zip(average.shadow, before, p, strict=True):
        assert torch.allclose(s, kept * b + (1 - kept) * q, atol=1e-6)


def test_swapping_twice_puts_everything_back_to_the_bit() -> None:
    p = parameters()
    average = Average(p, 0.9)
    for step in range(3):
        walk(p, step)
        average.update(p)
    own, kept = [q.detach().clone() for q in p], [s.clone() for s in average.shadow]
    average.swap(p)
    assert all(torch.equal(q, s) for q, s in zip(p, kept, strict=True))
    assert all(torch.equal(s, q) for s, q in zip(average.shadow, own, strict=True))
    average.swap(p)
    assert all(torch.equal(q, o) for q, o in zip(p, own, strict=True))
    assert all(torch.equal(s, k) for s, k in zip(average.shadow, kept, strict=True))
