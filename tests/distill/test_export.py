"""Exported students: what is written draws what the trainer's sampler draws, on tiny random pipelines of each family."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from genkit.denoisers import Denoiser
from genkit.distill import FewStepSpec, export_pipeline, gate, load_distilled
from genkit.distill.card import HERE
from genkit.distill.export import LORA_FILE
from genkit.distill.networks import Student, Teacher
from genkit.distill.schedule import scheduler_for
from genkit.levels import levels_of
from genkit.pipelines import GuidedPipeline
from tests import tiny

EVEN = (1.0, 0.75, 0.5, 0.25)
FAMILIES = ("stable_diffusion", "sdxl", "sd3", "flux", "pixart_sigma", "sana", "dit", "ddim")
PROMPTS = ["a red seven", "a blue cat"]


def spec_of(family: str, levels: tuple[float, ...] = EVEN, **fields: Any) -> FewStepSpec:
    size = {"height": 16, "width": 16} if family == "flux" else {}  # which has no size of its own
    return FewStepSpec(method="ladd", levels=levels, teacher=f"tiny-{family}", **(size | fields))


def network_of(family: str, seed: int = 1) -> Any:
    """A student's network: of the same configuration as the teacher's, with other weights."""
    return Denoiser.of(tiny.pipeline(family, seed)).network


def lora_of(host: DiffusionPipeline, rank: int = 2, alpha: float = 6.0) -> Any:
    """A network with adapters that do something; a fresh one's second matrix is zero."""
    student = Student(Teacher(Denoiser.of(host)), lora_rank=rank, lora_alpha=alpha)
    generator = torch.Generator().manual_seed(3)
    for parameter in student.trained():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return student.network


def guided(pipe: GuidedPipeline, **arguments: Any) -> Any:
    return pipe(PROMPTS, seeds=[3, 4], output_type="latent", **arguments).images


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion student at uneven levels."""
    out = tmp_path_factory.mktemp("students") / "uneven"
    figures = {"Frechet distance, 1 step, 1,000 samples": 40.123456, "judge": "never the guide"}
    spec = spec_of("stable_diffusion", (1.0, 0.6, 0.3))
    export_pipeline(tiny.pipeline("stable_diffusion"), network_of("stable_diffusion"), spec, out, figures=figures)
    return out


# (a) The gate


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_gate(family: str, tmp_path: Path) -> None:
    host, network = tiny.pipeline(family), network_of(family)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    own = host.scheduler
    found = export_pipeline(host, network, spec_of(family), tmp_path / "out")
    steps = ("1 step", "2 steps", "4 steps")
    assert set(found) == {f"{pipeline}, {count}" for pipeline in ("stock", "genkit") for count in steps}
    assert max(found.values()) < gate.TOLERANCE
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert FewStepSpec.load(tmp_path / "out") == spec_of(family)
    assert (tmp_path / "out" / "README.md").is_file()
    # Neither the teacher nor the student is touched.
    assert host.scheduler is own
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("sampler", ["posterior", "ode"])
def test_other_samplers_pass_it_too(sampler: str, tmp_path: Path) -> None:
    spec = spec_of("stable_diffusion", sampler=sampler)
    found = export_pipeline(tiny.pipeline("stable_diffusion"), network_of("stable_diffusion"), spec, tmp_path / "out")
    assert len(found) == 6
    name = {"posterior": "EulerAncestralDiscreteScheduler", "ode": "EulerDiscreteScheduler"}[sampler]
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == name
    assert config["timestep_spacing"] == "trailing"


def test_pipelines_that_cannot_are_not_called(tmp_path: Path) -> None:
    """DiT's call takes no timesteps, and does not scale the initial noise."""
    uneven = export_pipeline(tiny.pipeline("dit"), network_of("dit"), spec_of("dit", (1.0, 0.6, 0.3)), tmp_path / "uneven")
    assert {name for name in uneven if "stock" in name} == {"stock, 1 step"}
    assert "DiTPipeline cannot do it in 2 steps" in (tmp_path / "uneven" / "README.md").read_text()
    ode = export_pipeline(tiny.pipeline("dit"), network_of("dit"), spec_of("dit", sampler="ode"), tmp_path / "ode")
    assert not any("stock" in name for name in ode)
    config = {"num_class_embeds": 5}
    classes = export_pipeline(
        tiny.pipeline("ddpm", **config), Denoiser.of(tiny.pipeline("ddpm", 1, **config)).network, spec_of("ddpm"), tmp_path / "c"
    )
    assert not any("stock" in name for name in classes)
    assert "pipe(class_labels=[0], num_inference_steps=4)" in (tmp_path / "c" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("stable_diffusion", lambda own: diffusers.DDPMScheduler.from_config(own.config)),
        ("stable_diffusion", lambda own: diffusers.EulerDiscreteScheduler.from_config(own.config)),
        ("sd3", lambda own: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),  # deterministic
    ],
)
def test_another_scheduler_does_not_pass(family: str, scheduler: Any, tmp_path: Path) -> None:
    """The right levels, but another way from one to the next."""
    host = tiny.pipeline(family)
    student = Denoiser.of(copy.copy(host))
    wrong = copy.copy(host)
    wrong.register_modules(scheduler=scheduler(scheduler_for(host.scheduler, EVEN)))
    found = {(pipeline, count): value for pipeline, count, value in gate.differences(student, wrong, spec_of(family))}
    assert found["genkit", 2] > 100 * gate.TOLERANCE
    assert found["stock", 2] > 100 * gate.TOLERANCE


def test_what_fails_the_gate_is_not_written(tmp_path: Path) -> None:
    """A network that does more than its saved weights say."""
    network = network_of("stable_diffusion")
    network.conv_out.register_forward_hook(lambda module, inputs, output: output + 0.01)
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"differs from the trainer's sampler by [\d.e-]+ \(stock, 1 step\), more than 0.0001"):
        export_pipeline(tiny.pipeline("stable_diffusion"), network, spec_of("stable_diffusion"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    host, network = tiny.pipeline("dit"), network_of("dit")
    teacher = {key: value.clone() for key, value in host.vae.state_dict().items()}
    found = export_pipeline(host, network, spec_of("dit"), tmp_path / "half", dtype=torch.float16)
    assert max(found.values()) < gate.TOLERANCE
    saved = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float16}
    assert all(torch.equal(value, network.state_dict()[key].half()) for key, value in saved.items())
    assert all(torch.equal(value, teacher[key]) for key, value in host.vae.state_dict().items())


# (b) LoRA


@pytest.mark.parametrize("family", ["sdxl", "flux"])  # one UNet, one transformer; stable_diffusion and sd3 are below
def test_a_lora_for_the_stock_teacher(family: str, tmp_path: Path) -> None:
    host = tiny.pipeline(family)
    found = export_pipeline(host, lora_of(host), spec_of(family), tmp_path / "lora", format="lora")
    assert max(found.values()) < gate.TOLERANCE
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {LORA_FILE, "scheduler", "genkit_distill.json", "README.md"}
    assert not getattr(Denoiser.of(host).network, "peft_config", None)


def test_a_lora_is_its_merged_pipeline(tmp_path: Path) -> None:
    """And neither is the teacher; rank and scale differ, so a lost scale would show."""
    host = tiny.pipeline("stable_diffusion")
    host.save_pretrained(tmp_path / "teacher")
    spec = FewStepSpec(method="ladd", levels=EVEN, teacher=str(tmp_path / "teacher"))
    network = lora_of(host)
    export_pipeline(host, network, spec, tmp_path / "lora", format="lora")
    export_pipeline(host, network, spec, tmp_path / "merged")
    lora, merged = load_distilled(tmp_path / "lora"), load_distilled(tmp_path / "merged")
    assert lora.student == merged.student == spec
    torch.testing.assert_close(guided(lora), guided(merged), rtol=1e-4, atol=1e-4)
    teacher = GuidedPipeline.from_pipe(host)
    teacher.student, teacher.scheduler = spec, merged.scheduler
    assert (guided(teacher) - guided(merged)).abs().max() > 0.1


# (c) The model card


def test_the_card_says_what_it_is(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert "timesteps=[999, 599], guidance_scale=1.0" in text
    assert "| Frechet distance, 1 step, 1,000 samples | 40.12 |" in text
    assert "A student of tiny-stable_diffusion in 1 to 3 steps" in text
    assert "1, 0.6, 0.3" in text
    assert "licence holds for it too: it is not known here" in text


@pytest.mark.parametrize(("family", "lora"), [("stable_diffusion", False), ("sd3", False), ("sd3", True)])
def test_the_calls_of_the_card_run(family: str, lora: bool, tmp_path: Path) -> None:
    host = tiny.pipeline(family)
    host.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    spec = FewStepSpec(method="ladd", levels=(1.0, 0.6, 0.3), teacher=str(tmp_path / "teacher"))
    network = lora_of(host) if lora else network_of(family)
    export_pipeline(host, network, spec, tmp_path / "out", format="lora" if lora else "pipeline")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "too: mit." in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block.replace(HERE, str(tmp_path / "out")), names)
        assert names["image"].size == (16, 16)
    # The last of the stock calls visits the levels.
    signal = [1 - level.sigma if family == "sd3" else level.t for level in levels_of(names["pipe"].scheduler)]
    assert signal == pytest.approx([0, 0.4, 0.7] if family == "sd3" else [999, 599, 299], abs=1e-6)


# (d) Students in GuidedPipeline


def test_a_student_needs_no_arguments(exported: Path) -> None:
    pipe = GuidedPipeline.from_pretrained(exported)
    batches = []
    pipe.denoiser.network.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    default = guided(pipe)
    assert batches == [2, 2, 2]  # no classifier-free guidance
    assert [level.t for level in levels_of(pipe.scheduler)] == [999, 599, 299]
    assert torch.equal(default, guided(pipe, num_inference_steps=3, guidance_scale=1.0))
    guided(pipe, num_inference_steps=2)
    assert [level.t for level in levels_of(pipe.scheduler)] == [999, 599]
    batches.clear()
    guided(pipe, num_inference_steps=1, guidance_scale=2.0)
    assert batches == [4]
    guided(pipe, timesteps=[999, 499])
    assert [level.t for level in levels_of(pipe.scheduler)] == [999, 499]
    with pytest.raises(ValueError, match=r"A student of 3 levels samples in 1 to 3 steps, not 30"):
        guided(pipe, num_inference_steps=30)


def test_any_wrapper_knows_a_student(exported: Path) -> None:
    stock = diffusers.StableDiffusionPipeline.from_pretrained(exported)
    pipe = GuidedPipeline.from_pipe(stock)
    assert pipe.student == FewStepSpec.load(exported)
    assert GuidedPipeline.from_pipe(pipe).student == pipe.student
    assert GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion")).student is None


def test_a_scheduler_that_cannot_visit_the_levels_is_refused(exported: Path) -> None:
    pipe = GuidedPipeline.from_pretrained(exported)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"DDIMScheduler does not visit the levels 1, 0.6 that this student was trained at"):
        guided(pipe, num_inference_steps=2)


def test_the_trained_size_and_steps_are_the_defaults(exported: Path) -> None:
    pipe = GuidedPipeline.from_pretrained(exported)
    pipe.student = FewStepSpec(method="ladd", levels=EVEN, height=32, width=16, steps=2)
    assert guided(pipe).shape == (2, 4, 16, 8)
    assert len(pipe.scheduler.timesteps) == 2
    assert guided(pipe, height=16, width=16).shape == (2, 4, 8, 8)


# (e) Bad input


def test_an_export_replaces_nothing(exported: Path, tmp_path: Path) -> None:
    host, network, spec = tiny.pipeline("stable_diffusion"), network_of("stable_diffusion"), spec_of("stable_diffusion")
    with pytest.raises(ValueError, match="has something in it"):
        export_pipeline(host, network, spec, exported)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        export_pipeline(host, network, spec, tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="below a file"):
        export_pipeline(host, network, spec, tmp_path / "file" / "below")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    host, network, spec = tiny.pipeline("stable_diffusion"), network_of("stable_diffusion"), spec_of("stable_diffusion")
    with pytest.raises(ValueError, match="Unknown format 'ckpt'"):
        export_pipeline(host, network, spec, tmp_path / "out", format="ckpt")
    with pytest.raises(ValueError, match="no LoRA adapters"):
        export_pipeline(host, network, spec, tmp_path / "out", format="lora")
    pixart = tiny.pipeline("pixart_sigma")
    with pytest.raises(ValueError, match="PixArtSigmaPipeline of diffusers loads no LoRA"):
        export_pipeline(
            pixart, lora_of(tiny.pipeline("stable_diffusion")), spec_of("pixart_sigma"), tmp_path / "out", format="lora"
        )
    with pytest.raises(ValueError, match="no posterior sampler for flow-matching"):
        export_pipeline(tiny.pipeline("sd3"), network_of("sd3"), spec_of("sd3", sampler="posterior"), tmp_path / "out")
    host.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler is of an EDM model"):
        export_pipeline(host, network, spec, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    host = tiny.pipeline("stable_diffusion")
    monkeypatch.setattr(host.vae, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_pipeline(host, network_of("stable_diffusion"), spec_of("stable_diffusion"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_student(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no exported student"):
        load_distilled(tiny_folder)
    pixart = tmp_path / "pixart"
    tiny.pipeline("pixart_sigma").save_pretrained(pixart)
    spec_of("pixart_sigma").save(tmp_path)
    with pytest.raises(ValueError, match="PixArtSigmaPipeline of diffusers loads no LoRA"):
        load_distilled(tmp_path, teacher=pixart)


def test_names_no_folder_of_this_machine_and_loads_in_one_dtype(tmp_path: Path) -> None:
    tiny.pipeline("stable_diffusion").save_pretrained(tmp_path / "teacher")
    teacher = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    export_pipeline(teacher, teacher.unet, spec_of("stable_diffusion"), tmp_path / "out", dtype=torch.float16)
    assert not [file for file in (tmp_path / "out").rglob("*.json") if str(tmp_path) in file.read_text()]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
