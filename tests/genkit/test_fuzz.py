"""Damaged and hostile inputs: every reader raises only what it documents. `benchmarks/fuzz.py` does more of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz import attempt, draw, prepared, strategies
from tests.readers import READERS

COUNT = 150  # changes of valid files, and a third as many by hypothesis


@pytest.fixture(autouse=True)
def quiet_parsers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


@pytest.mark.parametrize("name", READERS)
def test_only_documented_errors(name: str) -> None:
    reader = READERS[name]()
    with prepared(reader) as folder:
        for content in reader.valid:
            assert attempt(reader, content, folder).kind == "read"
        rng = random.Random(1)
        outcomes = [attempt(reader, draw(reader, rng), folder) for _ in range(COUNT)]

        @settings(max_examples=COUNT // 3, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(strategies(reader))
        def run(content: bytes) -> None:
            outcome = attempt(reader, content, folder)
            assert outcome.kind in ("read", "refused"), f"{outcome.error}: {content[:80]!r}"

        run()
    wrong = [outcome.error for outcome in outcomes if outcome.kind not in ("read", "refused")]
    assert not wrong, wrong[0]
    assert any(outcome.kind == "refused" for outcome in outcomes) or not reader.errors
    assert all(len(outcome.error) < 1000 for outcome in outcomes)


def test_an_undocumented_error_is_noticed() -> None:
    """What the harness is for, on a reader that is known to be bad."""
    from tests.fuzz import Reader

    def read(path: object) -> None:
        raise KeyError("no such key")

    reader = Reader(read=read, valid=(b"{}",), name="a.json", form="json")
    with prepared(reader) as folder:
        outcome = attempt(reader, b"{}", folder)
    assert outcome.kind == "undocumented"
    assert "KeyError" in outcome.error
