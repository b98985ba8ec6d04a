"""What a trainer keeps of its teacher: the blocks up to the deepest tap, and encoders only while they are needed."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genkit.denoisers import Denoiser
from genkit.denoisers.base import with_network
from genkit.distill.networks import Student, Teacher
from genkit.distill.resident import called, in_dtype, only, shared_copy, without_encoders
from genkit.distill.sources import TeacherTaps
from genkit.distill.trainer import DistillTrainer
from genkit.features.extractor import null_condition
from tests.distill.tiny_runs import data_of, denoiser_of, settings, size_of

FAMILIES = ("ddpm", "dit", "stable_diffusion", "sdxl", "sd3", "flux", "pixart_sigma", "sana")


def storages(network: nn.Module) -> dict[int, int]:
    """Bytes by address."""
    tensors = (*network.parameters(), *network.buffers())
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tap", [0, "half"])
def test_features_need_nothing_behind_the_deepest_tap(family, tap):
    denoiser = denoiser_of(family)
    shape = denoiser.latent_shape(size_of(family), size_of(family))
    source = TeacherTaps(denoiser, [tap] if tap == 0 else tap, shape=shape, cond=null_condition(denoiser))
    names = set(denoiser.network.state_dict())
    x0, eps = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    cond, u = null_condition(denoiser).repeat(2), torch.tensor([0.9, 0.2], dtype=torch.float64)
    expected = source(x0, cond, u, eps)
    left = source.strip()
    assert all(torch.equal(a, b) for a, b in zip(source(x0, cond, u, eps), expected, strict=True))
    # Less of the same memory; the model that was given is whole.
    assert storages(left.network).keys() < storages(denoiser.network).keys()
    assert set(denoiser.network.state_dict()) == names
    _, level = source.path.add_noise(x0, eps, u)
    assert torch.isfinite(denoiser(x0, level, cond).raw).all()
    with pytest.raises(RuntimeError, match=r"This part of the network was left out"):
        left(x0, level, cond)


class Borrowing(nn.Module):
    """Uses the weights of a module without calling it."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.lent, self.used, self.last = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, z: torch.Tensor, *args: object, **options: object) -> SimpleNamespace:
        return SimpleNamespace(sample=self.last(self.used(z * self.lent.weight.mean())))


def test_only_what_is_called_is_kept():
    network = Borrowing()
    assert called(network, lambda: network(torch.ones(1, 4, 2, 2))) == {"", "used", "last"}
    tree = only(network, {"", "used"})
    assert {name for name, _ in tree.named_parameters()} == {"used.weight", "used.bias"}
    with pytest.raises(AttributeError):
        tree(torch.ones(1, 4, 2, 2))


def test_a_network_that_cannot_do_without_stays_whole():
    whole = denoiser_of("stable_diffusion")
    denoiser = with_network(whole, Borrowing())
    source = TeacherTaps(denoiser, ["used"], shape=(4, 8, 8), cond=null_condition(whole))
    assert source.strip() is denoiser
    assert source.channels == [4]


def test_a_second_tree_shares_what_has_the_dtype_and_casts_the_rest():
    denoiser = denoiser_of("sd3")
    same, half = shared_copy(denoiser.network), shared_copy(denoiser.network, torch.bfloat16)
    assert storages(same) == storages(denoiser.network)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in denoiser.network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in half.parameters())
    shell = in_dtype(denoiser, torch.bfloat16)
    assert shell.dtype == torch.bfloat16
    assert denoiser.dtype == torch.float32
    # A LoRA student has the cast weights, once.
    student = Student(Teacher(shell), lora_rank=2)
    assert storages(shell.network).keys() < storages(student).keys()


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "sd3"])
def test_without_encoders(family):
    denoiser = denoiser_of(family)
    cond = denoiser.condition(["a red seven", "a blue cat"])
    bare = without_encoders(denoiser, text=False, pictures=False)
    networks = {name for name, part in vars(bare.pipe).items() if isinstance(part, nn.Module)}
    assert networks == {"unet" if hasattr(bare.pipe, "unet") else "transformer"}
    assert bare.latent_shape(None, None) == denoiser.latent_shape(None, None)
    assert bare.factor == denoiser.factor
    # Prompts that are encoded stay so, with the null condition.
    again = bare.condition(["a red seven", "a blue cat"])
    assert all(torch.equal(again.tensors[name], value) for name, value in cond.tensors.items())
    assert all(torch.equal(again.null_tensors[name], value) for name, value in cond.null_tensors.items())
    assert denoiser.pipe.vae is not None
    assert denoiser.pipe.text_encoder is not None
    assert without_encoders(denoiser, text=True, pictures=True).pipe.vae is denoiser.pipe.vae


def kept_alive(tmp_path, **changes) -> set[str]:
    """Which parts of a teacher live on when only its trainer is left."""
    denoiser: Denoiser = denoiser_of("stable_diffusion")
    data = data_of(denoiser, tmp_path / "data")
    parts = {
        "tail": denoiser.network.conv_out, "text": denoiser.pipe.text_encoder.get_input_embeddings(),
        "vae": denoiser.pipe.vae.decoder.conv_in,
    }  # fmt: skip
    watched = {name: weakref.ref(next(part.parameters())) for name, part in parts.items()}
    trainer = DistillTrainer(denoiser, data, settings(taps=("mid",), batch_size=2, steps=2, **changes), tmp_path / "run")
    del denoiser, parts
    trainer.fit()
    gc.collect()
    assert trainer.step == 2
    return {name for name, reference in watched.items() if reference() is not None}


def test_a_trainer_lets_go_of_what_rounds_do_not_need(tmp_path):
    assert kept_alive(tmp_path) == set()


def test_a_trainer_keeps_what_a_loss_needs(tmp_path):
    assert kept_alive(tmp_path, distillation=0.5, distillation_space="pixel") == {"tail", "vae"}


def test_previews_need_the_whole_teacher_once(tmp_path):
    assert kept_alive(tmp_path, preview_every=1, preview_count=2) == {"vae"}
    assert (tmp_path / "run" / "previews" / "step-000002.png").is_file()


def test_text_encoders_stay_where_there_are_too_many_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr("genkit.distill.data.MEMORY", 1)
    denoiser = denoiser_of("stable_diffusion")
    data = data_of(denoiser, tmp_path / "data")
    data._memory = 1
    assert not data.encode_prompts(denoiser)
    trainer = DistillTrainer(denoiser, data, settings(batch_size=2), tmp_path / "run")
    assert trainer.teacher.denoiser.pipe.text_encoder is denoiser.pipe.text_encoder


def test_a_teacher_of_bfloat16_rounds_has_its_weights_in_it(tmp_path):
    denoiser = denoiser_of("sd3")
    data = data_of(denoiser, tmp_path / "data")
    for rank in (0, 2):
        trainer = DistillTrainer(denoiser, data, settings(mixed_precision="bf16", lora_rank=rank), tmp_path / f"run{rank}")
        assert {p.dtype for p in trainer.teacher.denoiser.network.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in trainer.student.trained()} == {torch.float32}
        assert {p.dtype for p in denoiser.network.parameters()} == {torch.float32}
        trainer.fit()
    # A student of all weights starts from the teacher's float32 ones.
    full = DistillTrainer(denoiser, data, settings(mixed_precision="bf16"), tmp_path / "run")
    assert all(torch.equal(p, q) for p, q in zip(full.student.trained(), denoiser.network.parameters(), strict=True))
