"""Features on disk, and probes: resumable, refused where they do not belong, the same for any number of processes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from genkit.data.source import ImageSource
from genkit.denoisers import Denoiser
from genkit.features import FeatureCache, FeatureExtractor, Probe, ProbeConfig, train_probe
from genkit.features.cache import PIECE
from genkit.ranks import Ranks
from genkit.training import TrainConfig
from tests import tiny

ROWS = 2 * PIECE + 12


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser.of(tiny.pipeline("stable_diffusion"))


@pytest.fixture(scope="module")
def extractor(denoiser) -> FeatureExtractor:
    return FeatureExtractor(denoiser, ["mid", "block.3"], t=100, noise=2, pool=2)


def stripes(count: int = ROWS, side: int = 16) -> ImageSource:
    """Pictures of two classes that differ in the brightness of their left half."""
    g = torch.Generator().manual_seed(0)
    images = 0.4 * torch.rand(count, 3, side, side, generator=g) - 0.2
    images[0::2, :, :, : side // 2] -= 0.8
    images[1::2, :, :, : side // 2] += 0.8
    labels: list[str | int] = ["dark", "bright"] * (count // 2)
    names = [f"{i}.png" for i in range(count)]
    return ImageSource("stripes", lambda rows, size: images[list(rows)], list(range(count)), labels=labels, names=names)


@pytest.fixture(scope="module")
def cache(extractor, tmp_path_factory) -> FeatureCache:
    return FeatureCache.build(extractor, stripes(), tmp_path_factory.mktemp("cache"), dtype="float32")


def test_rows_are_the_features_of_the_images(cache, extractor):
    source = stripes()
    assert cache["mid"].shape == (ROWS, 2, 16, 2, 2)
    assert isinstance(cache["mid"], np.memmap)
    assert cache.shapes == {"mid": (16, 2, 2), "block.3": (8, 2, 2)}
    rows = [3, PIECE, ROWS - 1]
    expected = extractor(source.images(rows, (16, 16)), indices=rows)
    found = cache.features(rows)
    for tap in expected:
        assert torch.allclose(found[tap], expected[tap], atol=1e-5)
    one = extractor.draw(extractor.encode(source.images(rows, (16, 16))), 1, indices=rows)["mid"]
    assert torch.allclose(cache.features(rows, draw=1)["mid"], one, atol=1e-5)
    assert (cache.names[3], cache.labels[3]) == ("3.png", "bright")


def test_half_precision_by_default_and_several_times(denoiser, tmp_path):
    extractor = FeatureExtractor(denoiser, "mid", t=[50, 300], pool="mean")
    cache = FeatureCache.build(extractor, stripes(4), tmp_path)
    assert cache["mid"].dtype == np.float16
    assert cache["mid"].shape == (4, 1, 2, 16)
    assert cache.shapes == {"mid": (16,)}
    expected = extractor(stripes(4).images(range(4), (16, 16)))["mid"]
    assert torch.allclose(cache.features()["mid"], expected, atol=2e-3)


def test_resumes_without_making_anything_twice(cache, extractor, tmp_path):
    source = stripes()
    read = []

    def load(rows, size):
        read.extend(rows)
        if rows[0] == PIECE and len(rows) > 16:  # the second piece; the fingerprint reads 16 rows
            raise KeyboardInterrupt
        return source.load(rows, size)

    with pytest.raises(KeyboardInterrupt):
        FeatureCache.build(extractor, dataclasses.replace(source, load=load), tmp_path, dtype="float32")
    with pytest.raises(ValueError, match=r"are not finished: 2 of 3 pieces are missing. Make them with --resume"):
        FeatureCache(tmp_path)
    with pytest.raises(ValueError, match=r"already holds these features. Use --resume"):
        FeatureCache.build(extractor, source, tmp_path, dtype="float32")
    read.clear()
    done = []
    again = dataclasses.replace(source, load=lambda rows, size: (read.extend(rows), source.load(rows, size))[1])
    resumed = FeatureCache.build(extractor, again, tmp_path, dtype="float32", resume=True, progress=done.append)
    assert sum(done) == ROWS
    assert sorted(read[16:]) == list(range(PIECE, ROWS))
    for tap in ("mid", "block.3"):
        assert np.array_equal(resumed[tap], cache[tap])


def test_several_processes_make_the_same_bytes(cache, extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "wait", lambda self: None)  # one after the other, in this process
    with pytest.raises(ValueError, match="not finished: 1 of 3"):
        FeatureCache.build(extractor, stripes(), tmp_path, dtype="float32", ranks=Ranks(0, 2))
    shared = FeatureCache.build(extractor, stripes(), tmp_path, dtype="float32", ranks=Ranks(1, 2))
    for tap in ("mid", "block.3"):
        assert np.array_equal(shared[tap], cache[tap])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": "mid"}, r"made with taps mid, block.3, but mid is wanted"),
        ({"t": 101}, r"made with t 100, but 101 is wanted"),
        ({"noise": "fixed"}, r"made with noise 2, but 'fixed' is wanted"),
        ({"pool": "mean"}, r"made with taps|made with pool 2, but 'mean' is wanted"),
        ({"seed": 1}, r"made with seed 0, but 1 is wanted"),
    ],
)
def test_refuses_features_that_were_made_otherwise(cache, denoiser, change, message):
    settings = {"taps": ["mid", "block.3"], "t": 100, "noise": 2, "pool": 2} | change
    with pytest.raises(ValueError, match=message):
        FeatureCache.build(FeatureExtractor(denoiser, **settings), stripes(), cache.folder, dtype="float32", resume=True)


def test_refuses_features_of_another_model_or_of_other_data(cache, extractor):
    other = Denoiser.of(tiny.pipeline("stable_diffusion", seed=1))
    with pytest.raises(
        ValueError, match=r"made with model '\w+:[0-9a-f]{12}', but '\w+:[0-9a-f]{12}' is wanted. Use another folder"
    ):
        FeatureCache.build(
            FeatureExtractor(other, ["mid", "block.3"], t=100, noise=2, pool=2), stripes(), cache.folder, resume=True
        )
    with pytest.raises(ValueError, match=r"made with data 'stripes' \(140 rows, \w+\), but 'stripes' \(10 rows, \w+\) is wanted"):
        FeatureCache.build(extractor, stripes(10), cache.folder, dtype="float32", resume=True)
    brighter = dataclasses.replace(stripes(), load=lambda rows, size: stripes().load(rows, size) + 0.1)
    with pytest.raises(ValueError, match=r"made with data"):
        FeatureCache.build(extractor, brighter, cache.folder, dtype="float32", resume=True)
    with pytest.raises(ValueError, match=r"made with dtype 'float32', but 'float16' is wanted"):
        FeatureCache.build(extractor, stripes(), cache.folder, resume=True)


def test_refuses_what_is_no_cache(cache, extractor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no features"):
        FeatureCache(tmp_path)
    with pytest.raises(ValueError, match=r"no features of the tap 'up.0'. Cached: mid, block.3"):
        cache["up.0"]
    with pytest.raises(ValueError, match=r"Unknown dtype 'int8'"):
        FeatureCache.build(extractor, stripes(2), tmp_path, dtype="int8")
    with pytest.raises(ValueError, match=r"batch_size=0 must be at least 1"):
        FeatureCache.build(extractor, stripes(2), tmp_path, batch_size=0)
    (tmp_path / "features.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"features.json' is damaged"):
        FeatureCache(tmp_path)


def test_features_too_large_for_half_precision(denoiser, tmp_path):
    handle = denoiser.network.mid_block.register_forward_hook(lambda module, args, output: output * 1e6)
    try:
        with pytest.raises(FloatingPointError, match=r"Features of the tap 'mid' reach .* too large for float16. Use float32"):
            FeatureCache.build(FeatureExtractor(denoiser, "mid"), stripes(2), tmp_path)
    finally:
        handle.remove()


# Probes

QUICK = TrainConfig(steps=40, batch_size=16, lr=1e-2, warmup=1, ema_decay=0.5, validate_every=10, bf16=False)


def config(head: str, **changes) -> ProbeConfig:
    fusion = {"taps": ("mid", "block.3"), "t": (50, 300)} if head == "fusion" else {"taps": ("mid",), "t": (50,)}
    return ProbeConfig(**({"head": head, "width": 16, "num_heads": 2, "depth": 1, "train": QUICK} | fusion | changes))


@pytest.mark.parametrize("head", ["linear", "attention", "fusion", "feedback"])
def test_every_head_trains_is_saved_and_reads_images(head, tmp_path):
    """Two classes that the brightness of one half tells apart, even through an untrained network."""
    denoiser = Denoiser.of(tiny.pipeline("ddpm"))
    probe, figures = train_probe(denoiser, stripes(60, 8), tmp_path, config(head))
    assert figures["images"] == 60
    assert 0.8 <= figures["accuracy"] <= 1
    assert probe.accuracy(stripes(24, 8)) >= 0.8
    again = Probe.load(tmp_path, denoiser)
    images = stripes(6, 8).images(range(6), (8, 8))
    assert torch.allclose(again.logits(images), probe.logits(images), atol=1e-6)
    assert again.predict(images) == probe.predict(images)
    assert set(again.predict(images)) <= {"bright", "dark"}
    assert not any(module._forward_hooks for module in denoiser.network.modules())


def test_few_labels_are_balanced_and_chosen_by_the_seed(denoiser, tmp_path):
    _, figures = train_probe(denoiser, stripes(60), tmp_path / "a", config("linear", labels_per_class=4))
    assert figures["images"] == 8
    cached = FeatureCache(tmp_path / "a" / "features")
    assert sorted(cached.labels) == ["bright"] * 4 + ["dark"] * 4
    train_probe(denoiser, stripes(60), tmp_path / "b", config("linear", labels_per_class=4, seed=1))
    assert FeatureCache(tmp_path / "b" / "features").names != cached.names


def test_a_probe_is_refused_where_it_does_not_belong(denoiser, tmp_path):
    train_probe(denoiser, stripes(12), tmp_path, config("linear", folds=2))
    other = Denoiser.of(tiny.pipeline("stable_diffusion", seed=1))
    with pytest.raises(
        ValueError, match=r"The probe was trained on .* which has another model. Train one for it: genkit train probe"
    ):
        Probe.load(tmp_path, other)
    with pytest.raises(ValueError, match=r"which is not embedded. Give it: Probe.load\(folder, denoiser\)"):
        Probe.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no probe"):
        Probe.load(tmp_path / "features", denoiser)
    with pytest.raises(ValueError, match=r"Unknown class 'grey'. Known: bright, dark"):
        Probe.load(tmp_path, denoiser).accuracy(dataclasses.replace(stripes(2), labels=["dark", "grey"]))
    record = json.loads((tmp_path / "probe.json").read_text())
    for field, value, says in (
        ("taps", [["mid"]], "must be names or numbers of blocks"),
        ("taps", [0.5], "must be names or numbers of blocks"),
        ("t", ["100"], "must be timesteps"),
        ("seed", None, "seed=None must be a whole number"),
    ):
        (tmp_path / "probe.json").write_text(json.dumps(record | {"config": record["config"] | {field: value}}))
        with pytest.raises(ValueError, match=says):
            Probe.load(tmp_path, denoiser)
    for labels in (3, ["bright", ["dark"]]):
        (tmp_path / "probe.json").write_text(json.dumps(record | {"labels": labels}))
        with pytest.raises(ValueError, match=r"probe.json' is damaged"):
            Probe.load(tmp_path, denoiser)
    del record["config"]["taps"]
    (tmp_path / "probe.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"probe.json' is damaged"):
        Probe.load(tmp_path, denoiser)


def test_data_that_cannot_train_a_probe(denoiser, tmp_path):
    plain = dataclasses.replace(stripes(4), labels=None)
    with pytest.raises(ValueError, match=r"'stripes' has no labels. Put the images of each class in a folder of its own"):
        train_probe(denoiser, plain, tmp_path, config("linear"))
    with pytest.raises(ValueError, match=r"'stripes' has one class only, 'dark'"):
        train_probe(denoiser, dataclasses.replace(stripes(4), labels=["dark"] * 4), tmp_path, config("linear"))
    with pytest.raises(ValueError, match=r"The class 'bright' has 2 images, but 3 of each class are wanted"):
        train_probe(denoiser, stripes(4), tmp_path, config("linear", labels_per_class=3))
    with pytest.raises(ValueError, match=r"A class has one image only"):
        train_probe(denoiser, stripes(2), tmp_path / "one", config("attention"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "linaer"}, r"Unknown head 'linaer'. Did you mean 'linear'"),
        ({"head": "attention", "taps": ("mid", "block.3")}, r"The attention head takes one tap and one t, got 2 and 1"),
        ({"head": "fusion", "taps": ("mid",), "t": (50,)}, r"The fusion head takes several taps or several t"),
        ({"labels_per_class": 1}, r"labels_per_class=1 must be at least 2"),
        ({"held_out": 1.0}, r"held_out=1.0 must be a fraction"),
    ],
)
def test_wrong_probe_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        config(changes.pop("head", "linear"), **changes)
