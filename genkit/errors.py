"""Messages for wrong names: what was given, what was probably meant, what there is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error of a name that is not among `known`; the caller raises it.

    Example:
        >>> raise unknown("sampler", "eular", ["ddim", "euler"])
        ValueError: Unknown sampler 'eular'. Did you mean 'euler'? Known: ddim, euler.
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")


class UnfusedAttentionError(RuntimeError):
    """Attention that was to be fused is not; the message names the module, the reason and the remedy."""


class UnfusedAttentionWarning(UserWarning):
    """Attention is not fused; the message names the module and the reason."""
