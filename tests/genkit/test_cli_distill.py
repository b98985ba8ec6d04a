"""`genkit distill`: on tiny random models, as two processes, killed and interrupted; and the way from a teacher to pictures."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from genkit import runner
from genkit.cli.app import app
from genkit.cli.distill import lora_rank
from tests.distill.tiny_runs import data_of, denoiser_of
from tests.processes import stopped, two_processes

WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICK = ("--batch-size", "4", "--head-width", "8", "--preview-every", "0", "--log-every", "1", "--lr", "1e-4", "--device", "cpu")


def genkit(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of the tiny Stable Diffusion, 16 of them."""
    folder = tmp_path_factory.mktemp("data") / "latents"
    data_of(denoiser_of("stable_diffusion"), folder)
    return folder


@pytest.fixture
def line(tiny_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    return ["distill", "ladd", "--teacher", str(tiny_folder), "--data", str(data), "--out", str(tmp_path / "run"), *QUICK]


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(entry) for entry in (folder / "log.jsonl").read_text().splitlines()]


def lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_run_and_its_continuation(line: list[str], tmp_path: Path) -> None:
    document = json.loads(genkit(*line, "--steps", 2, "--checkpoint-every", 1, "--json").stdout)
    assert document["step"] == 2
    assert document["items"] == 16
    assert document["processes"] == 1
    assert document["trained_parameters"] > 0
    assert document["head_parameters"] > 0
    assert document["config"]["disc_noise"] == "logit-normal:0,1"  # latents are small
    assert document["config"]["distillation"] == 0  # and the teacher's own
    assert document["warnings"] == []
    assert not document["interrupted"]
    assert "already holds a run. Go on with it (--resume latest)" in genkit(*line, "--steps", 2, code=2).stderr
    text = genkit(*line, "--steps", 3, "--checkpoint-every", 1, "--resume", "latest").stdout
    assert " ".join(text.split()).startswith("Distilled")
    assert "genkit export --run" in text
    assert [entry["step"] for entry in log(tmp_path / "run")] == [1, 2, 3]
    error = json.loads(genkit(*line, "--steps", 3, "--resume", "latest", "--gan", "softplus", "--json", code=2).stdout)
    assert "was made otherwise: it has gan 'hinge', but here it is gan 'softplus'" in error["error"]


def test_lora(line: list[str], tmp_path: Path) -> None:
    document = json.loads(genkit(*line, "--student", "lora:2", "--steps", 1, "--quiet", "--json").stdout)
    assert document["config"]["lora_rank"] == 2
    assert (tmp_path / "run" / "checkpoint-1" / "student" / "pytorch_lora_weights.safetensors").is_file()
    assert lora_rank("full") == 0
    assert lora_rank("lora:64") == 64


def test_add_with_an_embedded_classifier(line: list[str], tmp_path: Path) -> None:
    line[1] = "add"
    document = json.loads(genkit(*line, "--encoder", "digits-classifier", "--no-augment", "--steps", 1, "--json").stdout)
    assert document["taps"] == ["blocks.1", "blocks.2", "blocks.3"]
    assert not document["config"]["augment"]
    assert document["config"]["distillation"] == 2.5
    assert document["config"]["distillation_space"] == "pixel"


def test_recipes_and_options_over_them(line: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[distill]\nlevels = [1, 0.5]\ngan = "softplus"\nretries = 7\nsteps = 500\n')
    document = json.loads(genkit(*line, "--recipe", recipe, "--gan", "lsgan", "--dry-run", "--json").stdout)
    assert document["config"]["levels"] == [1, 0.5]
    assert document["config"]["gan"] == "lsgan"
    assert document["config"]["retries"] == 7
    assert document["config"]["steps"] == 500
    assert document["config"]["lr"] == 1e-4


def test_dry_run_does_nothing(line: list[str], tmp_path: Path) -> None:
    text = genkit(*line, "--steps", 5000, "--level-probs", "warmup:500:0,0,.5,.5;.7,.1,.1,.1", "--dry-run").stdout
    assert re.match(r"Would distil .* by LADD into .* 16 items, 5,000 rounds of 4\.", " ".join(text.split()))
    assert not (tmp_path / "run").exists()


def test_images_are_encoded_on_the_way(line: list[str], tmp_path: Path) -> None:
    """In a dry run only as many as a batch has, and not into the run's folder."""
    line[line.index("--data") + 1] = "digits"
    assert "images that are encoded first" in " ".join(genkit(*line, "--count", 24, "--dry-run").stdout.split())
    assert not (tmp_path / "run").exists()
    document = json.loads(genkit(*line, "--count", 24, "--steps", 1, "--json").stdout)
    assert document["items"] == 24
    assert document["config"]["distillation"] == 0.5  # on real images
    assert (tmp_path / "run" / "data" / "encoded.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "lora"], "--student 'lora' is neither full nor lora:RANK, as in lora:64."),
        (["--student", "lora:0"], "--student 'lora:0' is neither full nor lora:RANK"),
        (["--levels", "1,.5,.75"], "Levels 1,0.5,0.75 are not descending"),
        (["--levels", ".75,.5"], "do not start at 1"),
        (["--levels", "1,2"], "Levels 1,2: each must be above 0 and at most 1"),
        (["--levels", "one"], "'one' are no numbers"),
        (["--level-probs", "1,0"], "there are 2 for 4 levels"),
        (["--gan", "hing"], "Unknown gan 'hing'. Did you mean 'hinge'?"),
        (["--disc-noise", "normal:1,1"], "Unknown noise distribution 'normal'"),
        (["--mixed-precision", "fp16"], "mixed_precision='fp16' makes adversarial distillation diverge"),
        (["--lr-scheduler", "cosin"], "Unknown lr_scheduler 'cosin'. Did you mean 'cosine'?"),
        (["--taps", "block.1,nowhere"], "has no tap 'nowhere'"),
        (["--accumulation", "3"], "batch_size=4 is no multiple of accumulation=3."),
        (["--batch-size", "32"], "A batch of 32 cannot be filled"),
        (["--recipe", "nowhere.toml"], "There is no recipe 'nowhere.toml'."),
        (["--teacher", "digit"], "Unknown model 'digit'. Did you mean 'digits'?"),
        (["--data", "nowhere"], "There is no data 'nowhere'"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--adversarial", "0"], "adversarial=0.0 and all other losses are 0."),
        (["--resume", "checkpoint-5"], "There is no checkpoint 'checkpoint-5'"),
        (["--sizes", "wide"], "Size 'wide' is not WIDTHxHEIGHT"),
    ],
)
def test_bad_input(arguments: list[str], message: str, line: list[str], tmp_path: Path) -> None:
    assert message in " ".join(genkit(*line, "--steps", 1, *arguments, code=2).stderr.split())
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_recipes_teacher_holds_unless_another_is_named(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[distill]\nmethod = "ladd"\nteacher = "{tiny_folder}"\n')
    line = ["distill", "ladd", "--recipe", recipe, "--data", data, "--out", tmp_path / "run", *QUICK, "--dry-run", "--json"]
    assert json.loads(genkit(*line).stdout)["config"]["teacher"] == str(tiny_folder)
    assert "another latent space" in json.loads(genkit(*line, "--teacher", "digits", code=2).stdout)["error"]
    synth = ["synth", "--recipe", recipe, "--prompt", "a cat", "--out", tmp_path / "data", "--dry-run", "--json"]
    assert json.loads(genkit(*synth).stdout)["teacher"] == str(tiny_folder)
    assert json.loads(genkit(*synth, "--teacher", "digits").stdout)["teacher"] == "digits"


def test_stored_embeddings_need_no_text_encoder(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, loaded = ["--teacher", tiny_folder], []
    own = runner.load
    monkeypatch.setattr(runner, "load", lambda *names, **options: loaded.append(own(*names, **options)) or loaded[-1])
    for embeds in (True, False):
        folder = tmp_path / str(embeds)
        stored = ["--embeds"] if embeds else []
        genkit("synth", *teacher, "--prompt", "a cat", "--count", 4, "--steps", 1, "--out", folder / "data", *stored)
        genkit("distill", "ladd", *teacher, "--data", folder / "data", "--out", folder / "run", *QUICK, "--steps", 1)
        assert (loaded[-1].host.text_encoder is None) == embeds


def test_an_unknown_method_and_the_judge(line: list[str]) -> None:
    assert "Unknown method 'lad'. Did you mean 'ladd'?" in genkit("distill", "lad", *line[2:], code=2).stderr
    judged = genkit("distill", "add", *line[2:], "--encoder", "digits-judge", code=2).stderr
    assert "measures students, so it may not train them" in " ".join(judged.split())


def test_data_of_another_latent_space(data: Path, tmp_path: Path) -> None:
    out = genkit("distill", "ladd", "--teacher", "digits", "--data", data, "--out", tmp_path / "run", *QUICK, code=2).stderr
    assert "is of another latent space than the model: it has" in " ".join(out.split())
    assert "factor" in out


def test_a_family_that_is_not_supported(data: Path, tmp_path: Path) -> None:
    from tests import tiny

    tiny.pipeline("inpaint_concat").save_pretrained(tmp_path / "model")
    where = ["--teacher", tmp_path / "model", "--data", data, "--out", tmp_path / "run"]
    out = genkit("distill", "ladd", *where, *QUICK, code=2).stderr
    assert "StableDiffusionInpaintPipeline" in out


def test_two_processes_have_the_loss_curve_of_one(line: list[str], tmp_path: Path) -> None:
    more = ["--steps", "4", "--distillation", "0.5", "--reconstruction", "0.5", "--r1-every", "1", "--json"]
    code, stdout, stderr = two_processes([*line, *more], OMP_NUM_THREADS="1")
    assert code == 0, stderr
    document = json.loads(stdout)
    assert document["processes"] == 2
    assert document["step"] == 4
    line[line.index("--out") + 1] = str(tmp_path / "one")
    assert json.loads(genkit(*line, *more).stdout)["processes"] == 1
    for two, one in zip(log(tmp_path / "run"), log(tmp_path / "one"), strict=True):
        for name in ("d_loss", "g_loss", "g_adversarial", "g_distillation", "g_reconstruction", "r1", "d_gradient", "g_gradient"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), (two["step"], name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(number: signal.Signals, line: list[str], tmp_path: Path) -> None:
    """Sent to this process, once the run has begun."""
    command = [*line, "--checkpoint-every", 0, "--json"]
    file = tmp_path / "run" / "log.jsonl"

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if lines(file) >= 2:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.01)

    sender = threading.Thread(target=interrupt)
    sender.start()
    result = genkit(*command, "--steps", 5000, code=130)
    sender.join()
    assert "Repeat the command with --resume latest to go on." in result.stderr
    document = json.loads(result.stdout)
    assert document["interrupted"]
    step = document["step"]
    assert 2 <= step < 5000
    assert (tmp_path / "run" / f"checkpoint-{step}" / "state.json").is_file()
    assert json.loads(genkit(*command, "--steps", step + 1, "--resume", "latest").stdout)["step"] == step + 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_goes_on_as_if_nothing_had_happened(line: list[str], tmp_path: Path) -> None:
    """SIGKILL after round 3 or later, with the last checkpoint at an even round."""
    command = [*line, "--checkpoint-every", "2", "--checkpoints-limit", "0"]
    file = tmp_path / "run" / "log.jsonl"
    code, _, stderr = stopped([*command, "--steps", "5000"], lambda: lines(file) >= 3, number=signal.SIGKILL)
    assert code == -signal.SIGKILL, stderr
    last = max(int(path.name.partition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    genkit(*command, "--steps", last + 2, "--resume", "latest")
    assert [entry["step"] for entry in log(tmp_path / "run")] == list(range(1, last + 3))
    command[command.index("--out") + 1] = str(tmp_path / "unbroken")
    genkit(*command, "--steps", last + 2)
    for name in ("student", "student_ema"):
        one, two = (tmp_path / run / f"checkpoint-{last + 2}" / name / WEIGHTS for run in ("run", "unbroken"))
        assert one.read_bytes() == two.read_bytes(), name
    one, two = (tmp_path / run / f"checkpoint-{last + 2}" / "heads.safetensors" for run in ("run", "unbroken"))
    assert one.read_bytes() == two.read_bytes()


def test_from_the_teacher_to_pictures(tmp_path: Path) -> None:
    """synth, distill, export and sample on the embedded digits; the export is refused unless it draws what the trainer draws."""
    source = ["--teacher", "digits", "--captions", "digits", "--count", 4, "--steps", 2, "--guidance", 2, "--sampler", "dpm++"]
    genkit("synth", *source, "--out", tmp_path / "data")
    trained = ["--teacher", "digits", "--data", tmp_path / "data", "--out", tmp_path / "run", *QUICK, "--steps", 2]
    genkit("distill", "ladd", *trained, "--batch-size", 2, "--reconstruction", 1, "--preview-every", 2)
    with Image.open(tmp_path / "run" / "previews" / "step-000002.png") as preview:
        assert min(preview.size) > 4 * 32
    document = json.loads(genkit("export", "--run", tmp_path / "run", "--out", tmp_path / "turbo", "--json").stdout)
    assert max(document["differences"].values()) < 1e-4
    for steps in (1, 4):
        drawn = ["--model", tmp_path / "turbo", "--steps", steps, "--out", tmp_path / f"{steps}"]
        shown = genkit("sample", "a red seven", *drawn, "--json")
        (image,) = json.loads(shown.stdout)["images"]
        with Image.open(image["file"]) as picture:
            assert picture.size == (32, 32)
            assert np.asarray(picture).std() > 5
