"""Teacher and student: copies, shared weights, adapters, conditions as vectors."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor

from genkit.denoisers import Cond, Denoiser
from genkit.distill.networks import Student, Teacher, condition_vector
from genkit.features.extractor import null_condition
from genkit.levels import Level
from tests import tiny
from tests.distill.tiny_runs import denoiser_of, size_of

WITH_LORA = ("stable_diffusion", "sdxl", "sd3", "flux", "sana")


def inputs(denoiser: Denoiser, teacher: Teacher) -> tuple[Tensor, Level, Cond]:
    """Two noisy samples at two levels."""
    size = size_of(denoiser.family)
    x0, eps = torch.randn(2, 2, *denoiser.latent_shape(size, size), generator=torch.Generator().manual_seed(0)).unbind()
    x, level = teacher.path.add_noise(x0, eps, torch.tensor([1.0, 0.4], dtype=torch.float64))
    return x, level, null_condition(denoiser).repeat(2)


def storages(network: torch.nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in network.parameters()}


@pytest.mark.parametrize("family", ["ddpm", "dit", "stable_diffusion", "sdxl", "sd3", "pixart_sigma", "sana"])
def test_a_student_starts_as_its_teacher_and_leaves_it_alone(family):
    denoiser = denoiser_of(family)
    teacher = Teacher(denoiser)
    student = Student(teacher)
    x, level, cond = inputs(denoiser, teacher)
    before = teacher.x0(x, level, cond)
    student.eval()  # in train mode DiT drops labels
    assert torch.allclose(student(x, level, cond.tensors), before, rtol=1e-4, atol=1e-4)
    assert not storages(student) & storages(denoiser.network)
    assert all(p.requires_grad for p in student.parameters())
    student(x, level, cond.tensors).square().mean().backward()
    torch.optim.SGD(student.trained(), lr=1.0).step()
    assert not torch.allclose(student(x, level, cond.tensors), before)
    assert torch.equal(teacher.x0(x, level, cond), before)
    assert all(p.grad is None for p in denoiser.network.parameters())


@pytest.mark.parametrize("family", WITH_LORA)
def test_a_lora_student_has_its_teachers_weights(family):
    """The same storage, once in memory; adapters of its own, which the teacher does not see."""
    denoiser = denoiser_of(family)
    teacher = Teacher(denoiser)
    names = set(denoiser.network.state_dict())
    student = Student(teacher, lora_rank=2)
    assert storages(denoiser.network) < storages(student)
    adapters = list(student.trained())
    assert sum(p.numel() for p in adapters) == sum(p.numel() for p in student.parameters()) - sum(
        p.numel() for p in denoiser.network.parameters()
    )
    assert set(denoiser.network.state_dict()) == names
    x, level, cond = inputs(denoiser, teacher)
    before = teacher.x0(x, level, cond)
    assert torch.allclose(student(x, level, cond.tensors), before, atol=1e-6)
    for parameter in adapters:
        torch.nn.init.normal_(parameter)
    student(x, level, cond.tensors).square().mean().backward()
    assert all(p.grad is not None for p in adapters)
    assert all(p.grad is None for p in denoiser.network.parameters())
    assert not torch.allclose(student(x, level, cond.tensors), before)
    assert torch.equal(teacher.x0(x, level, cond), before)


def test_master_weights_are_float32_whatever_the_teachers_are():
    denoiser = denoiser_of("stable_diffusion")
    denoiser.network.to(torch.bfloat16)
    teacher = Teacher(denoiser)
    assert {p.dtype for p in Student(teacher).trained()} == {torch.float32}
    adapted = Student(teacher, lora_rank=2)
    assert {p.dtype for p in adapted.trained()} == {torch.float32}
    x, level, cond = inputs(denoiser, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        x0 = adapted(x, level, cond.tensors)
    assert x0.dtype == torch.float32
    assert torch.isfinite(x0).all()


def test_a_teacher_is_frozen_and_evaluates():
    denoiser = denoiser_of("dit")
    denoiser.network.train().requires_grad_(True)
    teacher = Teacher(denoiser)
    assert not denoiser.network.training
    assert not any(p.requires_grad for p in denoiser.network.parameters())
    x, level, cond = inputs(denoiser, teacher)
    x.requires_grad_()
    teacher.x0(x, level, cond).sum().backward()
    assert float(x.grad.abs().max()) > 0


def test_students_that_cannot_be():
    teacher = Teacher(denoiser_of("stable_diffusion"))
    with pytest.raises(ValueError, match=r"lora_rank=-1 must be positive, or 0 to train all weights\."):
        Student(teacher, lora_rank=-1)
    with pytest.raises(ValueError, match=r"No layer of UNet2DConditionModel is called to_nothing"):
        Student(teacher, lora_rank=2, lora_targets=("to_nothing",))
    with pytest.raises(ValueError, match=r"diffusers has no LoRA for DiTTransformer2DModel\. Train all weights"):
        Student(Teacher(denoiser_of("dit")), lora_rank=2)


@pytest.mark.parametrize("family", ["stable_diffusion", "pixart_sigma"])
def test_more_input_channels_change_nothing_at_first(family):
    """For inpainting and editing: the new weights are zero, and learn."""
    denoiser = denoiser_of(family)
    teacher = Teacher(denoiser)
    student = Student(teacher, extra_channels=5).eval()
    x, level, cond = inputs(denoiser, teacher)
    concat = torch.randn(2, 5, *x.shape[2:], generator=torch.Generator().manual_seed(1))
    x0 = student(x, level, cond.with_concat(concat).tensors)
    assert torch.allclose(x0, teacher.x0(x, level, cond), atol=1e-5)
    assert student.network.config.in_channels == denoiser.network.config.in_channels + 5
    x0.square().mean().backward()
    grown = next(p for n, p in student.named_parameters() if n.endswith(("conv_in.weight", "pos_embed.proj.weight")))
    assert float(grown.grad[:, -5:].abs().max()) > 0
    with pytest.raises(ValueError, match=r"A LoRA cannot hold the grown first convolution"):
        Student(teacher, lora_rank=2, extra_channels=5)
    with pytest.raises(ValueError, match=r"No convolution of FluxTransformer2DModel takes the sample"):
        Student(Teacher(denoiser_of("flux")), extra_channels=5)


def test_conditions_as_vectors():
    embeds = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(condition_vector(Cond({"prompt_embeds": embeds})), embeds.mean(1))
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    masked = condition_vector(Cond({"prompt_embeds": embeds, "prompt_attention_mask": mask}))
    assert torch.allclose(masked[0], embeds[0, :2].mean(0))
    assert torch.equal(masked[1], torch.zeros(4))
    pooled = torch.ones(2, 5, dtype=torch.bfloat16)
    for name in ("pooled_prompt_embeds", "add_text_embeds"):
        vector = condition_vector(Cond({"prompt_embeds": embeds, name: pooled}))
        assert vector.dtype == torch.float32
        assert torch.equal(vector, torch.ones(2, 5))
    labels = condition_vector(Cond({"class_labels": torch.tensor([1, 3])}), 3)  # 3 is the null class
    assert torch.equal(labels, torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]]))
    assert condition_vector(Cond({})).shape[1] == 0


def test_every_familys_condition_has_a_vector():
    sizes = {}
    for family in tiny.FAMILIES:
        denoiser = denoiser_of(family)
        sizes[family] = condition_vector(null_condition(denoiser).repeat(2), getattr(denoiser, "num_classes", None)).shape
    assert sizes["ddpm"][1] == 0
    assert all(shape[0] == 2 and shape[1] > 0 for family, shape in sizes.items() if family not in ("ddpm", "ddim"))


def test_a_student_saves_in_diffusers_layout(tmp_path):
    student = Student(Teacher(denoiser_of("sd3")))
    student.network.save_pretrained(tmp_path)
    loaded = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, student.network.state_dict()[key]) for key, value in loaded.state_dict().items())
