"""Many samples against many prompts, without computing or copying anything twice.

A diffusion classifier evaluates rows (sample m, prompt n). The plain batch has a copy of prompt n in each of its rows, and every
cross-attention projects each copy to keys and values. But these depend on neither the sample nor the time, so, exactly:

    attention(Q_mn, K_n, V_n)  for all m  =  attention([Q_1n; ...; Q_Mn], K_n, V_n)          (queries are independent of each other)

* Query folding: the M samples of a prompt are folded into its query length, Q (N, H, M L, D) against K, V (N, H, S, D).
* Prompt cache: each layer projects each prompt once, for all batches.
* Shared prefix: what comes before the first cross-attention is computed once for each sample (`genkit.attention.prefix`).

The network's own processors do all of it: they are called with folded rows, and `to_k`, `to_v` return what is known. Batches need
not be rectangular: see `Layout`. Networks whose prompts do not enter through cross-attention (SD3 and Flux have joint attention,
DiT has labels) and those that something else has changed (compiled ones, offloading by groups, foreign processors) are evaluated
plainly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from genkit import _host
from genkit.attention.prefix import Marked, Stop, record, replaced, replayed, trace
from genkit.denoisers.base import Cond, Denoiser
from genkit.levels import Level
from genkit.prediction import Prediction

_CHUNK = 32  # prompts that are projected at once
CACHE_BYTES = 2**30


class Evaluator(Protocol):
    """Evaluates a denoiser on rows (sample, prompt)."""

    def __call__(self, x: Tensor, level: Level, samples: Tensor, prompts: Tensor) -> Prediction:
        """
        Args:
            x: distinct noisy samples (U, ...), on the device of the denoiser.
            level: their levels, batched.
            samples, prompts: the sample and the prompt of each row, (B,) of integers.

        Returns:
            The prediction of B rows.
        """


def evaluator(denoiser: Denoiser, cond: Cond, *, fold: bool = True, cache_bytes: int = CACHE_BYTES) -> Evaluator:
    """The fastest exact way to evaluate samples under the N rows of `cond`. Not differentiable.

    The evaluator keeps what it knows of the prompts: make a new one after a change of weights, processors or adapters.

    Args:
        fold: False evaluates the plain batch.
        cache_bytes: of keys and values that are kept, 1 GiB by default; in float16 a prompt has 3.8 MB of them in Stable Diffusion
            1.5, and 26 MB in SDXL. Layers beyond it project each prompt of a batch once a batch.

    Example:
        >>> evaluate = evaluator(denoiser, denoiser.condition(prompts=["a seven", "a two"]))
        >>> eps = evaluate(x, level, torch.tensor([0, 0]), torch.tensor([0, 1])).eps       # both prompts on the first sample
    """
    attentions = _host.cross_attentions(denoiser.network) if fold and denoiser.cross_attended else None
    if not attentions or not set(denoiser.cross_attended) <= set(cond.tensors):
        return _Plain(denoiser, cond)
    return _Folded(denoiser, cond, attentions, cache_bytes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order in which rows are evaluated: groups of `size` rows of one prompt, then rows that fill no group.

    Args:
        order: (B,) number of each row.
        size: rows of a group.
        groups: (G,) prompt of each group.
        rest: (R,) prompt of each of the other rows; B = G size + R.

    K and V are read G + R times: once a prompt if all have equally many rows, once a row if all rows differ. The size is that with
    the fewest, of powers of two and the numbers of rows of the prompts.
    """

    order: Tensor
    size: int
    groups: Tensor
    rest: Tensor

    @classmethod
    def of(cls, prompts: Tensor) -> Layout:
        """The layout of rows with the given prompts (B,)."""
        order = torch.argsort(prompts, stable=True)
        names, counts = torch.unique_consecutive(prompts[order], return_counts=True)
        sizes = sorted({*counts.tolist(), *(1 << i for i in range(int(counts.max()).bit_length()))})
        size = min(sizes, key=lambda m: int((counts // m + counts % m).sum()))
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        grouped = torch.arange(len(prompts)) - first < torch.repeat_interleave(counts // size * size, counts)
        rest = order[~grouped]
        return cls(torch.cat([order[grouped], rest]), size, names.repeat_interleave(counts // size), prompts[rest])


def tiled(samples: np.ndarray, prompts: np.ndarray, batch_size: int) -> np.ndarray:
    """An order of items (n,) in which batches of `batch_size` are blocks of samples x prompts.

    Where a batch has no room for 8 samples under all prompts, it takes 8 samples and a part of the prompts, so that both are
    shared. Samples are taken in order.
    """
    if 8 * len(np.unique(prompts)) <= batch_size:
        return np.argsort(samples, kind="stable")
    block = np.unique(samples, return_inverse=True)[1] // 8
    return np.lexsort((samples, prompts, block))


@dataclasses.dataclass(frozen=True)
class _Plain:
    """One copy of a sample and of a prompt in each row."""

    denoiser: Denoiser
    cond: Cond

    @torch.no_grad()
    def __call__(self, x: Tensor, level: Level, samples: Tensor, prompts: Tensor) -> Prediction:
        index = prompts.to(self.denoiser.device)
        condition = Cond({name: value[index] for name, value in self.cond.tensors.items()})
        return self.denoiser(x[samples.to(x.device)], level[samples], condition)


class _Folded:
    """See the top of the file."""

    def __init__(self, denoiser: Denoiser, cond: Cond, attentions: list[nn.Module], cache_bytes: int) -> None:
        self.denoiser, self.attentions, self.cache_left = denoiser, attentions, cache_bytes
        self.cond = Cond({name: value.to(denoiser.device) for name, value in cond.tensors.items()})
        self.cache: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.prefix: list[nn.Module] | None = None
        self.text = torch.empty(0)
        self.mask: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, level: Level, samples: Tensor, prompts: Tensor) -> Prediction:
        if self.prefix is None:
            self._read_prompts(x[:1], level[:1])
        assert self.prefix is not None
        layout = Layout.of(prompts)
        rows = samples[layout.order]
        index = rows.to(x.device)
        run = partial(self.denoiser, x[index], level[rows], self._condition(prompts[layout.order]))
        with ExitStack() as stack:
            if self.prefix and len(x) < len(rows):
                first = partial(self.denoiser, x, level, self._condition(torch.zeros(len(x), dtype=torch.long)))
                stack.enter_context(replayed(self.prefix, record(self.prefix, first), index))
            batch = _Batch(self, layout, x.device)
            for attention in self.attentions:
                stack.enter_context(replaced(attention, partial(batch.attend, attention, attention.forward)))
            prediction = run()
        back = torch.argsort(layout.order).to(x.device)
        variance = None if prediction.variance is None else prediction.variance[back]
        return Prediction(x[samples.to(x.device)], level[samples], prediction.raw[back], prediction.kind, variance)

    def projected(self, attention: Any, prompts: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Keys and values of all prompts, or of some where the cache is full; and whether they are of all."""
        if attention in self.cache:
            return *self.cache[attention], True
        size = 2 * len(self.text) * self.text.shape[1] * attention.inner_kv_dim * self.text.element_size()
        if size > self.cache_left:
            text = self.text[prompts]
            return attention.to_k(text), attention.to_v(text), False
        chunks = [(attention.to_k(text), attention.to_v(text)) for text in self.text.split(_CHUNK)]
        self.cache[attention] = torch.cat([k for k, _ in chunks]), torch.cat([v for _, v in chunks])
        self.cache_left -= size
        return *self.cache[attention], True

    def _condition(self, prompts: Tensor) -> Cond:
        """The condition of rows, with a single token in place of their text, which the attention has already."""
        index = prompts.to(self.denoiser.device)
        tensors = {name: value[index] for name, value in self.cond.tensors.items() if name not in self.denoiser.cross_attended}
        for name in self.denoiser.cross_attended:
            tensors[name] = (token := self.cond.tensors[name][:1, :1]).expand(len(index), *token.shape[1:])
        return Cond(tensors)

    def _read_prompts(self, x: Tensor, level: Level) -> None:
        """The text as cross-attention gets it, after whatever the network does to it first; and the prefix."""
        taken: list[tuple[Tensor, Tensor | None]] = []

        def take(hidden: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> None:
            mask = None if attention_mask is None else attention_mask.as_subclass(Tensor)
            taken.append((encoder_hidden_states.as_subclass(Tensor), mask))
            raise Stop

        def run(index: Tensor) -> Any:
            tensors: dict[str, Tensor] = {name: value[index].as_subclass(Marked) for name, value in self.cond.tensors.items()}
            return self.denoiser(x.expand(len(index), *x.shape[1:]), level[[0] * len(index)], Cond(tensors))

        count, prefixes = len(self.cond), []
        with ExitStack() as stack:
            for attention in self.attentions:
                stack.enter_context(replaced(attention, take))
            for start in range(0, count, _CHUNK):
                # At least two rows, so that a batch can be told from a constant.
                index = torch.arange(start, max(min(start + _CHUNK, count), start + 2), device=x.device) % count
                prefixes.append(trace(self.denoiser.network, len(index), partial(run, index)))
        text = torch.cat([t for t, _ in taken])[:count]
        masks = [m for _, m in taken if m is not None]
        self.text, self.mask = attended(text, torch.cat(masks)[:count]) if masks else (text, None)
        self.prefix = prefixes[0]


class _Batch:
    """The cross-attentions of one batch."""

    def __init__(self, folded: _Folded, layout: Layout, device: torch.device) -> None:
        self.folded, self.layout = folded, layout
        prompts = torch.cat([layout.groups, layout.rest])
        used, places = torch.unique(prompts, return_inverse=True)
        parts = [len(layout.groups), len(layout.rest)]
        self.used = used.to(device)
        self.prompts = [_Index(p, len(folded.text), device) for p in prompts.split(parts)]  # among all prompts
        self.places = [_Index(p, len(used), device) for p in places.split(parts)]  # among the used ones

    def attend(
        self, attention: Any, forward: Callable[..., Tensor],
        hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, **named: Any,
    ) -> Tensor:  # fmt: skip
        """In place of `attention.forward`: hidden states (B, L, C), in the order of the layout; text and mask are not looked at."""
        folded, count = self.folded, len(self.layout.groups)
        keys, values, complete = folded.projected(attention, self.used)
        split = count * self.layout.size
        parts = [hidden_states[:split].reshape(count, -1, hidden_states.shape[-1]), hidden_states[split:]]
        outputs = []
        for part, prompts, rows in zip(parts, self.prompts, self.prompts if complete else self.places, strict=True):
            if not len(part):
                continue
            mask = None if folded.mask is None else prompts.of(folded.mask)
            with replaced(attention.to_k, _returning(rows.of(keys))), replaced(attention.to_v, _returning(rows.of(values))):
                # The processor reads off its shape alone.
                text = folded.text[:1].expand(len(part), -1, -1)
                outputs.append(forward(part, encoder_hidden_states=text, attention_mask=mask, **named))
        outputs = [output.reshape(-1, *hidden_states.shape[1:]) for output in outputs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Index:
    """Picks rows of tables of `count` rows, without a copy where it picks all of them in their order."""

    def __init__(self, rows: Tensor, count: int, device: torch.device) -> None:
        self.rows = None if torch.equal(rows, torch.arange(count)) else rows.to(device)

    def of(self, table: Tensor) -> Tensor:
        return table if self.rows is None else table.index_select(0, self.rows)


def _returning(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: value


def attended(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Text (N, S, C) and bias (N, 1, S) without the tokens that no prompt attends to: most of the padding of T5 and Gemma.

    Their bias is -10,000, so their weight is exactly 0. Where nothing is left to be masked, the mask is None.
    """
    heard = mask[:, 0] > -5000
    if not bool(heard.any(1).all()):  # a softmax over nothing but masked tokens is uniform
        return text, mask
    text, mask = text[:, heard.any(0)], mask[:, :, heard.any(0)]
    return text, mask if bool(mask.any()) else None
