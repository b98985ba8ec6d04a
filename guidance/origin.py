"""What a network that sees noisy samples was trained on, so that it is refused where it does not belong.

The record is data (JSON), kept in the network's configuration: the diffusion network, the latent space and the noise schedule, each
by a handful of its own numbers, since names and folders change. Numbers agree to 1 %, so precision does not matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from genkit import _host
from genkit.levels import kind_of

_COUNT = 32  # numbers that identify a network
_PARTS = {"network": "model", "latents": "latent space", "schedule": "noise schedule"}


def origin(pipe: Any, **how: Any) -> dict[str, Any]:
    """The record of a diffusers pipeline.

    Args:
        how: further entries, for people: how the samples were drawn.
    """
    network = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    vae = next((m for name in ("vae", "vqvae") if (m := getattr(pipe, name, None)) is not None), None)
    return {
        "name": Path(str(pipe.config.get("_name_or_path") or type(pipe).__name__)).name,
        "network": {"class": type(network).__name__, "weights": _weights(network)},
        "latents": None if vae is None else {"class": type(vae).__name__, "weights": _weights(vae)},
        "schedule": {"predicts": kind_of(pipe.scheduler), "ratios": _ratios(pipe.scheduler)},
        **how,
    }


def require_same(record: dict[str, Any] | None, pipe: Any, what: str, train: str = "discriminator") -> None:
    """Refuse a network in a pipeline other than the one that it was trained for; one without a record passes.

    Args:
        record: of the network.
        pipe: the diffusers pipeline that it will steer or read.
        what: the network, for the message.
        train: the command that trains one, after `genkit train`.

    Raises:
        ValueError: another model, latent space or noise schedule, and the message names both; a damaged record.
    """
    if record is None:
        return
    if not isinstance(record, dict) or not {*_PARTS, "name"} <= set(record):
        raise ValueError(f"The {what} does not say whole what it was trained on: it is damaged. Train it again.")
    here = origin(pipe)
    for part, name in _PARTS.items():
        if not _same(record[part], here[part]):
            raise ValueError(
                f"The {what} was trained on {record['name']!r}, but this pipeline is {here['name']!r}, which has another {name}. "
                f"Train one for it: genkit train {train} --model MODEL."
            )


def _weights(module: nn.Module) -> list[float]:
    """The middle elements of parameters spread over a module."""
    parameters = [p for _, p in sorted(module.named_parameters())]
    chosen = parameters[:: max(1, len(parameters) // _COUNT)][:_COUNT]
    return [float(f"{p.detach().flatten()[p.numel() // 2].item():.4g}") for p in chosen]


def _ratios(scheduler: Any) -> list[float] | None:
    """sigma / alpha along the training schedule; None for one that is continuous (flow matching, EDM)."""
    if _host.is_flow(scheduler) or _host.is_preconditioned(scheduler) or not hasattr(scheduler, "alphas_cumprod"):
        return None
    abar = scheduler.alphas_cumprod.double()
    # Schedulers move the last entry away from zero in their own ways.
    chosen = abar[torch.linspace(0, len(abar) - 2, 5).long()]
    return [float(f"{r:.4g}") for r in ((1 - chosen) / chosen).sqrt().tolist()]


def _same(a: Any, b: Any) -> bool:
    """Equal, with numbers to 1 %."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) <= 0.01 * max(abs(a), abs(b)) + 1e-4
    return bool(a == b)
