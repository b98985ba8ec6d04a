"""Where the words of a prompt are among the tokens that a network reads.

A tokenizer says which characters each token came from; a word's tokens are those that touch it. Where several text encoders stand
one behind another (SD3: CLIP, then T5), a word has tokens in each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from genkit.errors import unknown

if TYPE_CHECKING:
    from genkit.denoisers.text import TextDenoiser

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words_of(prompt: str) -> list[str]:
    """The distinct words of a prompt in lower case, in order.

    Example:
        >>> words_of("A red seven, on red paper")
        ['a', 'red', 'seven', 'on', 'paper']
    """
    return list(dict.fromkeys(match[0].lower() for match in _WORD.finditer(prompt)))


def chosen_words(prompt: str, words: Iterable[str] | None) -> list[str]:
    """The words that were asked for, in lower case; all that the prompt has with None.

    Raises:
        ValueError: a word that the prompt does not have; the message lists those that it has.
    """
    known = words_of(prompt)
    if words is None:
        return known
    chosen = [word.strip().lower() for word in words]
    for word in chosen:
        if word not in known:
            raise unknown(f"word of the prompt {prompt!r:.100}", word, known)
    return list(dict.fromkeys(chosen))


def word_positions(denoiser: TextDenoiser, prompt: str, count: int) -> dict[str, list[int]]:
    """Positions of each word's tokens among the tokens that the network reads; every occurrence counts.

    Args:
        count: how many tokens the network reads, padding included.

    Raises:
        ValueError: a family whose tokens are not known by position.
    """
    positions: dict[str, list[int]] = {word: [] for word in words_of(prompt)}
    for text, tokens in _tokens(denoiser, prompt, count):
        for match in _WORD.finditer(text):
            found = [position for position, (start, stop) in tokens if start < match.end() and match.start() < stop]
            positions.setdefault(match[0].lower(), []).extend(found)
    return positions


def prompt_positions(denoiser: TextDenoiser, prompt: str, count: int) -> list[int]:
    """Positions of all tokens of the prompt and, behind them, of each text encoder's end token; no start token, no padding."""
    found = []
    for _, tokens in _tokens(denoiser, prompt, count):
        own = [position for position, _ in tokens]
        found += [*own, own[-1] + 1] if own and own[-1] + 1 < count else own
    return found


def _tokens(denoiser: TextDenoiser, prompt: str, count: int) -> list[tuple[str, list[tuple[int, tuple[int, int]]]]]:
    """For each tokenizer: the text that it gets, and (position, characters) of each of its tokens that is of the text."""
    if not denoiser.tokenizers:
        raise ValueError(
            f"Which tokens of {denoiser.family} belong to which word is not known. "
            "Words work with Stable Diffusion, SDXL, SD3, Flux and PixArt."
        )
    found, offset = [], 0
    for name in denoiser.tokenizers:
        tokenizer = getattr(denoiser.pipe, name)
        if tokenizer is not None:  # SD3 without T5 has zeros there
            text = denoiser._spoken(prompt, tokenizer)
            length = min(tokenizer.model_max_length, count - offset)
            encoded = tokenizer(
                text, truncation=True, max_length=length, return_offsets_mapping=True, return_special_tokens_mask=True
            )
            spans = enumerate(zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True), offset)
            found.append((text, [(position, span) for position, (span, special) in spans if not special]))
            offset += length
    return found
