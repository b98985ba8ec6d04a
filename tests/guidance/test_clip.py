"""CLIP guidance on tiny random image-text models with a real tokenizer: features, preprocessing, cutouts, gradients, errors."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers

from genkit import zoo
from genkit.guidance import ClipEnergy, ClipGuidance, State, registry
from genkit.guidance.base import differentiate
from genkit.guidance.clip import CLIP_MEAN, CLIP_STD
from genkit.levels import Level
from genkit.pipelines import GuidedPipeline
from genkit.prediction import Prediction
from tests import tiny

TEXT = "a red seven"
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_clip(tokenizer=None):
    tokenizer = tokenizer or tiny.clip_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, **special}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**TOWER, "image_size": 16, "patch_size": 8}, projection_dim=12
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.CLIPModel(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(path)
    tiny.clip_tokenizer().save_pretrained(path)
    return path


def images(count=2, size=24, dtype=torch.float32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


def test_it_is_the_logit_of_the_network_itself(folder):
    x = images(3, 16)
    network = tiny_clip()
    tokens = tiny.clip_tokenizer()([TEXT], padding="max_length", max_length=tiny.LENGTH, return_tensors="pt")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        expected = network(**tokens, pixel_values=(x / 2 + 0.5 - mean) / std).logits_per_image[:, 0]
    energy = ClipEnergy(TEXT, folder)
    torch.testing.assert_close(energy(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(energy.similarity(x) * network.logit_scale.exp(), expected, rtol=1e-5, atol=1e-5)


def test_preprocessing_is_that_of_the_library(folder):
    """Resizing and normalisation against transformers' own processor, which works on bytes."""
    x = (images(1, 40) * 127.5 + 127.5).round()
    processor = transformers.CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)
    expected = processor(x[0].byte(), return_tensors="pt")["pixel_values"]
    seen = []
    energy = ClipEnergy(TEXT, folder)
    energy.network.vision_model.register_forward_pre_hook(lambda m, a, k: seen.append(k["pixel_values"]), with_kwargs=True)
    energy(x / 127.5 - 1)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0.02)


def test_a_processor_in_the_folder_decides(folder, tmp_path):
    tiny_clip().save_pretrained(tmp_path)
    tiny.clip_tokenizer().save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    energy = ClipEnergy(TEXT, tmp_path)
    assert (energy.size, energy.mean, energy.std) == (16, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert ClipEnergy(TEXT, folder).mean == CLIP_MEAN


@pytest.mark.parametrize("cutouts", [0, 3])
def test_gradient_against_finite_differences(cutouts):
    energy = ClipEnergy(TEXT, tiny_clip().double(), tokenizer=tiny.clip_tokenizer(), cutouts=cutouts)
    energy.text_features = F.normalize(energy.text_features.double(), dim=-1)
    level = Level(0.8, 0.6, 0)
    assert torch.autograd.gradcheck(
        lambda x: energy(x, level, seeds=[5]), images(1, 18, torch.float64).requires_grad_(True), fast_mode=True
    )


def test_texts_are_read_once_and_leave_no_graph(folder):
    energy = ClipEnergy([TEXT, "a blue cat"], folder)
    calls = []
    energy.network.text_model.register_forward_hook(lambda *_: calls.append(1))
    value, gradient = differentiate(energy, images())
    assert not calls
    assert gradient.shape == (2, 3, 24, 24)
    assert not energy.text_features.requires_grad
    assert not energy.network.training
    assert not any(p.requires_grad for p in energy.network.parameters())
    each = [ClipEnergy(text, folder)(images()[i : i + 1]) for i, text in enumerate([TEXT, "a blue cat"])]
    torch.testing.assert_close(torch.cat(each), value, rtol=1e-5, atol=1e-5)


def test_the_same_tower_serves_several_texts(folder):
    """Two prompts on one loaded network look at the image once."""
    network, tokenizer = tiny_clip(), tiny.clip_tokenizer()
    parts = [ClipGuidance(text, network, scale, tokenizer=tokenizer) for text, scale in ((TEXT, 1.0), ("a blue cat", -0.5))]
    calls = []
    network.vision_model.register_forward_hook(lambda *_: calls.append(1))
    level = Level(0.8, 0.6, 0)
    state = State(images(), level, [level])
    prediction = Prediction(state.x, level, state.x, "x0")
    together = (parts[0] + parts[1]).contribution(state, prediction, lambda **_: prediction)
    assert len(calls) == 1
    torch.testing.assert_close(together, sum(part.shift(state, prediction) for part in parts), rtol=1e-4, atol=1e-6)


class TestCutouts:
    def test_they_follow_seed_and_evaluation(self, folder):
        energy = ClipEnergy(TEXT, folder, cutouts=4)
        x, first, second = images(), Level(0.8, 0.6, 0, 0), Level(0.8, 0.6, 0, 1)
        both = energy(x, first, seeds=[3, 4])
        torch.testing.assert_close(energy(x[1:], first, seeds=[4]), both[1:], rtol=1e-5, atol=1e-5)
        assert torch.equal(energy(x, first, seeds=[3, 4]), both)
        assert not torch.equal(energy(x, second, seeds=[3, 4]), both)
        assert not torch.equal(energy(x, first, seeds=[5, 6]), both)
        torch.manual_seed(0)
        free = energy(x)
        assert not torch.equal(energy(x), free)

    def test_they_are_parts_of_the_image(self, folder):
        """On a constant image every cutout is the image; and oblong images are cut square."""
        x = torch.full((2, 3, 20, 30), 0.3)
        whole, cut = ClipEnergy(TEXT, folder), ClipEnergy(TEXT, folder, cutouts=3)
        torch.testing.assert_close(cut(x, seeds=[0, 1]), whole(x[..., :20]), rtol=1e-4, atol=1e-4)

    def test_the_sampler_gives_the_seeds(self, folder):
        pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
        guidance = ClipGuidance(TEXT, folder, 5.0, cutouts=2)
        settings = {"num_inference_steps": 2, "output_type": "latent", "guidance": guidance}
        together = pipe(["a cat"] * 2, seeds=[1, 2], **settings).images
        torch.testing.assert_close(pipe("a cat", seeds=[2], **settings).images, together[1:], rtol=1e-4, atol=1e-4)


def test_siglip_works_as_well(tmp_path):
    text = {**TOWER, "vocab_size": len(tiny.clip_tokenizer()), "max_position_embeddings": tiny.LENGTH, "projection_size": 16}
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    tiny.clip_tokenizer().save_pretrained(tmp_path)
    energy = ClipEnergy(TEXT, tmp_path)
    assert (energy.mean, energy.std) == ((0.5,) * 3, (0.5,) * 3)
    assert energy.similarity(images()).abs().max() <= 1
    assert differentiate(energy, images())[1].abs().sum() > 0


@pytest.mark.skipif("digits" not in zoo.names(), reason="the embedded `digits` is not in this checkout: genkit zoo train digits")
@pytest.mark.parametrize("route", ["x0_detached", "through_denoiser"])
def test_similarity_rises_on_the_embedded_model(route):
    pipe = GuidedPipeline.from_pretrained("digits")
    pipe.host.set_progress_bar_config(disable=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.path("digits") / "tokenizer")
    guidance = ClipGuidance("a red seven on a yellow background", tiny_clip(tokenizer), 8.0, route=route, tokenizer=tokenizer)
    settings = {"seeds": [0, 1, 2, 3], "num_inference_steps": 10, "output_type": "pt"}
    bare, guided = (pipe("", guidance=g, **settings).images * 2 - 1 for g in (None, guidance))
    assert (guidance.energy.similarity(guided) > guidance.energy.similarity(bare)).all()


# By name, and what can be wrong


def test_by_name(folder):
    guidance = registry.parse(f'clip:text="a red, round thing",model={folder},scale=2,cutouts=1,route=through_denoiser,stop=0.5')
    assert guidance.guidance.scale == 2
    assert guidance.guidance.needs_graph
    assert guidance.guidance.energy.cutouts == 1
    with pytest.raises(ValueError, match="needs text="):
        registry.parse("clip:scale=2")


@pytest.mark.parametrize("text", ["", "  ", [], ["a", ""], 3])
def test_bad_text(folder, text):
    with pytest.raises(ValueError, match="must be a text"):
        ClipEnergy(text, folder)


def test_wrong_number_of_texts(folder):
    with pytest.raises(ValueError, match="2 texts for 3 samples"):
        ClipEnergy(["a", "cat"], folder)(images(3))


@pytest.mark.parametrize("cutouts", [-1, 1.5])
def test_bad_cutouts(folder, cutouts):
    with pytest.raises(ValueError, match="cutouts="):
        ClipEnergy(TEXT, folder, cutouts=cutouts)


def test_models_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="Linear is no image-text model"):
        ClipEnergy(TEXT, torch.nn.Linear(2, 2), tokenizer=tiny.clip_tokenizer())
    with pytest.raises(ValueError, match="Give tokenizer="):
        ClipEnergy(TEXT, tiny_clip())
    with pytest.raises(OSError, match="no-such-folder"):
        ClipEnergy(TEXT, tmp_path / "no-such-folder")
    tiny.clip_text().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CLIPTextModel is no image-text model"):
        ClipEnergy(TEXT, tmp_path)


def test_open_clip_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"genkit-diffusion\[clip\]"):
        ClipEnergy(TEXT, "open_clip:ViT-B-32:laion2b_s34b_b79k")
    with pytest.raises(ValueError, match="open_clip:ARCHITECTURE:TAG"):
        ClipEnergy(TEXT, "open_clip:ViT-B-32")


def test_open_clip_matches_its_own_logits(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    (tmp_path / "tiny-genkit.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-genkit.json")
    network = open_clip.create_model("tiny-genkit").eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    energy = ClipEnergy(TEXT, f"open_clip:tiny-genkit:{tmp_path / 'weights.pt'}")
    x = images(2, 16)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (energy.mean, energy.std))
    with torch.no_grad():
        looks = network.encode_image((x / 2 + 0.5 - mean) / std, normalize=True)
        says = network.encode_text(open_clip.get_tokenizer("tiny-genkit")([TEXT]), normalize=True)
        expected = network.logit_scale.exp() * (looks @ says.T)[:, 0]
    torch.testing.assert_close(energy(x), expected, rtol=1e-5, atol=1e-5)
