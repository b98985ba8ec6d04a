"""Taps: names for places inside a diffusion network, and the hooks that read and change what passes there.

Blocks are numbered from 1 in the order in which they run, whatever the family:

| network      | block                                                                                                     |
|--------------|-----------------------------------------------------------------------------------------------------------|
| UNet         | "block.1" is the input convolution; then each residual unit (with its attention, if it has one) and each    |
|              | down-sampling, the middle, and each residual unit of the decoder, the last of a resolution with its         |
|              | up-sampling. In ADM-256 (Dhariwal & Nichol 2021) that is 1 to 37, 19 being the middle, as diffssl counts.   |
| transformer  | "block.N" is the N-th transformer block; Flux counts the double-stream blocks and then the single-stream ones |

"block.22.pre" is a decoder block before its up-sampling. In a UNet "mid", "down.0", "up.0" and "up.0.pre" are the middle, and the
last blocks of a resolution, by other names. Whatever has no name is reached by its module path ("down_blocks.1.resnets.0.conv1").
Tokens of the picture, in raster order, are seen as a map.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Tap:
    """A place in a network.

    Args:
        name: what the user calls it.
        module: path of the module whose output it is.
        item: which output of a module that returns several: transformer blocks return the image tokens last.
    """

    name: str
    module: str
    item: int = 0


def taps_of(network: nn.Module) -> dict[str, Tap]:
    """The named taps of a network, without other names for the same place, in the order in which they run."""
    if hasattr(network, "down_blocks") and hasattr(network, "up_blocks"):
        return {tap.name: tap for tap in _unet(network)}
    paths = [f"{name}.{i}" for name in ("transformer_blocks", "single_transformer_blocks") for i in range(_length(network, name))]
    return {f"block.{i}": Tap(f"block.{i}", path, item=-1) for i, path in enumerate(paths, 1)}


def blocks_of(network: nn.Module) -> list[str]:
    """The names of the blocks, without those before an up-sampling."""
    return [name for name in taps_of(network) if not name.endswith(".pre")]


def resolve_taps(network: nn.Module, names: str | int | Sequence[str | int]) -> list[Tap]:
    """The taps of names, other names, module paths, or positions among the blocks.

    Args:
        names: one or several. A number is a position as in timm's `out_indices`: 0 is the first block, -1 the last.

    Raises:
        ValueError: none, one twice, a position out of range, or a name that is nothing here; the message lists close ones.
    """
    wanted = [names] if isinstance(names, str | int) else list(names)
    if not wanted:
        raise ValueError("No taps were named. Name at least one, for instance 'mid' or -1.")
    known = taps_of(network)
    taps = [_resolve(network, known, name) for name in wanted]
    twice = [tap.name for i, tap in enumerate(taps) if tap.name in [other.name for other in taps[:i]]]
    if twice:
        raise ValueError(f"The tap {twice[0]!r} was named twice. Name it once.")
    return taps


def mirrors_of(network: nn.Module) -> dict[str, str]:
    """For each resolution of a UNet's decoder the block that feeds back, and the encoder block that it feeds: b and N + 1 - b.

    The block is the last but one of the resolution; ADM-256 has 21, 24, ..., 36 and 17, 14, ..., 2 (DifFeed).

    Raises:
        ValueError: the network is no UNet, or its encoder and decoder do not mirror each other.
    """
    known = taps_of(network)
    blocks = blocks_of(network)
    pairs = {}
    for i in range(_length(network, "up_blocks")):
        inside = [name for name in blocks if known[name].module.startswith(f"up_blocks.{i}.")]
        if len(inside) < 2:
            break
        number = int(inside[-2].removeprefix("block."))
        pairs[inside[-2]] = f"block.{len(blocks) + 1 - number}"
    # The middle is its own mirror image.
    middle = f"block.{(len(blocks) + 1) // 2}"
    if not pairs or len(pairs) < _length(network, "up_blocks") or known[middle].module != "mid_block":
        raise ValueError(
            f"Feedback runs from a UNet's decoder to its encoder, but {type(network).__name__} has no such mirrored blocks."
        )
    return pairs


def _length(network: nn.Module, name: str) -> int:
    return len(getattr(network, name, None) or ())


def _unet(network: Any) -> list[Tap]:
    modules: list[tuple[str, str | None]] = [("conv_in", None)]
    for i, block in enumerate(network.down_blocks):
        modules += _units(block, f"down_blocks.{i}", "downsamplers")
    if getattr(network, "mid_block", None) is not None:
        modules.append(("mid_block", None))
    for i, block in enumerate(network.up_blocks):
        modules += _units(block, f"up_blocks.{i}", "upsamplers")
    taps = []
    for number, (module, before) in enumerate(modules, 1):
        if before is not None:
            taps.append(Tap(f"block.{number}.pre", before))
        taps.append(Tap(f"block.{number}", module))
    return taps


def _units(block: Any, path: str, samplers: str) -> list[tuple[str, str | None]]:
    """(module, module before its up-sampling or None) of each unit of one resolution."""
    resnets, attentions = getattr(block, "resnets", None), getattr(block, "attentions", None)
    if resnets is None or hasattr(block, "skip_conv") or (attentions is not None and len(attentions) != len(resnets)):
        return [(path, None)]
    inside = "resnets" if attentions is None else "attentions"
    units: list[tuple[str, str | None]] = [(f"{path}.{inside}.{j}", None) for j in range(len(resnets))]
    if _length(block, samplers):
        sampler = f"{path}.{samplers}.{_length(block, samplers) - 1}"
        if samplers == "upsamplers":
            units[-1] = (sampler, units[-1][0])
        else:
            units.append((sampler, None))
    return units


def _aliases(known: dict[str, Tap]) -> dict[str, Tap]:
    """Other names of a UNet's taps: "mid", "down.I", "up.I", "up.I.pre"."""
    aliases = {}
    for name, tap in known.items():
        part, _, rest = tap.module.partition(".")
        if part == "mid_block":
            aliases["mid"] = tap
        elif part == "down_blocks":
            aliases[f"down.{rest.partition('.')[0]}"] = tap  # the last one stays
        elif part == "up_blocks":
            aliases[f"up.{rest.partition('.')[0]}" + ".pre" * name.endswith(".pre")] = tap
    return aliases


def _resolve(network: nn.Module, known: dict[str, Tap], name: str | int) -> Tap:
    if isinstance(name, int):
        blocks = [n for n in known if not n.endswith(".pre")]
        if not -len(blocks) <= name < len(blocks):
            raise ValueError(
                f"There is no block {name}: {type(network).__name__} has {len(blocks)}, counted from 0 or from -1 down."
            )
        return known[blocks[name]]
    names = known | _aliases(known)
    if name in names:
        return dataclasses.replace(names[name], name=name)
    paths = {path for path, _ in network.named_modules() if path}
    if name in paths:
        same = [tap for tap in known.values() if tap.module == name]
        return dataclasses.replace(same[0], name=name) if same else Tap(name, name)
    close = difflib.get_close_matches(name, [*names, *paths], n=5, cutoff=0.5)
    hint = f"Close names: {', '.join(close)}. " if close else ""
    ends = f"Its blocks are {next(iter(known))} to {list(known)[-1]}; any" if known else "Any"
    raise ValueError(f"{type(network).__name__} has no tap {name!r}. {hint}{ends} module path is a tap too.")


class _Exit(BaseException):
    """Ends a forward pass whose features are all there; no `except Exception` on the way may take it."""


@contextmanager
def tapped(
    network: nn.Module, taps: Sequence[Tap], *, early_exit: bool = True, inject: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect what passes the taps in one forward pass, by name; the first time, where a module runs several times.

    Args:
        early_exit: end the pass, and the block of the `with` statement, once the last of the taps has passed.
        inject: tensors (B, C, h, w) to add to the outputs at taps, by name; resized bilinearly to the map that is there.

    Example:
        >>> with tapped(unet, resolve_taps(unet, ["mid"])) as features:
        ...     unet(x, t)
        >>> features["mid"]
    """
    found: dict[str, Tensor] = {}
    end = _Exit()

    def read(tap: Tap, output: Any) -> None:
        if tap.name not in found:
            found[tap.name] = output[tap.item] if isinstance(output, tuple | list) else output
        if early_exit and len(found) == len(taps):
            raise end

    handles = []

    def watch(tap: Tap, action: Callable[[Any], Any]) -> None:
        hook = network.get_submodule(tap.module).register_forward_hook(lambda module, inputs, output: action(output))
        handles.append(hook)

    try:
        for name, value in (inject or {}).items():
            (tap,) = resolve_taps(network, name)
            watch(tap, functools.partial(_add, tap, value))
        for tap in taps:
            watch(tap, functools.partial(read, tap))
        yield found
    except _Exit as reached:
        if reached is not end:
            raise
    finally:
        for handle in handles:
            handle.remove()


def collect(
    network: nn.Module,
    taps: Sequence[Tap],
    run: Callable[[], Any],
    *,
    early_exit: bool = True,
    inject: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What passes the taps while `run` evaluates the network, by name and in the order of the taps; otherwise as `tapped`.

    Raises:
        ValueError: a tap whose module did not run, or does not give a tensor.
    """
    with tapped(network, taps, early_exit=early_exit, inject=inject) as found:
        run()
    for tap in taps:
        if tap.name not in found:
            raise ValueError(f"The module of the tap {tap.name!r} did not run. Name another.")
        value = found[tap.name]
        if not isinstance(value, Tensor):
            raise ValueError(f"The tap {tap.name!r} gives a {type(value).__name__}, no tensor. Name a module inside of it.")
    return {tap.name: found[tap.name] for tap in taps}


def _add(tap: Tap, value: Tensor, output: Any) -> Any:
    """The output of a tap's module with a resized map (B, C, h, w) added."""
    if isinstance(output, tuple | list):
        changed = list(output)
        changed[tap.item] = _add(tap, value, output[tap.item])
        return tuple(changed)
    return output + _fitted(value, output)


def _fitted(value: Tensor, output: Tensor) -> Tensor:
    if value.shape[-2:] != output.shape[-2:]:
        value = F.interpolate(value, output.shape[-2:], mode="bilinear", align_corners=False)
    return value.to(output)


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, L, C) of square patches of a sample of `size` = (h, w), in raster order, as a map (B, C, h', w').

    Tokens that no square patch explains stay as they are.
    """
    height, width = size
    patch = math.isqrt(height * width // tokens.shape[1])
    if patch == 0 or height % patch or width % patch or (height // patch) * (width // patch) != tokens.shape[1]:
        return tokens
    return rearrange(tokens, "b (h w) c -> b c h w", h=height // patch)
