"""`genkit attention audit`, and `--attn` on the commands that run a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.images import read_text
from tests import tiny

pytestmark = pytest.mark.unfused  # on purpose


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")


@pytest.fixture(scope="module")
def sana_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sana"
    tiny.pipeline("sana").save_pretrained(folder)
    return folder


class TestAudit:
    def test_an_embedded_model_forward_and_backward(self) -> None:
        result = run("attention", "audit", "--model", "digits", "--backward", "--check", "--json")
        assert result.exit_code == 0, result.stderr
        document = json.loads(result.stdout)
        assert set(document) == {"fused", "unfused", "unproven", "modules"}
        assert document["unfused"] == document["unproven"] == 0
        modules = document["modules"]
        assert {module["path"].split(".")[0] for module in modules} == {"text_encoder", "unet", "vae"}
        assert all(m["backward"]["fused"] == m["forward"]["fused"] == 1 for m in modules if m["path"].startswith("unet"))
        assert document["fused"] == sum(m[way]["fused"] for m in modules for way in ("forward", "backward"))

    def test_a_table_for_people_with_what_to_change(self, sana_folder: Path) -> None:
        result = run("attention", "audit", "--model", sana_folder, "--check")
        assert result.exit_code == 1
        assert "softmax" in result.stdout
        assert "Encode text once" in " ".join(result.stdout.split())
        assert "attention calls are unfused" in result.stderr
        assert run("attention", "audit", "--model", sana_folder, "--quiet").stdout == ""

    def test_another_size_and_kernel(self, tiny_folder: Path) -> None:
        result = run("attention", "audit", "--model", tiny_folder, "--size", "32x16", "--attn", "math", "--json")
        modules = json.loads(result.stdout)["modules"]
        assert all(bool(m["forward"]["unfused"]) == m["path"].startswith("unet") for m in modules)

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (["--model", "digts"], "Did you mean 'digits'"),
            (["--model", "digits", "--size", "31x32"], "width=31"),
            (["--model", "digits-judge"], "no diffusion pipeline"),
            (["--dtype", "float3"], "Unknown dtype"),
            (["--attn", "cudn"], "Did you mean 'cudnn'"),
        ],
    )
    def test_bad_input(self, line: list[str], says: str) -> None:
        result = run("attention", "audit", *line)
        assert result.exit_code == 2
        assert says in result.stderr


class TestSample:
    def test_the_account_is_in_the_side_car_and_the_png(self, tiny_folder: Path, tmp_path: Path) -> None:
        line = ["sample", "a red seven", "--model", tiny_folder, "--steps", 2, "--seeds", "0,1"]
        assert run(*line, "--out", tmp_path / "a").exit_code == 0
        sidecars = [json.loads(path.read_text())["attention"] for path in sorted((tmp_path / "a").glob("a-red*.json"))]
        assert sidecars[0] == sidecars[1]
        assert sidecars[0]["mode"] == "auto"
        assert sidecars[0]["fused"] > 8
        assert not any(sidecars[0][key] for key in ("unfused", "unproven", "modules", "fallbacks", "exceptions"))
        pngs = sorted((tmp_path / "a").glob("a-red*.png"))
        told = json.loads(read_text(pngs[0])["genkit"])["attention"]
        assert told == {key: sidecars[0][key] for key in ("fused", "unfused", "unproven", "exceptions")}
        assert run("sample", "--from", pngs[0], "--model", tiny_folder, "--out", tmp_path / "b").exit_code == 0
        assert run(*line, "--attn", "strict", "--out", tmp_path / "c").exit_code == 0
        for name in (pngs[0].name, pngs[1].name):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()

    def test_unfused_by_request(self, tiny_folder: Path, tmp_path: Path) -> None:
        line = ["sample", "a", "--model", tiny_folder, "--steps", 2, "--sampler", "ddim", "--attn", "math", "--out", tmp_path]
        result = run(*line)
        assert result.exit_code == 0
        assert "Warning" not in result.stderr
        (sidecar,) = (json.loads(path.read_text())["attention"] for path in tmp_path.glob("a-*.json"))
        assert (sidecar["mode"], sidecar["unfused"], sidecar["exceptions"]) == ("math", 8, {"attention math": 16})

    def test_what_never_fuses_is_a_line_on_stderr_or_an_error(self, sana_folder: Path, tmp_path: Path) -> None:
        line = ["sample", "a", "--model", sana_folder, "--steps", 1, "--out", tmp_path]
        result = run(*line)
        assert result.exit_code == 0
        assert "Warning: text_encoder never fuses (Gemma2Model" in result.stderr
        assert "proof.py" not in result.stderr
        refused = run(*line[:-1], tmp_path / "b", "--attn", "strict")
        assert refused.exit_code == 2
        assert refused.stderr.count("Error: text_encoder never fuses") == 1
        assert "Warning" not in run(*line[:-1], tmp_path / "c", "--quiet").stderr


@pytest.mark.parametrize("command", ["classify", "features", "synth"])
def test_other_commands_have_it_in_their_documents(command: str, tiny_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (16, 16), "red").save(picture)
    lines: dict[str, list[object]] = {
        "classify": [picture, "--labels", "seven,cat", "--prompt", "a {}", "--pairs", 2, "--model", tiny_folder],
        "features": [picture.parent, "--taps", "mid", "--t", 100, "--out", tmp_path / "f", "--model", tiny_folder],
        "synth": ["--prompt", "a", "--count", 1, "--steps", 2, "--out", tmp_path / "s", "--teacher", tiny_folder],
    }
    result = run(command, *lines[command], "--attn", "flash", "--json")
    assert result.exit_code == 0, result.stderr
    account = json.loads(result.stdout)["attention"]
    assert account["mode"] == "flash"
    assert account["unfused"] == account["unproven"] == 0 < account["fused"]
    refused = run(command, *lines[command], "--attn", "efficient")
    assert refused.exit_code == 2
    assert "is not usable here: torch has no such kernel for cpu. Usable: auto, strict, flash, math." in refused.stderr
