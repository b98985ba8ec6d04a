"""Networks whose features metrics compare: each kind of folder, what is missing, and features kept on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from genkit.data.source import open_source
from genkit.metrics import reading
from genkit.metrics.backbones import Backbone, load_backbone
from genkit.metrics.clip import clip_score, load_clip
from genkit.metrics.reading import forget, read_features
from genkit.zoo.quality import load_judge
from tests import tiny
from tests.guidance.test_clip import tiny_clip

TIMM = "test_vit.r160_in1k"


def images(count: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches of torch, the Hub and genkit."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def works(backbone: Backbone, dimensions: int, size: tuple[int, int]) -> torch.Tensor:
    """Its features of three pictures: a vector for each, of this picture alone, not of the others."""
    assert (backbone.dimensions, backbone.size) == (dimensions, size)
    x = images(3, size)
    found = backbone(x)
    assert found.shape == (3, dimensions)
    torch.testing.assert_close(backbone(x[1:2]), found[1:2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Resize them"):
        backbone(images(1, (size[0] + 1, size[1])))
    return found


def test_the_judge() -> None:
    backbone = load_backbone("judge")
    with torch.no_grad():
        expected = load_judge().features(images(3, (32, 32)))
    torch.testing.assert_close(works(backbone, 128, (32, 32)), expected)
    assert backbone.identity() == load_backbone("judge").identity()


def test_models_of_timm(tmp_path: Path) -> None:
    """A folder that timm wrote, and the same weights in the cache of the Hub."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model(TIMM, pretrained=False)
    save_for_hf(network, tmp_path / "vit", safe_serialization=True)
    folder = load_backbone(tmp_path / "vit")
    found = works(folder, network.num_features, (160, 160))
    with torch.no_grad():
        mean, std = (torch.tensor(network.pretrained_cfg[key]).reshape(3, 1, 1) for key in ("mean", "std"))
        expected = network.eval().forward_head(network.forward_features((images(3, (160, 160)) / 2 + 0.5 - mean) / std), True)
    torch.testing.assert_close(found, expected)

    with pytest.raises(FileNotFoundError, match=f"the cache of the Hub has no timm/{TIMM}. Get them with"):
        load_backbone(f"timm:{TIMM}")
    repository = tmp_path / "hub" / f"models--timm--{TIMM}"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (tmp_path / "vit" / "model.safetensors").rename(repository / "snapshots" / "abc" / "model.safetensors")
    torch.testing.assert_close(works(load_backbone(f"timm:{TIMM}"), network.num_features, (160, 160)), found)


def test_models_of_transformers(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    works(load_backbone(tmp_path / "dino"), 16, (28, 28))
    tiny_clip().save_pretrained(tmp_path / "clip")
    found = works(load_backbone(tmp_path / "clip"), 12, (16, 16))
    assert not torch.allclose(found[0], found[1])
    tiny_clip().text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"no network of pictures|gives features"):
        load_backbone(tmp_path / "text")


def test_a_diffusion_pipeline(tiny_folder: Path) -> None:
    from genkit.features import FeatureExtractor
    from genkit.runner import load

    backbone = load_backbone(tiny_folder)
    extractor = FeatureExtractor(load(str(tiny_folder)).denoiser, "mid", t=100, pool="mean")
    found = works(backbone, extractor.pooled_shape(extractor.feature_info[0].shape)[0], extractor.size)
    torch.testing.assert_close(found, extractor(images(3, extractor.size))["mid"])


def test_inception_is_read_from_torchs_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"inception_v3_google-\w+.pth into .*checkpoints"):
        load_backbone("inception")
    from torchvision.models import Inception_V3_Weights, inception_v3

    file = tmp_path / "torch" / "hub" / "checkpoints" / Inception_V3_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(inception_v3(weights=None, init_weights=False).state_dict(), file)
    backbone = load_backbone("inception")
    assert (backbone.dimensions, backbone.size) == (2048, (299, 299))
    assert backbone(images(1, (299, 299))).shape == (1, 2048)


def test_what_is_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown features 'jduge'. Did you mean 'judge'"):
        load_backbone("jduge")
    with pytest.raises(ValueError, match="Unknown model of timm 'nothing'"):
        load_backbone("timm:nothing")
    with pytest.raises(FileNotFoundError, match="weights of dinov2 are not here"):
        load_backbone("dinov2")
    with pytest.raises(ValueError, match=r"config.json is missing"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object"):
        load_backbone(tmp_path)


class TestReading:
    def test_it_is_the_network(self) -> None:
        source, backbone = open_source("digits-test", 70), load_backbone("judge")
        found = read_features(backbone, source)
        torch.testing.assert_close(found, backbone(source.images(range(70), (32, 32))), rtol=1e-4, atol=1e-5)

    def test_an_interrupted_run_goes_on(self) -> None:
        source, judge = open_source("digits-test", 150), load_backbone("judge")
        calls: list[int] = []

        def run(images: torch.Tensor) -> torch.Tensor:
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(len(images))
            return judge.run(images)

        def backbone() -> Backbone:
            return Backbone("judge", judge.network, run, judge.size, judge.dimensions)

        with pytest.raises(KeyboardInterrupt):
            read_features(backbone(), source)
        assert calls == [64, 64]
        calls.clear()
        whole = read_features(backbone(), source)
        assert calls == [22]
        assert torch.equal(whole, read_features(judge, source, reuse=False))

    @pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "of others"])
    def test_a_damaged_file_is_made_again(self, damage: str, tmp_path: Path) -> None:
        source, backbone = open_source("digits-test", 100), load_backbone("judge")
        found = read_features(backbone, source)
        files = sorted((tmp_path / "cache").rglob("*.safetensors"))
        assert len(files) == 2
        content = bytearray(files[0].read_bytes())
        if damage == "flipped":
            content[-5] ^= 1
        broken = {"truncated": content[:-9], "emptied": b"", "of others": files[1].read_bytes()}.get(damage, content)
        files[0].write_bytes(broken)
        assert torch.equal(read_features(backbone, source), found)
        assert torch.equal(read_features(backbone, source), found)  # and is whole now
        assert not list((tmp_path / "cache").rglob(".*"))

    def test_other_pictures_and_other_weights_have_other_files(self, tmp_path: Path) -> None:
        backbone = load_backbone("judge")
        read_features(backbone, open_source("digits-test", 20))
        read_features(backbone, open_source("digits-test", 21))
        with torch.no_grad():
            backbone.network.conv_in.weight[0, 0, 0, 0] += 1
        read_features(backbone, open_source("digits-test", 20))
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
        forget(backbone.identity(), open_source("digits-test", 20))
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2

    def test_a_cache_that_cannot_be_written_costs_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file")
        assert read_features(load_backbone("judge"), open_source("digits-test", 9)).shape == (9, 128)

    def test_what_is_not_finite(self) -> None:
        with pytest.raises(FloatingPointError, match=r"'test digit .* are not finite"):
            reading.read(lambda rows: torch.full((len(rows), 1), torch.nan), "x", open_source("digits-test", 3))


class TestClip:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        tiny_clip().save_pretrained(tmp_path / "clip")
        tiny.clip_tokenizer().save_pretrained(tmp_path / "clip")
        return tmp_path / "clip"

    def test_it_is_the_cosine_of_the_network(self, folder: Path) -> None:
        from genkit.guidance import ClipEnergy

        network, tokenizer = load_clip(str(folder))
        x, texts = images(2, (16, 16)), ["a red seven", "a blue two"]
        expected = torch.cat([ClipEnergy(text, folder).similarity(x[i : i + 1]) for i, text in enumerate(texts)])
        torch.testing.assert_close(clip_score(x, texts, network, tokenizer), 100 * expected.clamp_min(0))
        with pytest.raises(ValueError, match="1 texts for 2 images"):
            clip_score(x, texts[:1], network, tokenizer)

    def test_what_is_no_clip(self, folder: Path, tiny_folder: Path) -> None:
        with pytest.raises(ValueError, match="There is no folder 'clip-vit'"):
            load_clip("clip-vit")
        (folder / "tokenizer_config.json").unlink()
        for file in folder.glob("*token*"):
            file.unlink()
        (folder / "config.json").write_text(json.dumps({"model_type": "nothing"}))
        with pytest.raises(ValueError, match="holds no image-text model"):
            load_clip(str(folder))
