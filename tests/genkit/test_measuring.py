"""Time and memory of a call."""

from __future__ import annotations

import time

import pytest
import torch

from genkit.measuring import added_bytes, seconds


def test_memory_is_the_most_that_is_held_at_a_time():
    def two_in_turn():
        for _ in range(2):
            torch.zeros(1_000_000)

    def two_together():
        return torch.zeros(1_000_000), torch.zeros(1_000_000)

    assert added_bytes(two_in_turn) == pytest.approx(4e6, rel=0.01)
    assert added_bytes(two_together) == pytest.approx(8e6, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, it is wall-clock time")
def test_time_is_that_of_the_processor():
    assert seconds(lambda: time.sleep(0.2)) < 0.1
