"""`genkit doctor MODEL`: the levels that default schedules visit in a few steps, and what is said about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.denoisers import Denoiser
from genkit.distill import FewStepSpec
from genkit.distill.schedule import scheduler_for
from genkit.doctoring import Diagnosis, diagnose, open_model
from tests import tiny

EVEN = (1.0, 0.75, 0.5, 0.25)


def ancestral(spacing: str) -> Callable[[], Any]:
    return lambda: diffusers.EulerAncestralDiscreteScheduler(**tiny.SCHEDULE, timestep_spacing=spacing, steps_offset=1)


def linspace() -> Any:
    return diffusers.EulerDiscreteScheduler(**tiny.SCHEDULE, timestep_spacing="linspace")


def flow(shift: float) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


# What each visits in 1, 2 and 4 steps, timesteps or, for flow matching, sigmas; and what is wrong in 4 steps.
TABLE = {
    "trailing": ("sdxl", ancestral("trailing"), ([999], [999, 499], [999, 749, 499, 249]), set()),
    "leading": ("sdxl", ancestral("leading"), ([1], [501, 1], [751, 501, 251, 1]), {"low-start", "wasted-step"}),
    "linspace": ("sdxl", linspace, ([0], [999, 0], [999, 666, 333, 0]), {"wasted-step"}),
    "lcm": ("sdxl", lambda: diffusers.LCMScheduler(**tiny.SCHEDULE), ([999], [999, 499], [999, 759, 499, 259]), set()),
    "sd3, shift 1": ("sd3", flow(1.0), ([1], [1, 0.001], [1, 0.667, 0.334, 0.001]), {"wasted-step"}),
    "sd3, shift 3": ("sd3", flow(3.0), ([1], [1, 0.009], [1, 0.858, 0.602, 0.009]), {"wasted-step", "shift-twice"}),
    "flux, shift 1": ("flux", flow(1.0), ([1], [1, 0.5], [1, 0.75, 0.5, 0.25]), set()),
    "flux, shift 3": ("flux", flow(3.0), ([1], [1, 0.75], [1, 0.9, 0.75, 0.5]), set()),
}


def harmful(diagnosis: Diagnosis) -> set[str]:
    return {finding.name for finding in diagnosis.findings if finding.harmful}


@pytest.fixture(scope="module")
def denoisers() -> dict[str, Denoiser]:
    return {family: Denoiser.of(tiny.pipeline(family)) for family in ("stable_diffusion", "sdxl", "sd3", "flux")}


@pytest.mark.parametrize("name", TABLE)
def test_levels_of_default_schedules(denoisers: dict[str, Denoiser], name: str) -> None:
    family, make, expected, wrong = TABLE[name]
    denoiser = denoisers[family]
    denoiser.pipe.scheduler = make()
    runs = list(diagnose(denoiser, [1, 2, 4]))
    for run, wanted in zip(runs, expected, strict=True):
        if family == "sdxl":
            assert [visit.timestep for visit in run.visits] == wanted
            assert all(visit.alpha**2 + visit.sigma**2 == pytest.approx(1) for visit in run.visits)
        else:
            assert [visit.sigma for visit in run.visits] == pytest.approx(wanted, abs=5e-4)
            assert all(visit.alpha + visit.sigma == pytest.approx(1) for visit in run.visits)
    assert harmful(runs[-1]) == wrong
    # In one step, only where it starts matters.
    assert harmful(runs[0]) == ({"low-start"} if expected[0][0] in (0, 1) and family == "sdxl" else set())


def test_terminal_snr(denoisers: dict[str, Denoiser]) -> None:
    """Stable Diffusion's last alpha is 0.068; a schedule rescaled to zero terminal SNR has nothing to report."""
    denoiser = denoisers["stable_diffusion"]
    denoiser.pipe.scheduler = diffusers.DDIMScheduler(**tiny.SCHEDULE, timestep_spacing="trailing")
    (run,) = diagnose(denoiser, [4])
    assert run.visits[0].alpha == pytest.approx(0.0683, abs=1e-4)
    assert run.visits[0].snr == pytest.approx(0.00468, abs=1e-5)
    (finding,) = run.findings
    assert (finding.name, finding.harmful) == ("terminal-snr", False)
    assert "alpha is 0.068" in finding.text
    assert "15 times" in finding.text
    denoiser.pipe.scheduler = diffusers.DDIMScheduler(**tiny.SCHEDULE, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    (run,) = diagnose(denoiser, [4])
    assert run.findings == ()
    assert run.visits[0].snr == pytest.approx(0, abs=1e-6)


def test_a_student_with_the_right_schedule(denoisers: dict[str, Denoiser]) -> None:
    denoiser = denoisers["stable_diffusion"]
    student = FewStepSpec(method="ladd", levels=EVEN)
    denoiser.pipe.scheduler = scheduler_for(diffusers.DDIMScheduler(**tiny.SCHEDULE), EVEN)
    runs = list(diagnose(denoiser, [1, 2, 4, 8], student))
    # What remains is the call's own guidance, which a student was trained without.
    assert [harmful(run) for run in runs] == [{"guidance"}] * 3 + [set()]
    assert runs[0].findings[0].text.startswith("StableDiffusionPipeline uses guidance_scale=7.5 by default")
    assert runs[0].findings[0].advice == "Pass guidance_scale=1 in the call."
    assert runs[3].findings[0].name == "too-many-steps"
    assert runs[3].findings[0].advice == "Use 1 to 4."
    trained_with_it = FewStepSpec(method="ladd", levels=EVEN, guidance_scale=7.5)
    assert [run.findings for run in diagnose(denoiser, [1, 2, 4], trained_with_it)] == [()] * 3


@pytest.mark.parametrize(
    ("family", "scheduler", "advice"),
    [
        ("stable_diffusion", lambda: diffusers.LCMScheduler(**tiny.SCHEDULE), "Pass timesteps=[999, 749, 499, 249] in the call."),
        ("stable_diffusion", lambda: diffusers.DDIMScheduler(**tiny.SCHEDULE), "Use the scheduler that came with the student."),
        ("sd3", flow(1.0), "Pass sigmas=[1.0, 0.75, 0.5, 0.25] in the call."),
        ("sd3", flow(3.0), "Pass sigmas=[1.0, 0.5, 0.25, 0.1] in the call."),
    ],
)
def test_a_student_at_other_levels_than_its_own(denoisers: dict[str, Denoiser], family: str, scheduler: Any, advice: str) -> None:
    denoiser = denoisers[family]
    denoiser.pipe.scheduler = scheduler()
    (run,) = diagnose(denoiser, [4], FewStepSpec(method="ladd", levels=EVEN))
    assert run.findings[0].name == "not-its-levels"
    assert run.findings[0].advice == advice


def test_flux_guidance_is_the_networks_own(denoisers: dict[str, Denoiser]) -> None:
    denoisers["flux"].pipe.scheduler = flow(1.0)()
    (run,) = diagnose(denoisers["flux"], [4], FewStepSpec(method="ladd", levels=EVEN))
    assert run.findings == ()


def test_steps_that_a_scheduler_refuses(denoisers: dict[str, Denoiser]) -> None:
    denoiser = denoisers["stable_diffusion"]
    denoiser.pipe.scheduler = diffusers.LCMScheduler(**tiny.SCHEDULE, original_inference_steps=4)
    (run,) = diagnose(denoiser, [5])
    assert run.visits == ()
    assert "smaller than `num_inference_steps`: 5" in run.findings[0].text


# The command


def doctor(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["doctor", *(str(argument) for argument in arguments)], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("doctor")
    for family in ("sd3", "dit"):
        tiny.pipeline(family).save_pretrained(root / family)
    return {family: root / family for family in ("sd3", "dit")}


def test_the_command_needs_no_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "sd3"
    shutil.copytree(folders["sd3"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    document = json.loads(doctor(folder, "--steps", "1,4", "--json").stdout)
    assert document["pipeline"] == "StableDiffusion3Pipeline"
    assert document["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert document["student"] is None
    assert not document["healthy"]
    assert [run["steps"] for run in document["runs"]] == [1, 4]
    assert document["runs"][0]["visits"] == [{"timestep": 1000.0, "alpha": 0.0, "sigma": 1.0, "snr": 0.0}]
    assert {finding["name"] for finding in document["runs"][1]["findings"]} == {"wasted-step", "shift-twice"}
    text = " ".join(doctor(folder, "--steps", "1,4").stdout.split())
    assert "1 step timestep alpha sigma SNR 1000 0.0000 1.0000 0 Nothing is wrong with it." in text
    assert "sigmas=[1.0, 0.75, 0.5, 0.25]" in text
    FewStepSpec(method="ladd", levels=EVEN).save(folder)
    document = json.loads(doctor(folder, "--json").stdout)
    assert document["student"]["levels"] == list(EVEN)
    assert "a student at the levels 1, 0.75, 0.5, 0.25" in " ".join(doctor(folder).stdout.split())
    assert doctor(folder, "--quiet").stdout == ""


def test_embedded_models_and_other_families(folders: dict[str, Path]) -> None:
    assert json.loads(doctor("digits", "--json").stdout)["runs"][2]["visits"][1]["timestep"] == 749
    assert open_model(str(folders["dit"])).family == "DiT"


def test_bad_input(folders: dict[str, Path], tmp_path: Path) -> None:
    for model, says in (
        ("digts", "Did you mean 'digits'"),
        ("digits-judge", "is no diffusion pipeline"),
        (tmp_path / "nothing", "There is no folder"),
        (tmp_path, "is no diffusion pipeline"),
        ("nobody/nothing", "'nobody/nothing' is no folder here, and the Hub does not give it"),
    ):
        assert says in doctor(model, code=2).stderr
    assert "'0,1' is not a list of positive numbers" in doctor(folders["dit"], "--steps", "0,1", code=2).stderr
    index = tmp_path / "model_index.json"
    for name, says in (
        ("KandinskyPipeline", "KandinskyPipeline is not supported. Supported: DDIMPipeline"),
        ("MyPipeline", "'MyPipeline' of"),
        ("StableDiffusionPipeline", "has no scheduler"),
    ):
        index.write_text(json.dumps({"_class_name": name, "scheduler": ["diffusers", "DDIMScheduler"]}))
        assert says in doctor(tmp_path, code=2).stderr
    index.write_text("{")
    assert "is not JSON" in doctor(tmp_path, code=2).stderr
