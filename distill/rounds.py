"""The losses of one round of adversarial distillation.

    student        x0' = S(x_u, u, c),  x_u = alpha_u x0 + sigma_u eps                     u a level of the student
    discriminator  F(z) = frozen features of z (LADD: of alpha_t z + sigma_t eps' in the teacher, t random; ADD: of decoded z)
                   L_D = gan_d(D(F(x0), c), D(F(sg x0'), c)) + gamma R1
    student        L_G = w_adv gan_g(D(F(x0'), c)) + w_dist L_dist(x0', teacher) + w_rec |x0' - x0|

LADD: Sauer et al. 2024, arXiv 2403.12015. ADD: Sauer et al. 2023, arXiv 2311.17042. With mismatched pairs, real samples with the
conditions of others are half of the fakes.

Separately, the two updates cost the student two passes and the teacher two passes over fakes. A fused round makes the fakes and
their features once, with a graph: the heads learn from the detached features, and the heads that result judge the same features
again, through which the student learns. Every update is the same as before; only the noise on the fakes is shared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from genkit.distill import losses
from genkit.distill.config import DistillConfig
from genkit.distill.discriminator import FeatureDiscriminator
from genkit.distill.draws import Draw
from genkit.distill.networks import Student, Teacher
from genkit.distill.sources import PixelEncoder

Figures = dict[str, Tensor]


@dataclasses.dataclass
class Fakes:
    """The student's samples of a draw, and their features; with a graph where the student is to learn from them.

    Args:
        raw: what the student made (B, ...).
        x0: the samples (B, ...): outside of a mask, where there is one, they are the real ones.
        features: of x0.
    """

    raw: Tensor
    x0: Tensor
    features: list[Tensor]


class Rounds:
    """Losses of the two networks.

    Args:
        teacher: frozen.
        student: the module that is called, possibly wrapped.
        discriminator: its features and its heads.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Student | torch.nn.Module,
        discriminator: FeatureDiscriminator,
        config: DistillConfig,
    ) -> None:
        self.teacher, self.student, self.discriminator, self.config = teacher, student, discriminator, config

    def fakes(self, draw: Draw) -> Fakes:
        """The student's samples and their features."""
        x, level = self.teacher.path.add_noise(draw.x0, draw.eps, draw.u)
        x0 = raw = self.student(x, level, draw.student_cond.tensors)
        if draw.mask is not None:
            # Pasted into the real sample, so that the discriminator sees whether it fits.
            x0 = draw.mask * raw + (1 - draw.mask) * draw.x0
        if not self.config.adversarial:
            return Fakes(raw, x0, [])
        return Fakes(raw, x0, self.discriminator.extract(x0, draw.cond, draw.u_fake, draw.eps_fake))

    def discriminator_losses(self, draw: Draw, fakes: Fakes) -> Iterator[tuple[Tensor, Figures]]:
        """L_D of detached fakes, in parts that add up: one for each head, made when it is asked for, so that the graphs of the
        heads need not be in memory at once. Gradients go to the heads alone."""
        count = len(draw.x0)
        with torch.no_grad():
            # Real and mismatched samples in one pass of the backbone; heads see them one kind at a time.
            x0, cond, eps, u = draw.x0, draw.cond, draw.eps_real, draw.u_real
            if draw.wrong is not None:
                x0, eps, u = torch.cat([x0, x0]), torch.cat([eps, eps]), torch.cat([u, u])
                cond = draw.cond.joined(draw.wrong)
            features = self.discriminator.extract(x0, cond, u, eps)
            perturbed = self._perturbed(draw)
        image = self._image(draw)
        for k, (both, fake) in enumerate(zip(features, fakes.features, strict=True)):
            yield self._head_loss(
                draw, k, both[:count], fake.detach(), both[count:], None if perturbed is None else perturbed[k], image
            )

    def _head_loss(
        self, draw: Draw, k: int, real: Tensor, fake: Tensor, wrong: Tensor, perturbed: Tensor | None, image: Tensor | None
    ) -> tuple[Tensor, Figures]:
        """The part of L_D of head k, from its features."""
        config, judge = self.config, functools.partial(self.discriminator.judge, k)
        real = real.clone().requires_grad_(config.r1 > 0)
        real_logits, fake_logits = judge(real, draw.vector, draw.u_real, image), judge(fake, draw.vector, draw.u_fake, image)
        loss = losses.gan_d(real_logits, fake_logits, config.gan)
        if draw.wrong is not None:
            loss = (loss + losses.gan_d(real_logits, judge(wrong, draw.wrong_vector, draw.u_real, image), config.gan)) / 2
        figures: Figures = {}
        if config.r1:
            figures["r1"] = losses.r1(real_logits, [real])
            loss = loss + config.r1 * figures["r1"]
        if perturbed is not None:
            perturbed_logits = judge(perturbed, draw.vector, draw.u_real, image)
            figures["approximate_r1"] = losses.approximate_r1(real_logits, perturbed_logits, config.approximate_r1_std)
            loss = loss + config.approximate_r1 * figures["approximate_r1"]
        heads = len(self.discriminator.heads)
        figures = {name: value / heads for name, value in (figures | {"d_loss": loss}).items()}
        figures |= _judgement(k, real_logits, fake_logits, config.gan)
        return loss / heads, {name: value.detach() for name, value in figures.items()}

    def generator_loss(self, draw: Draw, fakes: Fakes) -> tuple[Tensor, Figures]:
        """L_G of fakes with a graph."""
        config = self.config
        figures: Figures = {"x0_std": fakes.x0.std()}
        terms = []
        if config.adversarial:
            figures["g_adversarial"], term = self._adversarial(draw, fakes.features)
            terms.append(config.adversarial * term)
        if config.distillation:
            figures["g_distillation"] = self._distillation(draw, fakes.x0)
            terms.append(config.distillation * figures["g_distillation"])
        if config.reconstruction:
            figures["g_reconstruction"] = losses.reconstruction(fakes.raw, draw.x0)
            terms.append(config.reconstruction * figures["g_reconstruction"])
        loss = torch.stack(terms).sum()
        figures["g_loss"] = loss
        return loss, {name: value.detach() for name, value in figures.items()}

    def _adversarial(self, draw: Draw, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The student's adversarial loss, and a term of that value and its gradient, for which no graph of a head is kept."""
        value, pull = features[0].new_zeros(()), features[0].new_zeros(())
        image = self._image(draw)
        for k, feature in enumerate(features):
            leaf = feature.detach().requires_grad_()
            logits = self.discriminator.judge(k, leaf, draw.vector, draw.u_fake, image)
            part = losses.gan_g(logits, self.config.gan) / len(features)
            value = value + part.detach()
            pull = pull + (feature * torch.autograd.grad(part, leaf)[0]).sum()
        return value, value + pull - pull.detach()

    def _distillation(self, draw: Draw, x0: Tensor) -> Tensor:
        """L_dist: the teacher denoises the student's samples at random levels; it gets no gradient."""
        config, codec = self.config, self.teacher.denoiser
        with torch.no_grad():
            x, level = self.teacher.path.add_noise(x0.detach(), draw.eps_teacher, draw.u_teacher)
            target = self.teacher.x0(x, level, draw.cond, config.distillation_guidance)
            if config.distillation_space == "pixel":
                target = codec.decode(target)
        seen = codec.decode(x0) if config.distillation_space == "pixel" else x0
        return losses.distillation(seen, target, level, config.distillation_weight)

    def _perturbed(self, draw: Draw) -> list[Tensor] | None:
        """Features of the input that the discriminator's backbone saw, with a little more noise, at the same level."""
        if not self.config.approximate_r1:
            return None
        noise = self.config.approximate_r1_std * draw.eps_perturb
        return self.discriminator.extract(draw.x0, draw.cond, draw.u_real, draw.eps_real, noise)

    def _image(self, draw: Draw) -> Tensor | None:
        """Embeddings of the pictures that the student started from; none where it started from pure noise."""
        source = self.discriminator.source
        if not self.discriminator.image_dim or not isinstance(source, PixelEncoder):
            return None
        embedded = source.embed(draw.x0)
        return embedded * (draw.u < 1).to(embedded).unsqueeze(1)


def _judgement(k: int, real: Tensor, fake: Tensor, kind: str) -> Figures:
    """Of head k: how often it is right, and its mean logits."""
    border = 0.5 if kind == "lsgan" else 0.0
    right = ((real > border).float().mean() + (fake < border).float().mean()) / 2
    return {f"accuracy/{k}": right, f"logit_real/{k}": real.mean(), f"logit_fake/{k}": fake.mean()}
