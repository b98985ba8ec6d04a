"""`genkit export`: a run's student as a model that `genkit sample` and diffusers take; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.denoisers import Denoiser
from genkit.distill import FewStepSpec, load_distilled
from genkit.distill.networks import Student, Teacher
from genkit.distill.runs import _save_student
from genkit.pipelines import GuidedPipeline
from tests import tiny


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


def lora_checkpoint(folder: Path, host: Any) -> None:
    """A student's adapters as the trainer saves them."""
    teacher = Teacher(Denoiser.of(host))
    student = Student(teacher, lora_rank=2, lora_alpha=6.0)
    generator = torch.Generator().manual_seed(3)
    for parameter in student.trained():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    shutil.rmtree(folder)
    _save_student(SimpleNamespace(student=student, teacher=teacher), folder)


def write_checkpoint(folder: Path, number: int, seed: int) -> None:
    """A checkpoint with the two networks of a student that trained all weights."""
    for offset, name in enumerate(("student", "student_ema")):
        network = Denoiser.of(tiny.pipeline("stable_diffusion", seed + offset)).network
        network.save_pretrained(folder / f"checkpoint-{number}" / name)
    (folder / f"checkpoint-{number}" / "state.json").write_text("{}")


@pytest.fixture(scope="module")
def distilled(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and a third that was interrupted."""
    folder = tmp_path_factory.mktemp("run")
    config = {"method": "ladd", "teacher": str(tiny_folder), "levels": [1.0, 0.75, 0.5, 0.25], "lr": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    write_checkpoint(folder, 100, 10)
    write_checkpoint(folder, 900, 20)
    (folder / "checkpoint-1000" / "student").mkdir(parents=True)
    (folder / "checkpoint-soon").mkdir()
    return folder


@pytest.fixture(scope="module")
def turbo(distilled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("students") / "turbo"
    return out, json.loads(run("export", "--run", distilled, "--out", out, "--json").stdout)


@pytest.fixture
def spoiled(distilled: Path, tmp_path: Path) -> Path:
    """A copy of the run, to spoil."""
    return Path(shutil.copytree(distilled, tmp_path / "run"))


def weights(folder: Path) -> torch.Tensor:
    return GuidedPipeline.from_pretrained(folder).denoiser.network.conv_out.weight


def test_it_exports_the_latest_average(turbo: tuple[Path, dict], distilled: Path) -> None:
    out, document = turbo
    assert document["weights"] == str(distilled / "checkpoint-900" / "student_ema")
    assert document["levels"] == [1.0, 0.75, 0.5, 0.25]
    assert len(document["differences"]) == 6
    assert max(document["differences"].values()) < 1e-4
    expected = Denoiser.of(tiny.pipeline("stable_diffusion", 21)).network
    assert torch.equal(weights(out), expected.conv_out.weight)


def test_or_another(distilled: Path, tmp_path: Path) -> None:
    line = ("export", "--run", distilled, "--checkpoint", 100, "--which", "last", "--sampler", "posterior", "--dtype", "float16")
    (tmp_path / "figures").write_text('{"Frechet distance, 1 step": 40.5}')
    text = run(*line, "--out", tmp_path / "out", "--figures", tmp_path / "figures").stdout
    assert "from the trainer's sampler" in text
    expected = Denoiser.of(tiny.pipeline("stable_diffusion", 10)).network
    assert torch.equal(weights(tmp_path / "out"), expected.conv_out.weight.half().float())
    assert "| Frechet distance, 1 step | 40.5 |" in (tmp_path / "out" / "README.md").read_text()
    assert FewStepSpec.load(tmp_path / "out").sampler == "posterior"


def test_a_lora_run(spoiled: Path, tmp_path: Path) -> None:
    lora_checkpoint(spoiled / "checkpoint-900" / "student_ema", tiny.pipeline("stable_diffusion"))
    for format in ("lora", "pipeline"):
        run("export", "--run", spoiled, "--format", format, "--out", tmp_path / format)
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    lora, merged = (
        load_distilled(tmp_path / name)("a red seven", seeds=[3], num_inference_steps=1, output_type="latent").images
        for name in ("lora", "pipeline")
    )
    torch.testing.assert_close(lora, merged, rtol=1e-4, atol=1e-4)


def test_dry_run_writes_nothing(distilled: Path, tmp_path: Path) -> None:
    document = json.loads(run("export", "--run", distilled, "--out", tmp_path / "out", "--dry-run", "--json").stdout)
    assert document["weights"].endswith("student_ema")
    assert not list(tmp_path.iterdir())


def test_sample_knows_the_students_defaults(turbo: tuple[Path, dict], tmp_path: Path) -> None:
    line = ("sample", "a red seven", "--model", turbo[0], "--seeds", "3", "--json")
    (image,) = json.loads(run(*line, "--out", tmp_path / "default").stdout)["images"]
    assert (image["recipe"]["steps"], image["recipe"]["cfg"]) == (4, 1.0)
    (image,) = json.loads(run(*line, "--out", tmp_path / "one", "--steps", 1, "--cfg", 2).stdout)["images"]
    assert (image["recipe"]["steps"], image["recipe"]["cfg"]) == (1, 2.0)
    (image,) = json.loads(run(*line, "--out", tmp_path / "two", "--steps", 2).stdout)["images"]
    expected = GuidedPipeline.from_pretrained(turbo[0])("a red seven", seeds=[3], num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(Image.open(image["file"])), np.asarray(expected))
    # The recipe of a picture is complete: it does not take the student's defaults again.
    (again,) = json.loads(run("sample", "--from", image["file"], "--model", turbo[0], "--out", tmp_path, "--json").stdout)["images"]
    assert again["recipe"] == image["recipe"]
    assert "1 to 4 steps, not 30" in run(*line, "--out", tmp_path / "thirty", "--steps", 30, code=2).stderr


def test_doctor_finds_its_levels(turbo: tuple[Path, dict]) -> None:
    document = json.loads(run("doctor", turbo[0], "--json").stdout)
    assert document["student"]["method"] == "ladd"
    assert [visit["timestep"] for visit in document["runs"][2]["visits"]] == [999, 749, 499, 249]
    assert {finding["name"] for run in document["runs"] for finding in run["findings"]} == {"guidance", "too-many-steps"}


def test_help() -> None:
    text = run("export", "--help").stdout
    for word in ("--run", "--which", "--format", "--json", "--quiet", "--debug", "Examples"):
        assert word in text


def refused(*arguments: object) -> str:
    result = run("export", *arguments, code=2)
    assert "Traceback" not in result.output
    message = result.stderr[result.stderr.index("Error: ") :]
    assert len(message) < 800
    return message


def test_wrong_options(distilled: Path, tmp_path: Path) -> None:
    for option, says in (
        (("--which", "best"), "Unknown student 'best'"),
        (("--dtype", "int8"), "Unknown dtype 'int8'"),
        (("--format", "ckpt"), "Unknown format 'ckpt'"),
        (("--format", "lora"), "no LoRA adapters"),
        (("--sampler", "euler"), "Unknown sampler of a student 'euler'"),
        (("--checkpoint", 1000), "no whole checkpoint 1000. It has: 100, 900."),
        (("--device", "gpu"), "Unknown device 'gpu'"),
        (("--teacher", tmp_path / "gone"), "gone"),
        (("--figures", tmp_path / "gone"), "cannot be read"),
    ):
        assert says in refused("--run", distilled, "--out", tmp_path / "out", *option)
    for text, says in (("{", "are not JSON"), ("[1]", "must be an object"), ('{"a": null}', "must be an object")):
        (tmp_path / "figures").write_text(text)
        assert says in refused("--run", distilled, "--out", tmp_path / "out", "--figures", tmp_path / "figures")
    assert not (tmp_path / "out").exists()


def test_wrong_runs(spoiled: Path, tmp_path: Path) -> None:
    line = ("--out", tmp_path / "out", "--run")
    assert "There is no folder" in refused(*line, tmp_path / "gone")
    assert "has no config.json" in refused(*line, spoiled / "checkpoint-100")
    damaged = spoiled / "checkpoint-900" / "student_ema" / "diffusion_pytorch_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    message = refused(*line, spoiled)
    assert "Checkpoint 900 is damaged" in message
    assert "truncated" in message
    assert "100, 900; see --checkpoint" in message
    shutil.rmtree(spoiled / "checkpoint-900" / "student_ema")
    assert "Checkpoint 900 has no 'student_ema'. Use --which last." in refused(*line, spoiled)
    config = spoiled / "config.json"
    content = json.loads(config.read_text())
    for change, says in (({"teacher": ""}, "--teacher MODEL"), ({"levels": [0.5]}, "must descend from 1")):
        config.write_text(json.dumps(content | change))
        assert says in refused(*line, spoiled)
    config.write_text('{"method": "ladd"}')
    assert "does not say teacher, levels" in refused(*line, spoiled)
    config.write_text("[")
    assert "is not JSON" in refused(*line, spoiled)
    config.write_text(json.dumps(content))
    for number in (100, 900):
        (spoiled / f"checkpoint-{number}" / "state.json").unlink()
    assert "has no whole checkpoint yet" in refused(*line, spoiled)


def test_a_lora_of_another_teacher(spoiled: Path, tmp_path: Path) -> None:
    folder = spoiled / "checkpoint-900" / "student_ema"
    lora_checkpoint(folder, tiny.pipeline("stable_diffusion", cross_attention_dim=12))
    assert "does not fit the teacher" in refused("--run", spoiled, "--out", tmp_path / "out")
    file = folder / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "Checkpoint 900 is damaged" in refused("--run", spoiled, "--out", tmp_path / "out")
