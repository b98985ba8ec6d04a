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


@dataclasses.dataclass
class References:
    """What heads compare fakes with; for each tap the features of B samples.

    Args:
        real: of clean samples with their own conditions.
        wrong: with those of others; of no samples where there are no mismatched pairs.
        perturbed: real ones with a little more noise, for the finite difference; None without it.
        image: embeddings (B, D) of the pictures that the student started from, where heads know them.
    """

    real: list[Tensor]
    wrong: list[Tensor]
    perturbed: list[Tensor] | None
    image: Tensor | None


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

    @torch.no_grad()
    def references(self, draw: Draw) -> References:
        """Features of the real samples, before there is a graph of fakes beside which they would need their memory."""
        # Real and mismatched samples in one pass of the backbone; heads see them one kind at a time.
        x0, cond, eps, u = draw.x0, draw.cond, draw.eps_real, draw.u_real
        if draw.wrong is not None:
            x0, eps, u = torch.cat([x0, x0]), torch.cat([eps, eps]), torch.cat([u, u])
            cond = draw.cond.joined(draw.wrong)
        features = self.discriminator.extract(x0, cond, u, eps)
        return References([feature[: len(draw.x0)] for feature in features], [feature[len(draw.x0) :] for feature in features],
                          self._perturbed(draw), self._image(draw))  # fmt: skip

    def discriminator_losses(
        self, draw: Draw, references: References, fakes: Fakes, *, r1: float | None = None
    ) -> Iterator[tuple[Tensor, Figures]]:
        """L_D of detached fakes, in parts that add up: for each head those of real, generated and mismatched samples, made when
        they are asked for, so that only one graph of a head is in memory at once. Gradients go to the heads alone.

        Args:
            r1: gamma, in this round; by default that of the configuration.
        """
        gamma = self.config.r1 if r1 is None else r1
        heads, share = len(self.discriminator.heads), 1.0 if draw.wrong is None else 0.5
        for k, fake in enumerate(fakes.features):
            for loss, figures in self._head_losses(draw, k, references, fake.detach(), gamma, share):
                means = {name: value / heads for name, value in ({"d_loss": loss} | figures).items() if "/" not in name}
                yield loss / heads, {name: value.detach() for name, value in (figures | means).items()}

    def _head_losses(
        self, draw: Draw, k: int, references: References, fake: Tensor, gamma: float, share: float
    ) -> Iterator[tuple[Tensor, Figures]]:
        """The parts of head k; each kind of fakes has a `share`."""
        config, judge = self.config, functools.partial(self.discriminator.judge, k, image=references.image)
        real = references.real[k]
        if gamma:
            real = real.clone().requires_grad_()
        logits = judge(real, draw.vector, draw.u_real)
        loss = losses.gan_real(logits, config.gan)
        figures: Figures = {f"accuracy/{k}": (logits > border(config.gan)).float().mean() / 2, f"logit_real/{k}": logits.mean()}
        if gamma:
            figures["r1"] = losses.r1(logits, [real])
            loss = loss + gamma * figures["r1"]
        if references.perturbed is not None:
            perturbed = judge(references.perturbed[k], draw.vector, draw.u_real)
            figures["approximate_r1"] = losses.approximate_r1(logits, perturbed, config.approximate_r1_std)
            loss = loss + config.approximate_r1 * figures["approximate_r1"]
        yield loss, figures
        del logits, loss
        logits = judge(fake, draw.vector, draw.u_fake)
        figures = {f"accuracy/{k}": (logits < border(config.gan)).float().mean() / 2, f"logit_fake/{k}": logits.mean()}
        yield share * losses.gan_fake(logits, config.gan), figures
        del logits
        if draw.wrong is not None:
            yield share * losses.gan_fake(judge(references.wrong[k], draw.wrong_vector, draw.u_real), config.gan), {}

    def generator_loss(self, draw: Draw, fakes: Fakes) -> tuple[Tensor, Figures]:
        """L_G of fakes with a graph."""
        config = self.config
        figures: Figures = {"x0_std": fakes.x0.std()}
        terms = []
        if config.adversarial:
            figures["g_adversarial"], term, pulls = self._adversarial(draw, fakes.features)
            figures |= pulls
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

    def _adversarial(self, draw: Draw, features: list[Tensor]) -> tuple[Tensor, Tensor, Figures]:
        """The student's adversarial loss; a term of that value and its gradient, for which no graph of a head is kept; and for each
        head the pull |dL_k/df_k| |f_k|, by how much its loss would change if features moved along the gradient as far as they are
        from zero."""
        value, pull = features[0].new_zeros(()), features[0].new_zeros(())
        figures: Figures = {}
        image = self._image(draw)
        for k, feature in enumerate(features):
            leaf = feature.detach().requires_grad_()
            logits = self.discriminator.judge(k, leaf, draw.vector, draw.u_fake, image)
            loss = losses.gan_g(logits, self.config.gan)
            gradient = torch.autograd.grad(loss, leaf)[0]
            value = value + loss.detach() / len(features)
            pull = pull + (feature * gradient).sum() / len(features)
            figures[f"pull/{k}"] = gradient.norm() * leaf.norm()
        return value, value + pull - pull.detach(), figures

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


def border(kind: str) -> float:
    """The logit above which a head takes a sample for real."""
    return 0.5 if kind == "lsgan" else 0.0
