"""A CLIP tokenizer with a small vocabulary, for the embedded text encoders: every word of the captions is one token."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer


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
