"""Commands that are killed at random moments; `python benchmarks/kill.py` does more of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill.py"
TRIALS = 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGKILL")
def test_nothing_is_lost_and_nothing_is_half_written(tmp_path: Path) -> None:
    """Sampling, synth, distillation and features: what was finished stays, and --resume ends where an undisturbed run does."""
    line = [sys.executable, str(SCRIPT), "--trials", str(TRIALS), "--seed", "1", "--out", str(tmp_path / "kill.json")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    results = json.loads((tmp_path / "kill.json").read_text())["commands"]
    assert set(results) == {"sample", "synth", "distill", "features"}
    for name, row in results.items():
        assert row["resumed"] == row["trials"] == TRIALS, name
        assert row["lost"] == row["half-written"] == row["not resumed"] == 0, name
        assert row["kills"] >= TRIALS, name
