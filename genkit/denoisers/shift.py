"""Resolution-dependent timestep shift of flow-matching models.

A larger picture needs more noise to hide the same detail, so its schedule is shifted by exp(mu), with mu linear in the number
of tokens (Esser et al. 2024, arXiv 2403.03206, section 5.3.2; the line is a convention of the released models).
"""

from __future__ import annotations

from typing import Any


def resolution_shift(config: Any, tokens: int, max_shift: float) -> float:
    """mu for a picture of `tokens` tokens.

    Args:
        config: a flow-matching scheduler's configuration, which may hold the two points of the line.
        tokens: number of patches that the network sees.
        max_shift: the shift at the larger point, where the configuration does not say it.
    """
    x0, x1 = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    y0, y1 = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    # Slope and intercept, not y0 + m (tokens - x0): the same rounding as in the stock pipelines.
    m = (y1 - y0) / (x1 - x0)
    return tokens * m + (y0 - m * x0)
