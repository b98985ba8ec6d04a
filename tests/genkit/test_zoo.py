"""The embedded models, and the checks that any model folder passes before it is loaded."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from genkit import zoo
from genkit.checkpoints import check_folder, load_pt, read_shapes


class TestZoo:
    @pytest.fixture(autouse=True)
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(zoo, "ROOT", tmp_path)
        return tmp_path

    def test_lists_model_folders_only(self, root: Path) -> None:
        for name, file in (("b", "config.json"), ("a", "model_index.json"), ("c", "notes.txt")):
            (root / name).mkdir()
            (root / name / file).write_text("{}")
        assert zoo.names() == ["a", "b"]
        assert zoo.path("a") == root / "a"
        assert zoo.size("a") == 2
        assert zoo.card("a") == {}

    def test_unknown_names(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"carries no weights for 'digits'. Train them"):
            zoo.path("digits")
        (root / "digits").mkdir()
        (root / "digits" / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"Unknown embedded model 'digit'. Did you mean 'digits'"):
            zoo.path("digit")
        with pytest.raises(ValueError, match="Unknown embedded model"):
            zoo.path("../digits")
        monkeypatch.setattr(zoo, "ROOT", root / "none")
        assert zoo.names() == []

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_a_damaged_card(self, root: Path, content: str) -> None:
        (root / "a").mkdir()
        (root / "a" / "config.json").write_text("{}")
        (root / "a" / "card.json").write_text(content)
        with pytest.raises(ValueError, match=r"card\.json is not"):
            zoo.card("a")


@pytest.mark.skipif(not zoo.names(), reason="this checkout carries no embedded models yet: genkit zoo train digits")
def test_every_embedded_model_is_intact_and_has_a_card() -> None:
    total = 0
    for name in zoo.names():
        check_folder(zoo.path(name))
        assert {"data", "licence"} <= set(zoo.card(name)), name
        total += zoo.size(name)
    assert total <= 40e6


class TestCheckFolder:
    @pytest.fixture
    def folder(self, tiny_folder: Path, tmp_path: Path) -> Path:
        return shutil.copytree(tiny_folder, tmp_path / "model")

    @pytest.mark.parametrize("family", ["dit", "ddpm", "sd3", "flux", "pixart_alpha", "sana"])
    def test_all_families_pass(self, tmp_path: Path, family: str) -> None:
        from tests import tiny

        tiny.pipeline(family).save_pretrained(tmp_path)
        check_folder(tmp_path)

    def test_a_single_model_passes(self, folder: Path) -> None:
        for component in ("unet", "vae", "text_encoder"):
            check_folder(folder / component)

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            check_folder(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match="is no model folder"):
            check_folder(tmp_path)

    @pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
    def test_a_broken_index(self, folder: Path, content: str) -> None:
        (folder / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=r"is not (JSON|a JSON object)"):
            check_folder(folder)

    def test_missing_parts(self, folder: Path) -> None:
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(ValueError, match="'unet' has no weights"):
            check_folder(folder)
        shutil.rmtree(folder / "unet")
        with pytest.raises(ValueError, match="'unet' is missing"):
            check_folder(folder)

    def test_a_missing_shard(self, folder: Path) -> None:
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
        with pytest.raises(ValueError, match=r"lack the shard 'part-2\.safetensors'"):
            check_folder(folder)

    def test_missing_tensors(self, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        for component, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            weights = folder / component / f"{name}.safetensors"
            tensors = load_file(weights)
            removed = tensors.popitem()
            save_file(tensors, weights)
            with pytest.raises(ValueError, match=f"'{component}' have .* numbers but its configuration needs"):
                check_folder(folder)
            save_file(dict([*tensors.items(), removed]), weights)
        check_folder(folder)

    def test_wrong_shapes(self, folder: Path) -> None:
        config = folder / "vae" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 8}))
        with pytest.raises(ValueError, match=r"'vae' do not fit its configuration: .* is .*, not "):
            check_folder(folder)
        check_folder(folder, shapes=False)

    def test_pickles(self, folder: Path) -> None:
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        weights.with_suffix(".bin").write_bytes(b"beside safetensors, so never read")
        check_folder(folder)
        weights.unlink()
        with pytest.raises(ValueError, match="are a pickle"):
            check_folder(folder)
        check_folder(folder, allow_pickle=True)

    def test_names_in_the_index_run_nothing(self, folder: Path) -> None:
        """A class that is neither diffusers' nor transformers' is not imported; its shapes go unchecked."""
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = ["os", "system"]
        (folder / "model_index.json").write_text(json.dumps(index))
        check_folder(folder)

    def test_headers(self, folder: Path) -> None:
        shapes = read_shapes(folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert shapes["conv_in.weight"] == (8, 4, 3, 3)


def test_an_embedded_name_wins_over_a_folder_and_others_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert zoo.folder("digits") == zoo.path("digits")
    assert zoo.folder("mine") == Path("mine")
    with pytest.raises(ValueError, match="genkit zoo train autoencoder"):
        zoo.folder("autoencoder")
    (tmp_path / "autoencoder").mkdir()
    assert zoo.folder("autoencoder") == Path("autoencoder")


class TestLoadPt:
    def test_tensors_and_plain_values_come_back(self, tmp_path: Path) -> None:
        for new in (True, False):
            torch.save({"a": torch.arange(5), "b": [1, "x"]}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
            found = load_pt(tmp_path / "a.pt")
            assert found["a"].tolist() == [0, 1, 2, 3, 4]
            assert found["b"] == [1, "x"]

    def test_packed_archives_are_refused(self, tmp_path: Path) -> None:
        """Zeros pack a thousandfold, so such a file could claim any memory."""
        torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.pt")
        packed = tmp_path / "packed.pt"
        with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
            for name in archive.namelist():
                other.writestr(name, archive.read(name))
        assert packed.stat().st_size < 10**5
        with pytest.raises(ValueError, match="packed"):
            load_pt(packed)

    def test_whatever_else_is_a_value_error(self, tmp_path: Path) -> None:
        file = tmp_path / "a.pt"
        torch.save({"a": torch.zeros(10)}, file)
        whole = file.read_bytes()
        for content in (b"", b"PK\3\4", whole[: len(whole) // 2], b"\x80\x02junk", pickle.dumps(Path("x"), protocol=2)):
            file.write_bytes(content)
            with pytest.raises(ValueError):  # noqa: PT011  (the message is the library's)
                load_pt(file)
        with pytest.raises(FileNotFoundError):
            load_pt(tmp_path / "none.pt")
