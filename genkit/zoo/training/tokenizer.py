"""A CLIP tokenizer with a small vocabulary, for the embedded text encoders: every word of the captions is one token."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_LENGTH = 77  # tokens of the longest prompt that a CLIP text encoder takes


def build_tokenizer(words: Sequence[str], max_length: int) -> CLIPTokenizer:
    """Byte-pair encoding whose merges compose each of `words` into one token; any other text falls apart into bytes.

    Args:
        max_length: `model_max_length`, to which pipelines pad.

    Raises:
        RuntimeError: a word did not become one token (the merges of another word got in the way).
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(words)], trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocabulary))
        merges_file.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)
    broken = [w for w in words if len(tokenizer(w).input_ids) != 3]
    if broken:
        raise RuntimeError(f"These words are not one token each: {', '.join(broken)}.")
    return tokenizer


def class_tokenizer(classes: Sequence[str]) -> CLIPTokenizer:
    """A tokenizer for prompts that are class names: every word of plain letters is one token, other text falls apart into bytes.

    Raises:
        ValueError: names that are one to the tokenizer (it ignores case and spaces), or one that is longer than 77 tokens.
    """
    words = sorted({word for name in classes for word in re.findall("[a-z]+", name.lower())})
    tokenizer = build_tokenizer(words or ["a"], MAX_LENGTH)
    seen: dict[tuple[int, ...], str] = {}
    for name in classes:
        ids = tuple(tokenizer(name).input_ids)
        if len(ids) > MAX_LENGTH:
            raise ValueError(f"The class name {name!r:.100} has {len(ids)} tokens, more than {MAX_LENGTH}. Rename it.")
        if ids in seen:
            raise ValueError(f"The class names {seen[ids]!r} and {name!r} differ in case or spaces only. Rename one.")
        seen[ids] = name
    tokenizer.model_max_length = max(8, max(map(len, seen)))
    return tokenizer
