"""Heat maps of words, entropies, and what they stand on: words among tokens, and watching attention without changing it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.attention import overlay
from genkit.attention.heatmaps import record
from genkit.attention.sharpness import measure_sharpness
from genkit.attention.watching import watching
from genkit.denoisers import Denoiser
from genkit.denoisers.words import chosen_words, prompt_positions, word_positions, words_of
from genkit.pipelines import GuidedPipeline
from tests import tiny
from tests.oracles import dense_attention

FAMILIES = ["stable_diffusion", "sdxl", "sd3", "flux", "pixart_alpha", "pixart_sigma"]
PROMPTS = ["a red seven", "blue cat on paper"]
each_family = pytest.mark.parametrize("family", FAMILIES)


def pipeline(family, **config):
    return GuidedPipeline.from_pipe(tiny.pipeline(family, **config))


def draw(pipe, prompts=PROMPTS, **arguments):
    size = {"height": 16, "width": 32}
    arguments = {"num_inference_steps": 2, "output_type": "latent", "seeds": list(range(len(prompts or "1")))} | size | arguments
    return pipe(prompts, **arguments).images


# Words


def test_words_of_a_prompt():
    assert words_of("A red Seven, on red paper's edge (4k)") == ["a", "red", "seven", "on", "paper's", "edge", "4k"]
    assert chosen_words("a red seven", None) == ["a", "red", "seven"]
    assert chosen_words("a red seven", ["Seven", " red"]) == ["seven", "red"]
    with pytest.raises(
        ValueError, match=r"Unknown word of the prompt 'a red seven' 'sevn'\. Did you mean 'seven'\? Known: a, red, seven"
    ):
        chosen_words("a red seven", ["sevn"])


@each_family
def test_positions_are_where_the_tokenizer_puts_the_word(family):
    """Where two prompts differ in a word, their embeddings differ: first there (CLIP looks back only), or most there (T5)."""
    denoiser = Denoiser.of(tiny.pipeline(family))
    cond = denoiser.condition(prompts=["a red seven", "a blue seven"])
    embeds = cond.tensors["prompt_embeds"]
    positions = word_positions(denoiser, "a red seven", embeds.shape[1])
    assert list(positions) == ["a", "red", "seven"]
    change = (embeds[0] - embeds[1]).norm(dim=-1)
    reads_clip = family in ("stable_diffusion", "sdxl", "sd3")
    assert positions["red"][0] == int(change.nonzero()[0] if reads_clip else change.argmax())
    others = set(positions["a"] + positions["seven"])
    assert not others & set(positions["red"])
    assert set(prompt_positions(denoiser, "a red seven", embeds.shape[1])) > others


def test_two_text_encoders_stand_one_behind_another():
    denoiser = Denoiser.of(tiny.pipeline("sd3"))
    positions = word_positions(denoiser, "a red seven", 100)
    assert positions["red"] == [2, tiny.LENGTH + 1]  # CLIP has a start token
    assert prompt_positions(denoiser, "a red", 100) == [1, 2, 3, tiny.LENGTH, tiny.LENGTH + 1, tiny.LENGTH + 2]


def test_a_word_of_several_tokens_and_one_that_comes_twice():
    denoiser = Denoiser.of(tiny.pipeline("stable_diffusion"))
    assert word_positions(denoiser, "red cab red", tiny.LENGTH) == {"red": [1, 5], "cab": [2, 3, 4]}
    assert word_positions(denoiser, "zebra zebra red", tiny.LENGTH)["red"] == []  # cut off


def test_prompts_are_known_by_their_encoding():
    denoiser = Denoiser.of(tiny.pipeline("stable_diffusion"))
    cond = denoiser.condition(prompts=PROMPTS, negative_prompts="bad")
    assert denoiser.prompts_of(cond) == PROMPTS
    assert denoiser.prompts_of(cond[1].repeat(2)) == [PROMPTS[1]] * 2
    foreign = denoiser.condition(prompt_embeds=torch.randn(1, 8, 8))
    with pytest.raises(ValueError, match="made from embeddings"):
        denoiser.prompts_of(foreign)


# Maps


@each_family
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_recording_changes_no_bit_and_leaves_nothing_behind(family, cfg):
    pipe = pipeline(family)
    network, kind = pipe.denoiser.network, type(pipe.denoiser)
    before = draw(pipe, guidance_scale=cfg)
    processors = {name: module.processor for name, module in network.named_modules() if hasattr(module, "processor")}
    with record(pipe) as maps:
        recorded = draw(pipe, guidance_scale=cfg)
    assert torch.equal(before, recorded)
    assert type(pipe.denoiser) is kind
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
    assert processors == {name: module.processor for name, module in network.named_modules() if hasattr(module, "processor")}
    assert [image.words for image in maps] == [("a", "red", "seven"), ("blue", "cat", "on", "paper")]
    assert len(maps[0].levels) >= 2
    for image in maps:
        assert image.mean.shape[1] * 2 == image.mean.shape[2]
        for value in image.layers.values():
            assert 0 < float(value.min()) <= float(value.max()) <= 1
    assert torch.equal(before, draw(pipe, guidance_scale=cfg))


@each_family
def test_maps_are_those_of_the_dense_matrix(family):
    """Each layer's map of each word, from the queries and keys that were watched, by softmax in float64."""
    pipe = pipeline(family)
    seen = []
    with watching(pipe.denoiser, seen.append), record(pipe) as maps:
        draw(pipe, num_inference_steps=1, guidance_scale=3.0)
    layers = {}
    for attention in seen:
        if attention.text is None:
            continue
        q, k, mask = (x if x is None else x.double() for x in (attention.q, attention.k, attention.mask))
        probabilities = dense_attention(q, k, k, mask, attention.scale)[3].mean(1)
        count = attention.cond.tensors["prompt_embeds"].shape[1]
        positions = [word_positions(pipe.denoiser, prompt, count) for prompt in PROMPTS]
        layers.setdefault(attention.name, []).append((attention, probabilities, positions))
    assert list(layers) == list(maps[0].layers)
    for name, calls in layers.items():
        for i, image in enumerate(maps):
            for word in image.words:
                one = [p[i][:, [a.text + j for j in where[i][word]]].sum(-1).unflatten(0, a.grid) for a, p, where in calls]
                torch.testing.assert_close(image.of(word, layer=name).double(), sum(one) / len(one), atol=1e-5, rtol=1e-4)


def test_cross_attention_to_all_words_and_the_rest_is_one():
    """Words, start token and padding share the attention of each place: the words' maps sum to less than 1."""
    pipe = pipeline("stable_diffusion")
    with record(pipe) as maps:
        draw(pipe)
    total = maps[0].mean.sum(0)
    assert float(total.max()) < 1
    assert torch.allclose(maps[0].mean, torch.stack([value for _, value in maps[0].levels]).mean(0))


def test_maps_do_not_depend_on_the_batch():
    pipe = pipeline("stable_diffusion")
    with record(pipe) as both:
        draw(pipe)
    with record(pipe) as alone:
        draw(pipe, PROMPTS[1:], seeds=[1])
    torch.testing.assert_close(alone[0].mean, both[1].mean, atol=1e-6, rtol=1e-4)


def test_some_words_only_and_one_prompt_for_all():
    pipe = pipeline("stable_diffusion")
    with record(pipe, ["Seven"]) as maps:
        draw(pipe, ["a red seven"], seeds=[0, 1, 2])
    assert [image.words for image in maps] == [("seven",)] * 3
    size = (16, 32)
    assert maps[2].of("SEVEN", size=size).shape == size
    assert maps[2].of("seven", level=1).shape == maps[2].mean.shape[1:]


def test_what_cannot_be_recorded():
    pipe = pipeline("stable_diffusion")
    with pytest.raises(ValueError, match="Unknown word of the prompt 'blue cat on paper' 'seven'"), record(pipe, ["seven"]):
        draw(pipe)
    assert not any(module._forward_hooks for module in pipe.denoiser.network.modules())
    assert type(pipe.denoiser).__qualname__ == "StableDiffusionDenoiser"
    with pytest.raises(ValueError, match="beyond the 8 tokens"), record(pipe):
        draw(pipe, ["zebra zebra red"])
    with pytest.raises(ValueError, match="made from embeddings"), record(pipe):
        draw(pipe, None, prompt_embeds=torch.randn(1, 8, 8), seeds=[0], guidance_scale=1.0)
    with record(pipe):
        draw(pipe)
        with pytest.raises(ValueError, match="prompts changed"):
            draw(pipe, ["a blue seven"])
    for family, name in (("dit", "DiT"), ("sana", "Sana")):
        with pytest.raises(ValueError, match=f"not {name}"), record(Denoiser.of(tiny.pipeline(family))):
            pass
    with pytest.raises(ValueError, match="not StableDiffusionPipeline"), record(pipe.host):
        pass


def test_maps_that_there_are_not():
    pipe = pipeline("stable_diffusion")
    with record(pipe) as maps:
        draw(pipe)
    with pytest.raises(ValueError, match=r"Unknown word 'paper'\. Known: a, red, seven"):
        maps[0].of("paper")
    with pytest.raises(ValueError, match="Unknown layer 'mid'"):
        maps[0].of("red", layer="mid")
    with pytest.raises(ValueError, match="no level 7"):
        maps[0].of("red", level=7)
    with pytest.raises(ValueError, match="Both layer"):
        maps[0].of("red", level=0, layer=next(iter(maps[0].layers)))
    with pytest.raises(IndexError):
        maps[2]


# Watching


@pytest.mark.parametrize("cfg", [0.0, 1.0, 3.0])
def test_only_conditional_rows_are_seen(cfg):
    pipe = pipeline("stable_diffusion")
    seen = []
    with watching(pipe.denoiser, lambda attention: seen.append((len(attention.q), attention.text is None))):
        draw(pipe, num_inference_steps=1, guidance_scale=cfg)
    assert {rows for rows, _ in seen} == (set() if cfg == 0 else {2})
    assert {text for _, text in seen} == (set() if cfg == 0 else {True, False})


def test_graphs_are_kept_where_the_evaluation_keeps_them():
    pipe = pipeline("stable_diffusion")
    denoiser = pipe.denoiser
    pipe.scheduler.set_timesteps(2)
    from genkit.levels import levels_of

    level = levels_of(pipe.scheduler)[0]
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    seen = []
    with watching(denoiser, seen.append):
        denoiser(x, level, denoiser.condition(prompts=PROMPTS))
    assert all(attention.q.requires_grad for attention in seen)


def test_attention_that_is_not_fused_is_said_to_be():
    pipe = pipeline("stable_diffusion")
    pipe.denoiser.network.set_default_attn_processor()  # the one with softmax
    with pytest.raises(ValueError, match="No attention of Stable Diffusion was seen in 3 evaluations"), record(pipe):
        draw(pipe, guidance_scale=1.0)


def test_a_compiled_network_is_refused():
    pipe = pipeline("stable_diffusion")
    pipe.denoiser.network.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled"), record(pipe):
        pass


# Entropy


@each_family
def test_entropies_are_those_of_the_dense_matrix(family):
    pipe = pipeline(family)
    seen = []
    with watching(pipe.denoiser, seen.append), measure_sharpness(pipe) as sharpness:
        draw(pipe, num_inference_steps=1, guidance_scale=3.0)
    expected = {}
    for attention in seen:
        q, k, mask = (x if x is None else x.double() for x in (attention.q, attention.k, attention.mask))
        expected.setdefault(attention.name, []).append(dense_attention(q, k, k, mask, attention.scale)[2].mean((1, 2)))
    for i in range(2):
        found = sharpness.of(i)
        assert list(found["modules"]) == list(expected)
        shares = []
        for name, values in expected.items():
            row = found["modules"][name]
            assert math.isclose(row["entropy"], float(sum(values)[i]) / len(values), abs_tol=2e-5)
            shares.append(row["entropy"] / math.log(row["keys"]))
        assert math.isclose(found["mean"], sum(shares) / len(shares), abs_tol=1e-4)


# Files


def test_overlay_is_clear_where_cold_and_coloured_where_hot():
    image = Image.new("RGB", (4, 2), (100, 100, 100))
    heat = torch.zeros(2, 4)
    heat[0, 3] = 0.2
    pixels = np.asarray(overlay.overlay(image, heat)).astype(int)
    assert (pixels[1] == 100).all()
    assert pixels[0, 3, 0] > 200 > pixels[0, 3, 2]
    flat = np.asarray(overlay.overlay(image, torch.ones(2, 4)))
    assert (flat == 100).all()


def test_arrays_come_back(tmp_path):
    pipe = pipeline("stable_diffusion")
    with record(pipe) as maps:
        draw(pipe)
    path = tmp_path / "maps.npz"
    path.write_bytes(overlay.as_npz(maps[0]))
    with np.load(path) as arrays:
        assert arrays["words"].tolist() == ["a", "red", "seven"]
        assert np.array_equal(arrays["mean"], maps[0].mean.numpy())
        assert arrays["levels"].shape == (len(arrays["timesteps"]), *arrays["mean"].shape)
        assert {name for name in arrays.files if name.startswith("layer:")} == {f"layer:{name}" for name in maps[0].layers}
    sheet = overlay.sheet(Image.new("RGB", (32, 16)), maps[0])
    assert sheet.width > 3 * 96
