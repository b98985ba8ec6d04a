"""Words that are vectors: splice trainable embeddings into a pipeline's text encoders, or load finished ones.

Textual inversion (Gal et al. 2022, arXiv 2208.01618) adds a word to the tokenizer and a row to the embedding matrix. To train
the row, `spliced` leaves the matrix alone and answers the lookup of the new word with a standalone tensor instead, so there is
no gradient for the other rows, no weight decay on them, and nothing to restore.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.tokens import SDXL_KEYS, TokenFile, load_vectors, read_tokens

Vectors = Mapping[str, Tensor]
_CLIP_L, _CLIP_G = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")
_FAMILIES = {"Stable Diffusion": {"": _CLIP_L}, "Stable Diffusion XL": dict(zip(SDXL_KEYS, (_CLIP_L, _CLIP_G), strict=True))}


def text_encoders(denoiser: Any) -> dict[str, tuple[str, str]]:
    """The names of tokenizer and text encoder of the pipeline, by the key that a token file has for them.

    Raises:
        ValueError: the family's text encoder takes no tokens, or the pipeline came without it.
    """
    if denoiser.family not in _FAMILIES:
        known = " and ".join(_FAMILIES)
        raise ValueError(f"{denoiser.family} takes no tokens: they need CLIP text encoders alone, as {known} have.")
    encoders = _FAMILIES[denoiser.family]
    for name in (name for pair in encoders.values() for name in pair):
        if getattr(denoiser.pipe, name, None) is None:
            raise ValueError(f"The pipeline came without its {name}, so it knows no words. Load it with {name}.")
    return encoders


def embedding_of(denoiser: Any, text: str) -> dict[str, Tensor]:
    """The mean embedding (1, D) of the tokens of a text in each text encoder, float32, to start from.

    Raises:
        ValueError: the text has no tokens.
    """
    found = {}
    for key, (tokenizer, encoder) in text_encoders(denoiser).items():
        ids = getattr(denoiser.pipe, tokenizer)(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"The text {text!r:.60} to start from has no tokens. Give a word.")
        weight = getattr(denoiser.pipe, encoder).get_input_embeddings().weight
        found[key] = weight.detach()[ids].float().mean(0, keepdim=True)
    return found


@contextmanager
def spliced(denoiser: Any, tokens: Mapping[str, Vectors]) -> Iterator[None]:
    """Within, prompts of the pipeline may say new tokens, and gradients flow to their vectors.

    Afterwards tokenizers and text encoders are what they were; their weights are never written. Encode with
    `denoiser.condition(prompts, grad=True)`, as other prompts are cached.

    Args:
        denoiser: a `genkit.denoisers.Denoiser` with CLIP text encoders.
        tokens: vectors (n, D) for each key of `text_encoders`, by token. They are read at each lookup, so they may change.

    Raises:
        ValueError: a token that the tokenizer knows, vectors of another width, or a family without CLIP text encoders alone.

    Example:
        >>> vector = nn.Parameter(0.02 * torch.randn(1, 768))
        >>> with spliced(pipe.denoiser, {"<seven>": {"": vector}}):
        ...     cond = pipe.denoiser.condition("a photo of a <seven>", grad=True)
    """
    with ExitStack() as stack:
        for key, names in text_encoders(denoiser).items():
            stack.enter_context(_spliced_encoder(denoiser.pipe, *names, {token: v[key] for token, v in tokens.items()}))
        yield


@contextmanager
def _spliced_encoder(pipe: Any, tokenizer_name: str, encoder_name: str, tokens: dict[str, Tensor]) -> Iterator[None]:
    tokenizer, embedding = getattr(pipe, tokenizer_name), getattr(pipe, encoder_name).get_input_embeddings()
    extended = copy.deepcopy(tokenizer)
    for token, vectors in tokens.items():
        _require_new(token, tokenizer)
        if vectors.ndim != 2 or vectors.shape[1] != embedding.embedding_dim:
            width = embedding.embedding_dim
            raise ValueError(f"The vectors of {token} have shape {tuple(vectors.shape)}, but {encoder_name} needs (n, {width}).")
        extended.add_tokens([token] + [f"{token}_{i}" for i in range(1, len(vectors))])
    first = len(tokenizer)
    setattr(pipe, tokenizer_name, extended)
    try:
        with _lookup(embedding, first, list(tokens.values())):
            yield
    finally:
        setattr(pipe, tokenizer_name, tokenizer)


@contextmanager
def _lookup(embedding: nn.Module, first: int, vectors: list[Tensor]) -> Iterator[None]:
    """Within, ids from `first` on are answered by the rows of `vectors`, the others by the matrix."""
    matrix_lookup: Any = embedding.forward

    def lookup(ids: Tensor) -> Tensor:
        new = ids >= first
        known = matrix_lookup(ids.masked_fill(new, 0))
        rows = F.embedding((ids - first).clamp(min=0), torch.cat(vectors).to(known.device))
        return torch.where(new[..., None], rows.to(known.dtype), known)

    # An attribute of the instance, as accelerate has it too, so what was there is put back rather than deleted.
    had = vars(embedding).get("forward")
    embedding.forward = lookup
    try:
        yield
    finally:
        if had is None:
            del embedding.forward
        else:
            embedding.forward = had


def load_tokens(denoiser: Any, paths: Sequence[str | Path]) -> list[TokenFile]:
    """Load token files into the pipeline for good, by the host's own `load_textual_inversion`; prompts may then say the tokens.

    Raises:
        FileNotFoundError, ValueError: see `genkit.tokens.read_token`; also a token that the tokenizer knows, and one that was made
            for other text encoders. Nothing is loaded then.
    """
    encoders = text_encoders(denoiser)
    files = read_tokens(paths)
    loaded = [load_vectors(file) for file in files]
    for file, vectors in zip(files, loaded, strict=True):
        if set(vectors) != set(encoders):
            wanted = "two text encoders (clip_l, clip_g)" if len(encoders) == 2 else "one text encoder"
            raise ValueError(f"The token {str(file.path)!r} does not fit {denoiser.family}, which needs vectors for {wanted}.")
        for key, (tokenizer, encoder) in encoders.items():
            _require_new(file.token, getattr(denoiser.pipe, tokenizer))
            width = getattr(denoiser.pipe, encoder).get_input_embeddings().embedding_dim
            if vectors[key].shape[1] != width:
                has = vectors[key].shape[1]
                raise ValueError(f"The token {str(file.path)!r} has width {has}, but this model's {encoder} has {width}.")
    for file, vectors in zip(files, loaded, strict=True):
        for key, (tokenizer, encoder) in encoders.items():
            components = {"tokenizer": getattr(denoiser.pipe, tokenizer), "text_encoder": getattr(denoiser.pipe, encoder)}
            denoiser.pipe.load_textual_inversion({file.token: vectors[key]}, **components)
    denoiser.forget()
    return files


def _require_new(token: str, tokenizer: Any) -> None:
    if token in tokenizer.get_vocab():
        raise ValueError(f"The token {token} is in the tokenizer already. Choose another name.")
