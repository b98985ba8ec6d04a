"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# No test may reach the network. Set before anything imports huggingface_hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Workers of pytest-xdist share the cores, they and what they start. Set before anything imports torch.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# Shells start background jobs with Ctrl-C ignored, which commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion pipeline with random weights, saved in diffusers' layout."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.pipeline("stable_diffusion").save_pretrained(folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "Look at every operator for attention that is written by hand. Slow, and compiled functions run eagerly."
    parser.addoption("--watch-attention", action="store_true", help=text)


@pytest.fixture(autouse=True)
def fused_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test fails if its attention falls back to the unfused kernel, unless it is marked `unfused`."""
    if request.node.get_closest_marker("unfused"):
        yield
        return
    from genkit.attention import strict

    with strict(watch=request.config.getoption("--watch-attention")):
        yield
