"""The data of the embedded models: real strokes, fixed split, captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genkit.data import digits


def test_split_is_fixed_balanced_and_disjoint():
    train, train_labels = digits.strokes("train")
    test, test_labels = digits.strokes("test")
    assert train.shape == (4000, 32, 32)
    assert test.shape == (1000, 32, 32)
    assert torch.bincount(train_labels).tolist() == [400] * 10
    assert torch.bincount(test_labels).tolist() == [100] * 10
    seen = {row.numpy().tobytes() for row in train}
    assert not any(row.numpy().tobytes() in seen for row in test)
    # The split itself, so that no change of numpy or of the code moves a test digit into training unnoticed.
    assert test[:3].sum((1, 2)).tolist() == pytest.approx(EXPECTED_INK, rel=1e-5)


EXPECTED_INK = [64.5726, 144.2079, 126.3843]


def test_unknown_split():
    with pytest.raises(ValueError, match="'valid'"):
        digits.strokes("valid")


def test_a_batch_is_a_function_of_its_seed():
    a, b, c = (digits.draw("test", 50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, c.images)
    assert (a.ink != a.paper).all()
    assert a.images.abs().max() <= 1


def test_whole_split_draws_every_stroke_once():
    assert torch.bincount(digits.draw("test", 1000, seed=0).digit).tolist() == [100] * 10


def test_colours_are_those_of_the_palette():
    """The corner of a picture is paper, and the darkest stroke pixel is ink, within the jitter."""
    batch = digits.draw("train", 64, seed=0)
    palette = torch.tensor(list(digits.PALETTE.values())) / 127.5 - 1
    assert (batch.images[:, :, 0, 0] - palette[batch.paper]).abs().max() <= 10 / 127.5 + 1e-6
    contrast = (batch.images - batch.images[:, :, :1, :1]).square().sum(1).flatten(1).argmax(1)
    ink = batch.images.flatten(2)[torch.arange(64), :, contrast]
    assert (ink - palette[batch.ink]).abs().max() <= 0.2


def test_captions():
    assert digits.caption(7, 0, 2) == "a red seven on a yellow background"
    assert digits.caption(8) == "an eight"
    assert digits.caption(1, 1, 1) == "an orange one on an orange background"
    assert digits.with_articles("a 8 and a one") == "an 8 and a one"
    rng = np.random.default_rng(0)
    texts = [digits.training_caption((7, 0, 2), rng) for _ in range(2000)]
    share = texts.count("") / len(texts)
    assert 0.07 < share < 0.13
    assert {"a seven", "a red seven on a yellow background", "seven", "7", "a red digit"} <= set(texts)
    words = {word for text in texts for word in text.split()}
    assert words <= set(digits.WORDS)


def test_augmentation_moves_strokes_but_keeps_labels():
    plain, moved = (digits.draw("train", 32, seed=1, augment=a) for a in ("none", "strong"))
    assert torch.equal(plain.digit, moved.digit)
    assert not torch.equal(plain.images, moved.images)


def test_captions_are_read_back():
    rng = np.random.default_rng(0)
    names = {"digit": digits.DIGITS, "ink": digits.COLORS, "paper": digits.COLORS}
    for template in digits.FULL_TEMPLATES + digits.PARTIAL_TEMPLATES:
        for _ in range(20):
            digit, (ink, paper) = int(rng.integers(10)), rng.permutation(8)[:2].tolist()
            attributes = {"digit": digit, "ink": ink, "paper": paper}
            expected = {key: value for key, value in attributes.items() if "{" + key + "}" in template}
            text = template.format(**{key: names[key][value] for key, value in attributes.items()})
            assert digits.read_caption(digits.with_articles(text)) == expected
            assert digits.read_caption(text.upper().replace(digits.DIGITS[digit].upper(), str(digit))) == expected
    for text in ("", "a cat", "a red seven on a yellow background, please", "a red 77"):
        assert digits.read_caption(text) == {}
