"""Counter-based noise: a row depends on its seed and stream alone."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from genkit.noise import GUIDANCE, INITIAL, SAMPLER, generators, mix, normal


def test_rows_do_not_depend_on_the_batch():
    together = normal([3, 7, 11, 0], (4, 8, 8))
    assert together.shape == (4, 4, 8, 8)
    assert together.dtype == torch.float32
    for row, seed in zip(together, [3, 7, 11, 0], strict=True):
        assert torch.equal(row, normal([seed], (4, 8, 8))[0])
    assert torch.equal(normal([7, 3], (4, 8, 8)), together[[1, 0]])
    assert torch.equal(normal([5, 5], (2,))[0], normal([5, 5], (2,))[1])


def test_global_randomness_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    normal([1, 2], (3,))
    assert torch.equal(torch.rand(1), expected)


def test_known_values():
    """A seed means the same picture in every version."""
    pairs = [(0, 0), (0, 1), (1, 0), (2**32, 0), (-1, 0)]
    assert [mix(*pair) for pair in pairs] == [0xCAB23327, 0x8A0A819A, 0xB12AEB7D, 0xE0CCF98C, 0xBC8A566A]


def test_torch_keeps_32_bits_of_a_seed():
    """Why `mix` is a bijection of 32 bits: when this fails, torch has changed, and 64 bits would be better."""
    low, high = (torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32))
    assert torch.equal(low, high)


def test_streams_and_neighbours_differ():
    values = {mix(seed, stream) for seed in range(100_000) for stream in (INITIAL, SAMPLER, GUIDANCE)}
    assert len(values) == 300_000
    assert all(0 <= value < 2**32 for value in values)
    assert len({mix(seed) for seed in (1, 1 + 2**32, 1 + 2**33, 1 + 2**60, -1)}) == 5
    # Neighbours differ in about half of their bits.
    flips = [(mix(seed) ^ mix(seed + 1)).bit_count() for seed in range(1000)]
    assert sum(flips) / len(flips) == pytest.approx(16, abs=0.5)
    rows = torch.stack([normal([seed], (4096,), stream)[0] for seed in (0, 1) for stream in (INITIAL, SAMPLER, GUIDANCE)])
    assert (torch.corrcoef(rows) - torch.eye(6)).abs().max() < 5 / math.sqrt(4096)


@pytest.mark.parametrize("stream", [INITIAL, SAMPLER, GUIDANCE])
def test_is_standard_normal(stream):
    values = normal(range(64), (1024,), stream)
    assert values.mean().abs() < 5 / math.sqrt(values.numel())
    assert (values.std() - 1).abs() < 5 / math.sqrt(2 * values.numel())
    assert values.mean(1).std().item() == pytest.approx(1 / 32, rel=0.4)


def test_a_list_of_generators_is_what_diffusers_takes():
    drawn = randn_tensor((3, 4, 8, 8), generator=generators([3, 7, 11]))
    assert torch.equal(drawn, normal([3, 7, 11], (4, 8, 8)))
    streams = [randn_tensor((1, 5), generator=generators([3], stream)) for stream in (INITIAL, SAMPLER)]
    assert not torch.equal(*streams)
