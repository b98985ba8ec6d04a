"""Synthetic data: each item a function of its number, interrupted and resumed, refused where it does not belong."""

from __future__ import annotations

import dataclasses
import json
import resource

import pytest
import torch

from genkit import noise, samplers
from genkit.distill import LatentDataset, SynthConfig, synthesize
from genkit.distill.shards import shard_file
from genkit.pipelines import GuidedPipeline
from genkit.ranks import Ranks
from tests import tiny

PROMPTS = ["a red seven", "a blue cat", "a green three"]
QUICK = SynthConfig(steps=2, sampler="ddim", guidance_scale=2.0, storage="float32", shard_size=4)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # sums in another order for another batch size


@pytest.fixture(scope="module")
def pipe() -> GuidedPipeline:
    return GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory) -> LatentDataset:
    """Ten items in three shards."""
    return synthesize(pipe, tmp_path_factory.mktemp("synth"), QUICK, prompts=PROMPTS, count=10)


def test_an_item_is_the_pipelines_own_sample_of_its_seed(pipe, whole):
    assert len(whole) == 10
    assert whole.prompts == [PROMPTS[i % 3] for i in range(10)]
    assert whole.seeds == [(1 << 32) + i for i in range(10)]
    assert whole.buckets == {(4, 8, 8): list(range(10))}
    own = pipe.scheduler
    pipe.scheduler = samplers.build("ddim", own)
    expected = pipe(
        whole.prompts[7], seeds=[whole.seeds[7]], num_inference_steps=2, guidance_scale=2.0, output_type="latent"
    ).images
    pipe.scheduler = own
    assert torch.allclose(whole.latents([7]), expected, **CLOSE)


def test_the_pipeline_keeps_its_sampler(pipe, whole):
    assert type(pipe.scheduler).__name__ == "PNDMScheduler"
    assert whole.record["sampler"] == "ddim"


def test_batch_and_processes_do_not_matter(pipe, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "wait", lambda self: None)  # the processes take turns here
    with pytest.raises(ValueError, match=r"1 of 3 shards .* are missing or unreadable, the first 'shard-00001.*: it is missing"):
        synthesize(pipe, tmp_path, QUICK, prompts=PROMPTS, count=10, batch_size=3, ranks=Ranks(0, 2))
    shared = synthesize(pipe, tmp_path, QUICK, prompts=PROMPTS, count=10, batch_size=1, resume=True, ranks=Ranks(1, 2))
    assert torch.allclose(shared.latents(range(10)), whole.latents(range(10)), **CLOSE)


def test_another_seed_gives_other_items(pipe, whole, tmp_path):
    other = synthesize(pipe, tmp_path, dataclasses.replace(QUICK, seed=1), prompts=PROMPTS)
    assert len(other) == 3
    assert not set(other.seeds) & set(whole.seeds)
    assert (other.latents(range(3)) - whole.latents(range(3))).abs().amax((1, 2, 3)).min() > 0.1


def test_resume_makes_only_what_is_missing(pipe, whole, tmp_path, monkeypatch):
    done = []

    def stop(items: int) -> None:
        done.append(items)
        if sum(done) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(pipe, tmp_path, QUICK, prompts=PROMPTS, count=10, batch_size=2, progress=stop)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["shard-00000.safetensors", "synth.json"]
    first = shard_file(tmp_path, 0).stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"already holds this data. Use --resume"):
        synthesize(pipe, tmp_path, QUICK, prompts=PROMPTS, count=10)
    done.clear()
    resumed = synthesize(pipe, tmp_path, QUICK, prompts=PROMPTS, count=10, resume=True, progress=done.append)
    assert shard_file(tmp_path, 0).stat().st_mtime_ns == first
    assert done == [4, 4, 2]
    assert torch.allclose(resumed.latents(range(10)), whole.latents(range(10)), **CLOSE)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "garbage"])
def test_a_damaged_shard_is_named_and_made_again(damage, pipe, whole, tmp_path):
    config = dataclasses.replace(QUICK, steps=1, shard_size=2)
    synthesize(pipe, tmp_path, config, prompts=PROMPTS, count=4)
    file, good = shard_file(tmp_path, 1), shard_file(tmp_path, 1).read_bytes()
    content, reason = {
        "truncated": (good[:-10], "truncated or damaged"),
        "foreign": (shard_file(whole.folder, 1).read_bytes(), "made with other settings"),
        "garbage": (b"garbage!" * 10, "truncated or damaged"),
    }[damage]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"1 of 2 shards .* the first 'shard-00001.safetensors': it (is|was) {reason}"):
        LatentDataset(tmp_path)
    assert len(LatentDataset(tmp_path, skip_bad=True)) == 2
    assert LatentDataset(tmp_path, skip_bad=True).skipped == ["shard-00001.safetensors"]
    assert len(synthesize(pipe, tmp_path, config, prompts=PROMPTS, count=4, resume=True)) == 4
    assert file.stat().st_size == len(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, r"it has steps 2, but here it is steps 3"),
        ({"guidance_scale": 5.0, "seed": 1}, r"guidance_scale 2.0, seed 0, but here it is guidance_scale 5.0, seed 1"),
        ({"sampler": None}, r"sampler 'ddim', but here it is sampler 'PNDMScheduler'"),
    ],
)
def test_resume_refuses_other_settings(change, message, pipe, whole):
    with pytest.raises(ValueError, match=message):
        synthesize(pipe, whole.folder, dataclasses.replace(QUICK, **change), prompts=PROMPTS, count=10, resume=True)


def test_resume_refuses_other_prompts_and_another_teacher(pipe, whole):
    with pytest.raises(ValueError, match=r"it has conditions '3 prompts .*but here it is conditions '2 prompts"):
        synthesize(pipe, whole.folder, QUICK, prompts=PROMPTS[:2], count=10, resume=True)
    other = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion", seed=1))
    with pytest.raises(ValueError, match=r"it has teacher "):
        synthesize(other, whole.folder, QUICK, prompts=PROMPTS, count=10, resume=True)


@pytest.mark.parametrize(
    ("sampler", "paired"), [("ddim", True), ("dpm++", True), ("euler", True), ("euler-a", False), ("ddpm", False)]
)
def test_pairs_are_told_from_samples_with_noise_of_their_own(sampler, paired, pipe, tmp_path):
    data = synthesize(pipe, tmp_path, dataclasses.replace(QUICK, sampler=sampler, steps=3), prompts=PROMPTS[:1])
    assert data.paired is paired
    if paired:
        assert torch.equal(data.noise([0]), noise.normal(data.seeds, (4, 8, 8)))
    else:
        with pytest.raises(ValueError, match=rf"are of the sampler '{sampler}', which adds noise"):
            data.noise([0])


def test_eta_makes_no_pairs(pipe, tmp_path):
    assert not synthesize(pipe, tmp_path, dataclasses.replace(QUICK, eta=1.0), prompts=PROMPTS).paired


@pytest.mark.parametrize("family", ["stable_diffusion", "sd3", "pixart_sigma"])
def test_stored_embeddings_are_those_of_the_prompts(family, tmp_path):
    pipe = GuidedPipeline.from_pipe(tiny.pipeline(family))
    config = SynthConfig(steps=1, embeds=True, storage="float32", shard_size=2)
    data = synthesize(pipe, tmp_path, config, prompts=PROMPTS)
    expected = pipe.denoiser.condition(prompts=[PROMPTS[2], PROMPTS[0]])
    found = data.condition(pipe.denoiser, [2, 0])
    assert found.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert torch.allclose(found.tensors[name], value, **CLOSE)
        assert torch.allclose(found.null_tensors[name], expected.null_tensors[name], **CLOSE)
        assert found.tensors[name].dtype == value.dtype


def test_stored_embeddings_need_no_text_encoder(pipe, tmp_path):
    data = synthesize(pipe, tmp_path, dataclasses.replace(QUICK, embeds=True), prompts=PROMPTS)
    blind = tiny.pipeline("stable_diffusion")
    blind.text_encoder = None
    cond = data.condition(GuidedPipeline.from_pipe(blind).denoiser, [0, 1])
    assert torch.allclose(
        cond.null().tensors["prompt_embeds"][0], pipe.denoiser.condition(prompts=[""]).tensors["prompt_embeds"][0]
    )


def test_labels_of_a_class_conditional_teacher(tmp_path):
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("dit"))
    data = synthesize(pipe, tmp_path, SynthConfig(steps=2), labels=[3, "class 7"], count=5)
    assert data.labels == [3, "class 7", 3, "class 7", 3]
    assert data.prompts is None
    assert data.condition(pipe.denoiser, [1, 0]).tensors["class_labels"].tolist() == [7, 3]
    assert data.record["storage"] == "float16"
    assert data.latents([0]).dtype == torch.float32


def test_an_unconditional_teacher(tmp_path):
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("ddim"))
    data = synthesize(pipe, tmp_path, SynthConfig(steps=2), count=3)
    assert data.shapes == [(3, 8, 8)]
    assert len(data.condition(pipe.denoiser, [0, 2])) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"steps=0 must be at least 1"),
        ({"shard_size": 0}, r"shard_size=0 must be at least 1"),
        ({"sampler": "eular"}, r"Unknown sampler 'eular'. Did you mean 'euler'"),
        ({"storage": "int8"}, r"Unknown storage 'int8'"),
        ({"seed": -1}, r"seed=-1 must be 0 to"),
        ({"seed": 2**31}, r"seed=2147483648 must be 0 to"),
        ({"eta": 1.5}, r"eta=1.5 must be 0 to 1"),
        ({"guidance_scale": float("nan")}, r"guidance_scale=nan must be 0 to 1000"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SynthConfig(**settings)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompts": []}, r"There is nothing to sample"),
        ({"prompts": [], "count": 3}, r"There is nothing to sample"),
        ({"prompts": PROMPTS, "count": 0}, r"There is nothing to sample"),
        ({"prompts": PROMPTS, "labels": [1]}, r"Both prompts and labels were given"),
        ({"labels": [1]}, r"takes no labels"),
        ({"prompts": PROMPTS, "batch_size": 0}, r"batch_size=0 must be at least 1"),
    ],
)
def test_bad_input_writes_nothing(inputs, message, pipe, tmp_path):
    with pytest.raises(ValueError, match=message):
        synthesize(pipe, tmp_path / "out", QUICK, **inputs)
    assert not (tmp_path / "out").exists()


def test_a_label_out_of_range_is_refused_before_anything_is_made(tmp_path):
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("dit"))
    with pytest.raises(ValueError, match=r"Label 1000 is out of range"):
        synthesize(pipe, tmp_path / "out", SynthConfig(steps=1), labels=[*range(990, 1000), 1000])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing_that_is_finished(pipe, tmp_path):
    config = dataclasses.replace(QUICK, steps=1, shard_size=2)
    synthesize(pipe, tmp_path, config, prompts=PROMPTS, count=4)
    shard_file(tmp_path, 1).unlink()
    size = shard_file(tmp_path, 0).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))  # files cannot grow any further, as on a full disk
    try:
        with pytest.raises(OSError, match=r"shard-00001.safetensors' cannot be written \(.*\). Finished shards are kept"):
            synthesize(pipe, tmp_path, config, prompts=PROMPTS, count=4, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["shard-00000.safetensors", "synth.json"]
    assert len(synthesize(pipe, tmp_path, config, prompts=PROMPTS, count=4, resume=True)) == 4


def test_a_disk_that_will_be_full_is_refused_at_once(pipe, tmp_path):
    with pytest.raises(OSError, match=r"The latents need 1024\d+\.\d\d GB, but the disk .* Make room"):
        synthesize(pipe, tmp_path, dataclasses.replace(QUICK, shard_size=10**10), prompts=PROMPTS, count=10**10)
    assert not list(tmp_path.iterdir())


def test_latents_that_overflow_are_not_stored(tmp_path):
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    with torch.no_grad():
        pipe.host.unet.conv_out.weight.mul_(1e9)
    with pytest.raises(FloatingPointError, match=r"latents of shard-00000.safetensors reach .* Use --storage float32"):
        synthesize(pipe, tmp_path, SynthConfig(steps=1, sampler="ddim"), prompts=PROMPTS)
    assert not shard_file(tmp_path, 0).exists()


def test_a_folder_that_cannot_be_written(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"is or lies below a file"):
        synthesize(pipe, tmp_path / "file" / "out", QUICK, prompts=PROMPTS)


def test_a_damaged_record(pipe, tmp_path):
    (tmp_path / "synth.json").write_text("{")
    with pytest.raises(ValueError, match=r"synth.json' is damaged"):
        synthesize(pipe, tmp_path, QUICK, prompts=PROMPTS, resume=True)
    (tmp_path / "synth.json").write_text(json.dumps({"format": 9, "space": {}, "shards": []}))
    with pytest.raises(ValueError, match=r"has format 9, but this genkit reads 1"):
        LatentDataset(tmp_path)
