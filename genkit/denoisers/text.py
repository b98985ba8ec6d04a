"""Conditioning by prompts: checks, negative prompts, given embeddings, and one encoding of each distinct prompt.

Prompts are encoded by the pipeline's own `encode_prompt`, padded to full length, so the embedding of a prompt does not depend
on the others in its batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser

Prompts = str | Sequence[str]
_CHUNK = 32  # prompts encoded at once: enough to keep a device busy, few enough for the largest text encoders


class TextDenoiser(Denoiser):
    """A denoiser whose condition is text.

    `inputs` names the embeddings as the pipeline's `encode_prompt` does (`prompt_embeds`, ...); `condition` also takes them,
    and with `negative_` in front those of the null condition, as tensors. Gradients flow through tensors that were given.
    """

    options: ClassVar[tuple[str, ...]] = ("max_sequence_length",)
    """Arguments of `encode_prompt` that `condition` passes on."""
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    """The pipeline's tokenizers whose tokens, one's behind the other's, are those of `inputs[0]`; () if it is not so simple."""
    text_keys: ClassVar[str] = "cross"
    """Where text is among attention's keys: see `genkit.attention.watching`."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._encoded: dict[Any, dict[str, Tensor]] = {}

    @abstractmethod
    def _encode(self, prompts: list[str], negative: bool, options: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors `inputs` (B, ...) of B prompts; `negative` says that they are of the null condition."""

    def condition(
        self,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
        *,
        grad: bool = False,
        **embeds_and_options: Any,
    ) -> Cond:
        """Conditioning from B prompts, or from embeddings.

        Args:
            prompts: one, or B.
            negative_prompts: of the null condition: one for all, or B; by default what the pipeline takes, mostly the empty one.
            grad: encode the prompts anew, with a graph to the text encoder; the null condition stays without one.
            embeds_and_options: instead of prompts the tensors `self.inputs` (B, ...), and with `negative_` in front those of the
                null condition; and `self.options`, as `encode_prompt` has them.

        Raises:
            ValueError: neither or both of prompts and embeddings, a wrong number of negative prompts, an unknown input.
        """
        extra = dict(embeds_and_options)
        embeds = self._pop_embeds(extra, "")
        negative_embeds = self._pop_embeds(extra, "negative_")
        options = {name: value for name in self.options if (value := extra.pop(name, None)) is not None}
        self._refuse(extra, "prompts", "negative_prompts", *self.inputs, *(f"negative_{i}" for i in self.inputs), *self.options)
        if (prompts is None) == (embeds is None):
            raise ValueError(f"Give either prompts or {', '.join(self.inputs)}.")
        if negative_prompts is not None and negative_embeds is not None:
            raise ValueError("Both negative_prompts and negative embeddings were given. Give one of them.")
        tensors = self._encode_all(_strings("prompts", prompts), False, options, grad=grad) if embeds is None else embeds
        if negative_embeds is None:
            count = len(next(iter(tensors.values())))
            negative_embeds = self._null(tensors, _negatives(negative_prompts, count), options)
        return Cond(tensors, negative_embeds)

    def prompts_of(self, cond: Cond) -> list[str]:
        """The prompt of each of B conditions that `condition` made from prompts, found by what it was encoded to.

        Raises:
            ValueError: embeddings that were given, or a prompt that was forgotten.
        """
        name = self.inputs[0]
        known = [(key[0], tensors[name]) for key, tensors in self._encoded.items() if not key[1]]
        prompts = []
        for row in cond.tensors[name]:
            found = [prompt for prompt, value in known if value.shape == row.shape and torch.equal(value.to(row), row)]
            if not found:
                raise ValueError("The prompts are not known: the condition was made from embeddings. Make it from prompts.")
            prompts.append(found[0])
        return prompts

    def forget(self) -> None:
        """Drop the encoded prompts; call it after a change of the text encoder or the tokenizer (LoRA, textual inversion)."""
        self._encoded.clear()

    def _spoken(self, prompt: str, tokenizer: Any) -> str:
        """A prompt as the pipeline gives it to a tokenizer."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return prompt if convert is None else convert(prompt, tokenizer)

    def _pop_embeds(self, extra: dict[str, Any], prefix: str) -> dict[str, Tensor] | None:
        given = {name: value for name in self.inputs if (value := extra.pop(prefix + name, None)) is not None}
        missing = [prefix + name for name in self.inputs if name not in given]
        if given and missing:
            raise ValueError(f"{', '.join(prefix + name for name in given)} came without {', '.join(missing)}. Give them all.")
        return {name: value.to(self.device) for name, value in given.items()} or None

    def _null(self, tensors: dict[str, Tensor], prompts: list[str] | None, options: dict[str, Any]) -> dict[str, Tensor] | None:
        """The null condition for `tensors`; None if it would have to be encoded and the pipeline came without text encoders."""
        if prompts is None:
            encoders = (getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
            if all(encoder is None for encoder in encoders) and _key("", True, options) not in self._encoded:
                return None
            prompts = [""] * len(next(iter(tensors.values())))
        return self._encode_all(prompts, True, options)

    def _encode_all(self, prompts: list[str], negative: bool, options: dict[str, Any], *, grad: bool = False) -> dict[str, Tensor]:
        """Tensors (B, ...) of B prompts; each distinct one is encoded once in the denoiser's life or, with `grad`, in this call."""
        encoded = {} if grad else self._encoded
        keys = [_key(prompt, negative, options) for prompt in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in encoded]
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            with torch.set_grad_enabled(grad):
                tensors = self._encode([key[0] for key in chunk], negative, options)
            for i, key in enumerate(chunk):
                encoded[key] = {name: v[i] for name, v in tensors.items()}
        return {name: torch.stack([encoded[key][name] for key in keys]).to(self.device) for name in self.inputs}


def _key(prompt: str, negative: bool, options: dict[str, Any]) -> tuple[str, bool, str]:
    """What the embedding of a prompt depends on."""
    return prompt, negative, repr(sorted(options.items()))


def _strings(name: str, prompts: Prompts | None) -> list[str]:
    values = [prompts] if isinstance(prompts, str) else list(prompts or [])
    wrong = [value for value in values if not isinstance(value, str)]
    if not values or wrong:
        raise ValueError(f"{name}={prompts!r} is not a string or a list of strings. Give at least one string.")
    return values


def _negatives(prompts: Prompts | None, count: int) -> list[str] | None:
    """One negative prompt for each of `count` samples; None if none was given."""
    if prompts is None:
        return None
    values = _strings("negative_prompts", prompts)
    if isinstance(prompts, str):
        return values * count
    if len(values) != count:
        raise ValueError(f"There are {len(values)} negative_prompts for {count} prompts. Give one for all, or one for each.")
    return values
