"""The two networks of a distillation: a frozen teacher, and a student that starts as its copy.

A student of LoRA shares the teacher's weights: its network is a second module tree with the same Parameters and adapters of its
own, so the base is in memory once. (One tree whose adapters are switched off for the teacher breaks under gradient checkpointing:
the backward pass recomputes with whichever adapters are on by then.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.denoisers import Cond, Denoiser
from genkit.denoisers.base import with_network
from genkit.distill.path import Path
from genkit.distill.resident import shared_copy
from genkit.levels import Level

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Teacher:
    """A frozen denoiser, always in eval mode (in train mode DiT drops labels), without gradients to its parameters.

    Args:
        denoiser: the pretrained model; its network is frozen in place.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        denoiser.network.eval().requires_grad_(False)
        self.denoiser, self.path = denoiser, Path(denoiser.pipe.scheduler)

    def x0(self, x: Tensor, level: Level, cond: Cond, guidance_scale: float = 1.0) -> Tensor:
        """Predicted clean samples (B, ...), float32; gradients flow to x where they are on."""
        return self.denoiser(x, level, cond, guidance_scale=guidance_scale).x0.float()


class Student(nn.Module):
    """A trainable copy of a teacher's network that predicts clean samples, `student(x, level, tensors) -> x0`.

    A module of its own, so that DDP and FSDP can wrap it: whatever calls it goes through `forward`.

    Args:
        teacher: what the student starts as.
        lora_rank: 0 trains all weights, in float32; else adapters of this rank on attention, on the teacher's own weights.
        lora_alpha: their scale is lora_alpha / lora_rank; by default the rank.
        lora_targets: names of the linear layers that get adapters.
        extra_channels: of the condition "concat" behind the sample (inpainting, editing). The first convolution grows by as many
            input channels, with zero weights, so that the student still starts as its teacher.

    Raises:
        ValueError: a negative rank, a network or targets that take no LoRA, or extra channels where no convolution takes the
            sample, or beside LoRA.

    Example:
        >>> student = Student(Teacher(pipe.denoiser), lora_rank=64)
        >>> x0 = student(x, level, cond.tensors)
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        lora_rank: int = 0,
        lora_alpha: int | None = None,
        lora_targets: tuple[str, ...] = LORA_TARGETS,
        extra_channels: int = 0,
    ) -> None:
        super().__init__()
        if lora_rank < 0:
            raise ValueError(f"lora_rank={lora_rank} must be positive, or 0 to train all weights.")
        if lora_rank and extra_channels:
            raise ValueError(
                "A LoRA cannot hold the grown first convolution of an inpainting or editing student. Train all weights."
            )
        self.lora_rank = lora_rank
        original = teacher.denoiser.network
        if lora_rank:
            self.network = shared_copy(original)
            self._add_lora(lora_rank, lora_rank if lora_alpha is None else lora_alpha, lora_targets)
        else:
            # Float32 master weights: with learning rates of 1e-5 and less, bfloat16 weights do not move.
            self.network = copy.deepcopy(original).float().requires_grad_(True)
            if extra_channels:
                _grow_input(self.network, extra_channels)
        self.network.train()
        # In a tuple, since the shell is no submodule but refers to one.
        self._denoiser = (with_network(teacher.denoiser, self.network),)

    @property
    def denoiser(self) -> Denoiser:
        """The student as a denoiser."""
        return self._denoiser[0]

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained."""
        return (p for p in self.network.parameters() if p.requires_grad)

    def forward(self, x: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        """Clean samples (B, ...) of noisy samples x (B, ...); x0 is computed in float32 whatever the network's dtype."""
        return self.denoiser(x, level, Cond(tensors)).x0.float()

    def _add_lora(self, rank: int, alpha: int, targets: tuple[str, ...]) -> None:
        from peft import LoraConfig

        if not hasattr(self.network, "add_adapter"):
            raise ValueError(f"diffusers has no LoRA for {type(self.network).__name__}. Train all weights (--student full).")
        try:
            self.network.add_adapter(
                LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
            )
        except ValueError as error:
            raise ValueError(f"No layer of {type(self.network).__name__} is called {', '.join(targets)}: {error}") from error
        for parameter in self.trained():
            parameter.data = parameter.data.float()


def _grow_input(network: Any, extra: int) -> None:
    """More input channels for the first convolution, in place; the new weights are zero."""
    for path in ("conv_in", "pos_embed.proj"):
        parent, _, name = path.rpartition(".")
        try:
            owner = network.get_submodule(parent)
        except AttributeError:
            continue
        old: Any = getattr(owner, name, None)
        if not isinstance(old, nn.Conv2d):
            continue
        shape: dict[str, Any] = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
        new = nn.Conv2d(old.in_channels + extra, old.out_channels, bias=old.bias is not None, **shape).to(old.weight)
        with torch.no_grad():
            new.weight.zero_()
            new.weight[:, : old.in_channels] = old.weight
            if old.bias is not None and new.bias is not None:
                new.bias.copy_(old.bias)
        setattr(owner, name, new)
        network.register_to_config(in_channels=network.config.in_channels + extra)
        return
    raise ValueError(f"No convolution of {type(network).__name__} takes the sample, so it cannot take more channels.")


def condition_vector(cond: Cond, num_classes: int | None = None) -> Tensor:
    """One vector (B, D) for each sample's condition, float32: what heads are conditioned on.

    The pooled embedding where the family has one, else the mean of the prompt's tokens, else the class as one of `num_classes`
    (and the null class), else nothing: (B, 0).
    """
    tensors = cond.tensors
    pooled = next((tensors[name] for name in ("pooled_prompt_embeds", "add_text_embeds") if name in tensors), None)
    if pooled is not None:
        return pooled.float()
    if "prompt_embeds" in tensors:
        embeds = tensors["prompt_embeds"].float()
        mask = tensors.get("prompt_attention_mask")
        if mask is None:
            return embeds.mean(1)
        weights = mask.to(embeds).unsqueeze(-1)
        return (embeds * weights).sum(1) / weights.sum(1).clamp(min=1)
    if "class_labels" in tensors and num_classes is not None:
        return F.one_hot(tensors["class_labels"].long(), num_classes + 1).float()
    return torch.zeros(len(cond), 0)
