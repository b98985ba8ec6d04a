"""Watching a denoiser's attention: every fused call, its place in the network and, where it reads the prompt, the prompt's keys.

Nothing is replaced. While an attention module runs, a mode sees its call of `scaled_dot_product_attention` and passes it on as it
is, so outputs keep their bits; hooks say which module it is. Where text is among the keys depends on the family, `text_keys`:

    "cross"    the keys are the text's, the queries the image's                          UNets, PixArt, Sana
    "after"    joint attention: image tokens, then text tokens                           SD3
    "before"   joint attention: text tokens, then image tokens, in both kinds of blocks  Flux
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from genkit.denoisers.base import Cond, Denoiser
from genkit.levels import Level


@dataclasses.dataclass(frozen=True)
class Attention:
    """A call of fused attention, of those rows of the network's batch that belong to the condition (not to the null condition).

    Args:
        name: the module's path in the network.
        q, k: queries (B, H, L, D) and keys (B, H, S, D).
        mask: what was added to the logits, or which keys are open; or None.
        scale: of the logits; None is 1/sqrt(D).
        level: the noise level of this evaluation.
        cond: the condition of the B samples.
        text: if the queries are the image's and the keys the text's or both: the first key of the text; else None.
        grid: rows and columns of the image that the queries are; None if they are not.
        finest: rows and columns of the finest grid in the network: the sample's, or that of its patches.
    """

    name: str
    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float | None
    level: Level
    cond: Cond
    text: int | None
    grid: tuple[int, int] | None
    finest: tuple[int, int]


Observer = Callable[[Attention], None]
_observing: ContextVar[bool] = ContextVar("genkit.attention.watching", default=False)  # what observers compute is not the network's


@contextmanager
def watching(denoiser: Denoiser, observe: Observer) -> Iterator[None]:
    """Within the block, `observe` gets every attention call of the denoiser's evaluations that have a condition.

    Graphs are kept where the evaluation keeps them. Evaluations of the null condition alone are left out.

    Args:
        observe: called right after each attention call; what it costs comes on top.

    Raises:
        ValueError: the network is compiled, or (on exit) it was evaluated and no attention was seen, since it is computed by
            something else than `scaled_dot_product_attention`.

    Example:
        >>> with watching(pipe.denoiser, lambda attention: print(attention.name, attention.q.shape)):
        ...     pipe("a red seven")
    """
    network = denoiser.network
    if hasattr(network, "_orig_mod") or any(module._compiled_call_impl is not None for module in network.modules()):
        raise ValueError("The network is compiled, so its attention cannot be watched. Use it without torch.compile.")
    watch = _Watch(denoiser, observe)
    with ExitStack() as stack:
        stack.enter_context(watch.called())
        for name, module in network.named_modules():
            if hasattr(module, "processor"):
                watch.hook(stack, name, module)
        yield
    if watch.evaluations and not watch.seen:
        raise ValueError(
            f"No attention of {denoiser.family} was seen in {watch.evaluations} evaluations: it is not computed by "
            "scaled_dot_product_attention. Use the native attention backend."
        )


class _Watch:
    """What is known of the evaluation that is running."""

    def __init__(self, denoiser: Denoiser, observe: Observer) -> None:
        self.denoiser, self.observe = denoiser, observe
        self.layout = getattr(denoiser, "text_keys", "")
        self.evaluations = self.seen = 0
        self.call: tuple[Tensor, Level, Cond, slice] | None = None

    @contextmanager
    def called(self) -> Iterator[None]:
        """The denoiser as an instance of a subclass, whose calls say at which level, and which rows have the condition."""
        watch, previous = self, type(self.denoiser)

        def call(self: Denoiser, x: Tensor, level: Level, cond: Cond | None = None, *, guidance_scale: float = 1.0) -> Any:
            if cond is None or not cond.tensors or guidance_scale == 0:
                return previous.__call__(self, x, level, cond, guidance_scale=guidance_scale)
            before, watch.call = watch.call, (x, level, cond, slice(0 if guidance_scale == 1 else len(x), None))
            watch.evaluations += 1
            try:
                return previous.__call__(self, x, level, cond, guidance_scale=guidance_scale)
            finally:
                watch.call = before

        names = {"__module__": previous.__module__, "__qualname__": previous.__qualname__, "__doc__": previous.__doc__}
        self.denoiser.__class__ = type(previous.__name__, (previous,), names | {"__call__": call})
        try:
            yield
        finally:
            self.denoiser.__class__ = previous

    def hook(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        """Listen while a module runs."""
        modes: list[_Listener] = []

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            encoder = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            mode = _Listener(lambda q, k, mask, scale: self.notice(name, encoder is not None, q, k, mask, scale))
            mode.__enter__()
            modes.append(mode)

        def leave(*_: Any) -> None:
            if modes:  # none if `enter` of this call was not reached
                modes.pop().__exit__(None, None, None)

        stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    def notice(self, name: str, encoder: bool, q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> None:
        """Tell the observer of a call."""
        if self.call is None or _observing.get():
            return
        x, level, cond, rows = self.call
        self.seen += 1
        text, grid = self.places(x, cond, encoder, q.shape[2], k.shape[2])
        patch = self.denoiser._size_multiple()
        finest = (x.shape[-2] // patch, x.shape[-1] // patch)
        if mask is not None:
            mask = mask[None, None] if mask.ndim == 2 else mask
            mask = mask[rows] if len(mask) == len(q) else mask
        if grid is not None:  # in joint attention the text has queries too
            count = grid[0] * grid[1]
            first = q.shape[2] - count if self.layout == "before" else 0
            q = q[:, :, first : first + count]
            mask = mask[:, :, first : first + count] if mask is not None and mask.shape[2] > 1 else mask
        token = _observing.set(True)
        try:
            self.observe(Attention(name, q[rows], k[rows], mask, scale, level, cond, text, grid, finest))
        finally:
            _observing.reset(token)

    def places(self, x: Tensor, cond: Cond, encoder: bool, queries: int, keys: int) -> tuple[int | None, tuple[int, int] | None]:
        """(first key of the text, the image's grid) of a call, or None for each."""
        if not self.layout:
            return None, _grid(x, queries)
        count = cond.tensors[self.denoiser.inputs[0]].shape[1]
        if self.layout == "cross":
            return 0 if encoder and keys == count else None, _grid(x, queries)
        joint = queries == keys > count and (encoder or self.layout == "before")
        grid = _grid(x, queries - count) if joint else None
        if grid is None:
            return None, _grid(x, queries)
        return 0 if self.layout == "before" else queries - count, grid


class _Listener(TorchFunctionMode):
    """Passes everything on, and says what `scaled_dot_product_attention` was called with."""

    def __init__(self, observe: Callable[[Tensor, Tensor, Tensor | None, float | None], None]) -> None:
        super().__init__()
        self.observe = observe

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            self.observe(given["query"], given["key"], given.get("attn_mask"), given.get("scale"))
        return result


def _grid(x: Tensor, count: int) -> tuple[int, int] | None:
    """Rows and columns of `count` places that a sample (B, C, h, w) has after some halvings; None if that is no number of them."""
    height, width = x.shape[-2:]
    while height * width >= count:
        if height * width == count:
            return height, width
        if height == width == 1:
            break
        height, width = -(-height // 2), -(-width // 2)
    return None
