"""The trainer of ADD and LADD on tiny random pipelines: phases that touch nothing foreign, rounds of all kinds, bad input."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from genkit.distill import trainer as trainers
from genkit.distill.losses import gan_g
from genkit.distill.sources import PixelEncoder
from genkit.distill.trainer import DistillTrainer, Kept
from genkit.ranks import Ranks
from tests import tiny
from tests.distill.tiny_runs import data_of, denoiser_of, settings, trainer_of

FAMILIES = ("ddpm", "dit", "stable_diffusion", "sdxl", "sd3", "pixart_sigma", "sana")
WITH_LORA = ("stable_diffusion", "sdxl", "sd3", "sana")


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def same(before: dict[str, Tensor], network: nn.Module) -> bool:
    return all(torch.equal(before[name], p) for name, p in network.named_parameters())


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> bool:
    """To a share of the largest value of each tensor; some tensors cannot matter and are all rounding, as a bias before a norm."""
    largest = {name: float(value.abs().max()) for name, value in one.items()}
    floor = 0.01 * max(largest.values())
    return set(one) == set(other) and all(
        float((one[name] - other[name]).abs().max()) <= tolerance * max(largest[name], floor) for name in one
    )


def student_names(trainer: DistillTrainer) -> set[str]:
    return {name for name, p in trainer.student.named_parameters() if p.requires_grad}


@contextmanager
def calls(network: nn.Module) -> Iterator[list[int]]:
    """The batch sizes with which a network is called."""
    found: list[int] = []
    hook = network.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        yield found
    finally:
        hook.remove()


def phases(trainer: DistillTrainer) -> dict[str, dict[str, Tensor]]:
    """The gradients of the two phases of one round, as they were before they were clipped to nothing (see `grad_clip`)."""
    kept, found = Kept(), {}
    trainer._discriminator_phase(0, kept)
    found["heads"] = {name: value.clone() for name, value in gradients(trainer.discriminator).items()}
    trainer._generator_phase(0, kept)
    found["student"] = {name: value.clone() for name, value in gradients(trainer.student).items()}
    return found


# Isolation of the phases


@pytest.mark.parametrize(
    ("family", "lora_rank", "fused"),
    [*((family, 0, False) for family in FAMILIES), *((family, 2, False) for family in WITH_LORA), ("stable_diffusion", 0, True)],
)
def test_each_phase_reaches_all_of_its_network_and_nothing_else(family, lora_rank, fused, tmp_path):
    trainer = trainer_of(tmp_path, family, taps="all", batch_size=2, distillation=0.5, lora_rank=lora_rank, fused=fused)
    teacher = trainer.teacher.denoiser.network
    before, kept = weights(teacher), Kept()
    figures = trainer._discriminator_phase(0, kept)
    assert all(math.isfinite(value) for value in figures.values())
    assert set(gradients(trainer.discriminator)) == {name for name, _ in trainer.discriminator.named_parameters()}
    assert not gradients(trainer.student)
    assert not gradients(teacher)
    heads = weights(trainer.discriminator)
    figures = trainer._generator_phase(0, kept)
    assert all(math.isfinite(value) for value in figures.values())
    assert set(gradients(trainer.student)) == student_names(trainer)
    assert not gradients(trainer.discriminator)
    assert not gradients(teacher)
    assert same(heads, trainer.discriminator)
    assert same(before, teacher)
    assert not teacher.training
    assert trainer.discriminator.training
    assert all(p.requires_grad for p in trainer.discriminator.parameters())


def test_a_phase_that_reaches_the_teacher_is_an_error(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.teacher.denoiser.network.requires_grad_(True)
    kept = Kept()
    trainer._discriminator_phase(0, kept)
    before = weights(trainer.student)
    with pytest.raises(RuntimeError, match=r"The phase 'g' left a gradient in .* of SD3Transformer2DModel"):
        trainer._generator_phase(0, kept)
    assert same(before, trainer.student)


def test_a_lora_phase_that_reaches_the_shared_weights_is_an_error(tmp_path):
    trainer = trainer_of(tmp_path, lora_rank=2)
    trainer.teacher.denoiser.network.requires_grad_(True)  # which are the student's
    kept = Kept()
    trainer._discriminator_phase(0, kept)
    with pytest.raises(RuntimeError, match=r"The phase 'g' left a gradient in .* of SD3Transformer2DModel"):
        trainer._generator_phase(0, kept)


def test_a_discriminator_phase_that_reaches_the_student_is_an_error(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    own = trainer.rounds.discriminator_losses

    def leaking(draw, references, fakes, **options):
        yield from own(draw, references, fakes, **options)
        yield fakes.x0.mean(), {}

    monkeypatch.setattr(trainer.rounds, "discriminator_losses", leaking)
    before = weights(trainer.discriminator)
    with pytest.raises(RuntimeError, match=r"The phase 'd' left a gradient in network\..* of Student"):
        trainer._discriminator_phase(0, Kept())
    assert same(before, trainer.discriminator)


def through_heads(trainer: DistillTrainer) -> Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """The student's adversarial loss with one graph through all heads."""

    def loss(draw: Any, features: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        value = gan_g(trainer.discriminator.score(features, draw.vector, draw.u_fake), trainer.config.gan)
        return value.detach(), value, {}

    return loss


def test_a_generator_phase_that_reaches_the_heads_is_an_error(tmp_path, monkeypatch):
    """The defect of a public script, whose heads keep the student's gradients."""
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(trainers, "_frozen", lambda heads: nullcontext())
    monkeypatch.setattr(trainer.rounds, "_adversarial", through_heads(trainer))
    kept = Kept()
    trainer._discriminator_phase(0, kept)
    before = weights(trainer.student)
    with pytest.raises(RuntimeError, match=r"The phase 'g' left a gradient in heads\..* of FeatureDiscriminator"):
        trainer._generator_phase(0, kept)
    assert same(before, trainer.student)


@pytest.mark.parametrize("gan", ["hinge", "softplus", "lsgan"])
def test_heads_one_by_one_pull_the_student_as_all_at_once(gan, tmp_path, monkeypatch):
    single, joint = (trainer_of(tmp_path / name, gan=gan, disc_lr=1e-9, grad_clip=0.0) for name in "ab")
    monkeypatch.setattr(joint.rounds, "_adversarial", through_heads(joint))
    assert close(phases(joint)["student"], phases(single)["student"], 1e-5)


def test_gradients_of_a_round_are_not_added_to_those_of_the_last(tmp_path):
    """A round after another has the gradients that it has alone, at learning rates that change no weight."""
    changes = {"lr": 1e-30, "disc_lr": 1e-30, "batch_size": 2, "spectral_norm": False}
    alone = trainer_of(tmp_path / "a", **changes)
    alone.step = 1
    after = trainer_of(tmp_path / "b", **changes)
    phases(after)
    after.step = 1
    one, other = phases(alone), phases(after)
    assert close(one["heads"], other["heads"], 1e-6)
    assert close(one["student"], other["student"], 1e-6)


# Kinds of rounds


@pytest.mark.parametrize(("mismatched", "distillation"), [(True, 0.0), (False, 0.5)])
def test_a_fused_round_is_a_separate_one_with_fewer_passes(mismatched, distillation, tmp_path):
    seen, made = {}, {}
    for fused in (True, False):
        trainer = trainer_of(tmp_path / str(fused), fused=fused, mismatched=mismatched, distillation=distillation, steps=1)
        with calls(trainer.student.network) as students, calls(trainer.teacher.denoiser.network) as teachers:
            trainer.fit()
        seen[fused] = (students, teachers)
        made[fused] = (weights(trainer.student), weights(trainer.discriminator))
    real = 8 if mismatched else 4
    more = [4] if distillation else []
    assert seen[True] == ([4], [real, 4, *more])
    assert seen[False] == ([4, 4], [real, 4, 4, *more])
    assert close(made[True][0], made[False][0], 1e-6)
    assert close(made[True][1], made[False][1], 1e-6)


def test_a_fused_round_lets_new_heads_judge_the_same_features(tmp_path):
    """The student learns from the heads as they are after their update, not from those that saw the features first."""
    fused, stale = (trainer_of(tmp_path / name, disc_lr=rate) for name, rate in (("a", 0.1), ("b", 1e-30)))
    one, other = phases(fused), phases(stale)
    assert close(one["heads"], other["heads"], 1e-6)
    assert not close(one["student"], other["student"], 1e-2)


def test_r1_comes_lazily_and_as_many_times_larger(tmp_path):
    """Every third round has three times the penalty, the others none."""
    lazy = trainer_of(tmp_path / "a", r1=0.1, r1_every=3, disc_lr=1e-12, lr=1e-12)
    found = [lazy._round()]
    for lazy.step in (1, 2):
        found.append(lazy._round())
    assert ["r1" in figures for figures in found] == [False, False, True]
    each, none = (
        trainer_of(tmp_path / name, r1=r1, disc_lr=1e-12, lr=1e-12, spectral_norm=False) for name, r1 in (("b", 0.3), ("c", 0.0))
    )
    lazy = trainer_of(tmp_path / "d", r1=0.1, r1_every=3, disc_lr=1e-12, lr=1e-12, spectral_norm=False)
    for trainer in (each, none, lazy):
        trainer.step = 2
    one, other, without = phases(each), phases(lazy), phases(none)
    assert close(one["heads"], other["heads"], 1e-6)
    assert not close(one["heads"], without["heads"], 1e-2)


@pytest.mark.parametrize("losses", [{}, {"gan": "softplus", "reconstruction": 0.5, "approximate_r1": 1e-3, "distillation": 0.5}])
def test_micro_batches_add_up_to_the_batch(losses, tmp_path):
    """Spectral norm moves with each pass of the heads, so it is left out."""
    whole, parts = (
        trainer_of(tmp_path / str(n), accumulation=n, fused=False, spectral_norm=False, disc_lr=1e-9, grad_clip=0.0, **losses)
        for n in (1, 4)
    )
    with calls(parts.student.network) as students:
        one, other = phases(whole), phases(parts)
    assert students == [1] * 8
    assert close(one["heads"], other["heads"], 1e-4)
    assert close(one["student"], other["student"], 1e-4)


@pytest.mark.parametrize("losses", [{"adversarial": 0.0, "distillation": 1.0}, {"adversarial": 0.0, "reconstruction": 1.0}])
def test_without_a_discriminator_nothing_asks_for_one(losses, tmp_path):
    trainer = trainer_of(tmp_path, **losses)
    before, start = weights(trainer.discriminator), weights(trainer.student)
    trainer.fit()
    assert same(before, trainer.discriminator)
    assert not same(start, trainer.student)


@pytest.mark.parametrize(
    "changes", [{"gan": "lsgan"}, {"head": "stylegan-t", "r1": 0.0}, {"same_noise_level": True, "mismatched": False}]
)
def test_other_settings_train(changes, tmp_path):
    trainer = trainer_of(tmp_path, steps=1, **changes)
    start = weights(trainer.student), weights(trainer.discriminator)
    trainer.fit()
    assert not same(start[0], trainer.student)
    assert not same(start[1], trainer.discriminator)


def test_flux_trains(tmp_path):
    """The dearest of the tiny families: its prompts have 512 tokens."""
    trainer = trainer_of(tmp_path, "flux", steps=1, batch_size=1, mismatched=False, lora_rank=2, count=4)
    teacher, start = weights(trainer.teacher.denoiser.network), weights(trainer.student)
    trainer.fit()
    assert same(teacher, trainer.teacher.denoiser.network)
    assert not same(start, trainer.student)


@pytest.mark.parametrize(
    ("family", "taps", "blocks"),
    [
        ("stable_diffusion", ("mid",), "down_blocks.0.resnets.0"),
        ("stable_diffusion", ("down_blocks.1.resnets.0",), "down_blocks.1.resnets.0"),
        ("sd3", ("block.1",), "transformer_blocks.0"),
    ],
)
def test_checkpointed_activations_give_the_same_gradients(family, taps, blocks, tmp_path):
    """Also through a tap that ends the teacher's pass inside of what is checkpointed."""
    found = {}
    for on in (False, True):
        trainer = trainer_of(
            tmp_path / str(on), family, taps=taps, gradient_checkpointing=on, batch_size=2, fused=False, disc_lr=1e-9
        )
        kept = Kept()
        trainer._discriminator_phase(0, kept)
        with (
            calls(trainer.student.network.get_submodule(blocks)) as student,
            calls(trainer.teacher.denoiser.network.get_submodule(blocks)) as teacher,
        ):
            trainer._generator_phase(0, kept)
        found[on] = {name: value.clone() for name, value in gradients(trainer.student).items()}
        assert len(student) == 1 + on
        assert len(teacher) == 1 + on
    assert close(found[True], found[False], 1e-5)


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path):
    trainer = trainer_of(tmp_path, mixed_precision="bf16", gradient_checkpointing=True, distillation=0.5)
    dtypes = set()
    for network in (trainer.student.network, trainer.teacher.denoiser.network):
        network.transformer_blocks[0].register_forward_hook(lambda module, args, output: dtypes.update(o.dtype for o in output))
    trainer.fit()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in trainer.student.parameters())
    trainer_of(tmp_path / "next", steps=1).fit()  # precision belongs to a trainer, not to the process


def test_batches_have_one_shape(tmp_path):
    denoiser = denoiser_of("sd3")
    shapes = [(16, 8, 8), (16, 4, 12)]
    trainer = DistillTrainer(denoiser, data_of(denoiser, tmp_path / "data", 8, shapes=shapes), settings(steps=4), tmp_path / "run")
    assert {tuple(trainer.draws(step).x0.shape) for step in range(4)} == {(4, *shape) for shape in shapes}
    trainer.fit()
    assert trainer.step == 4


def test_the_average_counts_rounds(tmp_path):
    """EMA as diffusers has it, after each update of the student and none of the heads: s <- s + (1 - d) (w - s)."""
    trainer = trainer_of(tmp_path, steps=3, ema=0.5)
    shadow = [p.detach().clone() for p in trainer.student.trained()]
    for step in range(3):
        trainer._round()
        trainer.step += 1
        decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        for s, p in zip(shadow, trainer.student.trained(), strict=True):
            s += (1 - decay) * (p.detach() - s)
    assert trainer.average.updates == 3
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(shadow, trainer.average.shadow, strict=True))


def test_pairs_start_from_the_teachers_noise(tmp_path):
    trainer = trainer_of(tmp_path, reconstruction=1.0, levels=(1.0, 0.5), batch_size=16)
    draw = trainer.draws(3)
    # Row i has the latents of seed i in another stream, so the row of a sample is known.
    rows = [next(r for r in range(16) if torch.equal(trainer.draws.data.latents([r])[0], x)) for x in draw.x0]
    paired = trainer.draws.data.noise(rows)
    pure = draw.u == 1
    assert 0 < int(pure.sum()) < 16
    assert torch.equal(draw.eps[pure], paired[pure])
    assert not (draw.eps[~pure] == paired[~pure]).any()


# Draws


def test_draws_are_functions_of_seed_round_and_attempt(tmp_path):
    trainer = trainer_of(tmp_path)
    one, again, other = trainer.draws(5), trainer.draws(5), trainer.draws(5, attempt=1)
    assert torch.equal(one.eps, again.eps)
    assert torch.equal(one.u_fake, again.u_fake)
    assert torch.equal(one.x0, other.x0)
    for name in ("eps", "eps_real", "eps_fake", "eps_teacher", "eps_perturb"):
        assert not (getattr(one, name) == getattr(other, name)).any()
    assert not torch.equal(one.u_fake, other.u_fake)
    names = ("eps", "eps_real", "eps_fake", "eps_teacher", "eps_perturb")
    assert len({float(getattr(one, name)[0, 0, 0, 0]) for name in names}) == 5


def test_processes_and_micro_batches_share_the_batch_of_one(tmp_path):
    denoiser = denoiser_of("sd3")
    data = data_of(denoiser, tmp_path / "data", 16)
    whole = trainers.Draws(data, denoiser, settings(batch_size=8, distillation=1.0), Ranks())(3)
    found: dict[int, Any] = {}
    for rank in range(2):
        draws = trainers.Draws(data, denoiser, settings(batch_size=8, accumulation=2, distillation=1.0), Ranks(rank, 2))
        for micro in range(2):
            part = draws(3, micro)
            for k, i in enumerate(range(8)[rank::2][micro::2]):
                found[i] = (part, k)
    assert sorted(found) == list(range(8))
    for i, (part, k) in found.items():
        uses = (f"{kind}{use}" for kind in ("u", "eps") for use in ("", "_real", "_fake", "_teacher"))
        for name in ("x0", *uses, "vector", "wrong_vector"):
            assert torch.equal(getattr(part, name)[k], getattr(whole, name)[i]), name
    # Conditions of others are those of the next sample.
    assert torch.equal(whole.wrong_vector, whole.vector.roll(-1, 0))


# ADD


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, embed_dim=16, depth=4, num_heads=2, img_size=28, num_classes=0
    )


ADD = {
    "method": "add", "encoder": "digits-classifier", "distillation": 2.5, "distillation_space": "pixel", "mismatched": False,
    "disc_condition": ("text", "image"), "batch_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("encoder", ["digits-classifier", "a timm model"])
def test_add(encoder, tmp_path):
    denoiser = denoiser_of("sd3")
    source = None if encoder == "digits-classifier" else PixelEncoder.timm(vit(), denoiser.codec, taps=(0, 3))
    config = settings(**ADD | {"encoder": encoder, "augment": False})
    trainer = DistillTrainer(denoiser, data_of(denoiser, tmp_path / "data"), config, tmp_path / "run", source=source)
    assert len(trainer.discriminator.heads) == (3 if source is None else 2)
    assert trainer.discriminator.source.augment == (source is not None)  # a source that is given is as it is
    found = phases(trainer)
    assert set(found["student"]) == student_names(trainer)
    assert set(found["heads"]) == {name for name, _ in trainer.discriminator.named_parameters()}
    for frozen in (trainer.discriminator.source.encoder, denoiser.codec.vae):
        assert not gradients(frozen)
        assert not frozen.training
    trainer.fit()
    assert trainer.step == 2


def test_add_knows_the_picture_only_where_the_student_does(tmp_path):
    """c_img embeds the picture that the student started from; from pure noise there was none."""
    trainer = trainer_of(tmp_path, **ADD | {"batch_size": 16, "levels": (1.0, 0.5)})
    draw = trainer.draws(0)
    image = trainer.rounds._image(draw)
    assert torch.equal(image.abs().sum(1) > 0, draw.u < 1)
    assert torch.allclose(image[draw.u < 1], trainer.discriminator.source.embed(draw.x0)[draw.u < 1])


# What fails


def nan_once(network: nn.Module, at: int) -> list[int]:
    """Make the output of a network's call `at` NaN; the list counts the calls."""
    count: list[int] = []

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        count.append(1)
        if len(count) != at:
            return None
        if isinstance(output, Tensor):
            return output * math.nan
        output.sample = output.sample * math.nan
        return output

    network.register_forward_hook(spoil)
    return count


@pytest.mark.parametrize("at", [1, 2])
def test_a_phase_that_becomes_nan_is_tried_again_with_other_noise(at, tmp_path):
    """The first pass of the student is the discriminator's, the second its own."""
    trainer = trainer_of(tmp_path, fused=False, steps=1)
    whole = trainer_of(tmp_path / "whole", fused=False, steps=1)
    count = nan_once(trainer.student.network, at)
    trainer.fit()
    whole.fit()
    assert len(count) == 3
    assert all(torch.isfinite(p).all() for network in (trainer.student, trainer.discriminator) for p in network.parameters())
    for optimizer in (trainer.student_optimizer, trainer.heads_optimizer):
        assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    assert trainer.average.updates == 1
    # Other noise: the phase that was repeated did not end where an unbroken one does.
    assert same(weights(whole.discriminator), trainer.discriminator) == (at == 2)
    assert not same(weights(whole.student), trainer.student)


def test_a_fused_round_makes_new_fakes_for_a_second_attempt(tmp_path):
    trainer = trainer_of(tmp_path, steps=1)
    # Real, fake and wrong ones of the discriminator's phase, then the student's.
    count = nan_once(trainer.discriminator.heads[0], 4)
    with calls(trainer.student.network) as students:
        trainer.fit()
    assert students == [4, 4]
    assert len(count) == 5
    assert trainer.step == 1


def test_nan_in_the_data_stops_with_names_and_changes_nothing(tmp_path):
    denoiser = denoiser_of("sd3")
    data = data_of(denoiser, tmp_path / "data", broken=True)
    trainer = DistillTrainer(denoiser, data, settings(retries=1), tmp_path / "run")
    before = weights(trainer.student), weights(trainer.discriminator)
    with calls(trainer.student.network) as students, pytest.raises(FloatingPointError) as error:
        trainer.fit()
    assert re.search(
        r"Round 1: .*d_loss.*d_gradient of the discriminator stayed NaN or infinite in 2 attempts\. The weights",
        str(error.value),
    )
    assert students == [4, 4]
    assert same(before[0], trainer.student)
    assert same(before[1], trainer.discriminator)
    assert not trainer.student_optimizer.state
    assert not trainer.heads_optimizer.state
    assert trainer.average.updates == 0
    assert [p.name for p in trainer.run.checkpoints()] == ["checkpoint-0"]


def test_an_infinite_gradient_changes_nothing(tmp_path):
    """The loss is finite: what is checked is the gradient's norm too."""
    trainer = trainer_of(tmp_path, retries=0)
    parameter = next(trainer.student.trained())
    parameter.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trainer.student)
    with pytest.raises(FloatingPointError, match=r"Round 1: g_gradient of the generator stayed NaN or infinite in 1 attempts"):
        trainer.fit()
    assert same(before, trainer.student)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_round(number, tmp_path):
    trainer = trainer_of(tmp_path, steps=5)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    count: list[int] = []

    def interrupt(module: nn.Module, args: Any) -> None:
        count.append(1)
        if len(count) == 2:
            os.kill(os.getpid(), number)

    hook = trainer.student.network.register_forward_pre_hook(interrupt)
    trainer.fit()
    assert trainer.step == 2
    assert trainer.interrupted
    assert [p.name for p in trainer.run.checkpoints()] == ["checkpoint-2"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    hook.remove()
    trainer.fit(resume="latest")
    assert trainer.step == 5
    assert not trainer.interrupted


def test_a_second_signal_ends_it_at_once(tmp_path):
    trainer = trainer_of(tmp_path, steps=5)

    def interrupt(module: nn.Module, args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.student.network.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 0


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": ("block.1", "block.9")}, "SD3Transformer2DModel has no tap 'block.9'"),
        ({"head_width": 12}, "width=12 must be a positive multiple of 8"),
        ({"batch_size": 32}, "A batch of 32 cannot be filled: there are 16 items."),
        ({**ADD, "encoder": "digits-judge"}, "encoder='digits-judge' measures students, so it may not train them."),
        ({**ADD, "encoder": "digits"}, "digits"),
        ({**ADD, "encoder": "no_such_vit"}, "Unknown encoder 'no_such_vit'"),
        ({"lr_scheduler": "cosin"}, "Unknown lr_scheduler 'cosin'. Did you mean 'cosine'?"),
        ({"trackers": ("tensorbord",)}, "tensorbord"),
    ],
)
def test_settings_that_do_not_fit_the_model(changes, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_of(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_divide_the_batch(tmp_path):
    denoiser = denoiser_of("sd3")
    data = data_of(denoiser, tmp_path / "data", 16)
    with pytest.raises(ValueError, match=r"batch_size=8 is no multiple of 3 processes times 2 micro-batches\."):
        trainers.Draws(data, denoiser, settings(batch_size=8, accumulation=2), Ranks(0, 3))


def test_pairs_of_data_that_has_none(tmp_path):
    denoiser = denoiser_of("sd3")
    data = data_of(denoiser, tmp_path / "data", paired=False)
    with pytest.raises(ValueError, match=r"so none is a function of its initial noise"):
        DistillTrainer(denoiser, data, settings(reconstruction=1.0), tmp_path / "run")


@pytest.mark.parametrize(("name", "what"), [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP")])
def test_launchers_that_split_networks(name, what, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=rf"{what} is set for accelerate, but here each process keeps student"):
        trainer_of(tmp_path)


def test_a_family_without_an_adapter():
    with pytest.raises(ValueError, match=r"CogVideoXPipeline"):
        trainers.Teacher(trainers.Denoiser.of(tiny.pipeline("cogvideox")))
