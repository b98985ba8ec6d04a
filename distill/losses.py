"""Losses of adversarial distillation, as functions of logits and clean samples.

The heads of a discriminator give logits D_k (B, N_k), for N_k positions. What follows is averaged over positions, samples, heads.

    kind      discriminator, to minimise                    student, to minimise
    hinge     relu(1 - D(real)) + relu(1 + D(fake))         -D(fake)
    softplus  softplus(-D(real)) + softplus(D(fake))        softplus(-D(fake))
    lsgan     1/2 (D(real) - 1)^2 + 1/2 D(fake)^2           1/2 (D(fake) - 1)^2

    r1                     |dD_k/df_k|^2 of reals, f_k what head k gets
    approximate_r1         E_n (D(x + s n) - D(x))^2 / s^2, which is |dD/dx|^2 for small s
    distillation           c(t) |x0_student - sg x0_teacher|^2
    distribution_matching  1/2 |x - sg(x - g)|^2, g = (x0_fake - x0_real) / mean|x - x0_real|

hinge, r1 and distillation: ADD (Sauer et al. 2023, arXiv 2311.17042), whose sums over heads are averages here, so that its weights
of the adversarial term and of R1 belong to a sum. approximate_r1: Lin et al. 2025, arXiv 2501.08316. distribution_matching: DMD
(Yin et al. 2023, arXiv 2311.18828). sg stops the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.errors import unknown
from genkit.levels import Level

Logits = Tensor | Sequence[Tensor]  # of one head (B, ...), or of several

GAN_KINDS = ("hinge", "softplus", "lsgan")


def gan_d(real: Logits, fake: Logits, kind: str = "hinge") -> Tensor:
    """The discriminator's loss, a scalar.

    Args:
        real, fake: logits (B, ...) of each head, or of a single one; the numbers of samples may differ.
        kind: "hinge", "softplus" or "lsgan". Only softplus makes D a log density ratio; the hinge's optimum is the ratio's sign.

    Raises:
        ValueError: an unknown kind.
    """
    return gan_real(real, kind) + gan_fake(fake, kind)


def gan_real(real: Logits, kind: str = "hinge") -> Tensor:
    """The part of `gan_d` that real samples have."""
    _check(kind)
    if kind == "hinge":
        return _mean(real, lambda d: F.relu(1 - d))
    if kind == "softplus":
        return _mean(real, lambda d: F.softplus(-d))
    return _mean(real, lambda d: (d - 1) ** 2 / 2)


def gan_fake(fake: Logits, kind: str = "hinge") -> Tensor:
    """The part of `gan_d` that fakes have."""
    _check(kind)
    if kind == "hinge":
        return _mean(fake, lambda d: F.relu(1 + d))
    if kind == "softplus":
        return _mean(fake, F.softplus)
    return _mean(fake, lambda d: d**2 / 2)


def gan_g(fake: Logits, kind: str = "hinge") -> Tensor:
    """The student's adversarial loss, a scalar; arguments as `gan_d`."""
    _check(kind)
    if kind == "hinge":
        # Not relu(1 - D): that goes flat for the samples that fool D best.
        return -_mean(fake, lambda d: d)
    if kind == "softplus":
        return _mean(fake, lambda d: F.softplus(-d))
    return _mean(fake, lambda d: (d - 1) ** 2 / 2)


def r1(logits: Logits, features: Sequence[Tensor]) -> Tensor:
    """The squared gradient of each head's logits with respect to what the head got, a scalar; for real samples.

    The backbone is not differentiated again, so its attention stays fused. The gradient is that of a sample's logits added up, its
    square is added up over the sample's values, and the mean is over samples, then heads.

    Args:
        logits: of each head (B, ...).
        features: what each head got (B, ...), which must be leaves: `features = [f.detach().requires_grad_() for f in features]`
            before they go to the heads.

    Raises:
        ValueError: features that need no gradient, or that the logits were not computed from.

    Example:
        >>> features = [f.detach().requires_grad_() for f in discriminator.extract(real, cond, u, eps)]
        >>> logits = discriminator.score(features, vector, u)
        >>> loss = gan_d(logits, fake_logits) + 1e-5 * r1(logits, features)
    """
    how = "Pass [f.detach().requires_grad_() for f in features] to the heads, with gradients on, and the same list to r1."
    for k, feature in enumerate(features):
        if not feature.requires_grad:
            raise ValueError(f"features[{k}] does not require grad, so R1 has nothing to differentiate. {how}")
    total = torch.stack([d.float().sum() for d in _heads(logits)]).sum()
    if not total.requires_grad:
        raise ValueError(f"The logits have no graph, so R1 has nothing to differentiate. {how}")
    gradients = torch.autograd.grad(total, features, create_graph=True, allow_unused=True)
    squares = []
    for k, gradient in enumerate(gradients):
        if gradient is None:
            raise ValueError(f"The logits do not depend on features[{k}]. {how}")
        squares.append(gradient.float().square().flatten(1).sum(1).mean())
    return torch.stack(squares).mean()


def approximate_r1(logits: Logits, perturbed_logits: Logits, std: float) -> Tensor:
    """The squared gradient of D with respect to its input from a finite difference, a scalar; no second derivatives are needed.

    Args:
        logits: of real samples at the discriminator's input x, each head's (B, ...).
        perturbed_logits: of the same x + std n, n standard normal: the noisy input that was scored, at the same level. (Clean
            samples with a little noise are another input, whose difference to x says nothing of the gradient.)
        std: size of the perturbation, positive.

    Raises:
        ValueError: a std that is not positive, or logits of different shapes.
    """
    if not std > 0:
        raise ValueError(f"std={std} of the perturbation must be positive.")
    squares = []
    for d, perturbed in zip(_heads(logits), _heads(perturbed_logits), strict=True):
        if d.shape != perturbed.shape:
            raise ValueError(f"Logits are {tuple(d.shape)} but perturbed ones {tuple(perturbed.shape)}. Score the same samples.")
        squares.append(((perturbed - d).flatten(1).sum(1) / std).square().mean())
    return torch.stack(squares).mean()


def distillation(x0_student: Tensor, x0_teacher: Tensor, level: Level, weight: str = "alpha") -> Tensor:
    """c(t) |x0_student - x0_teacher|^2, averaged over a sample's values and the batch, a scalar.

    The teacher's x0 comes from the student's own, noised to t: x0_teacher = teacher(alpha sg(x0_student) + sigma eps, t). On its
    own this pulls every output to the mean of the data: it regularises an adversarial loss.

    Args:
        x0_student, x0_teacher: clean samples (B, ...), latents or pixels; no gradient flows to the teacher's.
        level: t, where the teacher looked; a and s below are its alpha and sigma, divided by sqrt(alpha^2 + sigma^2), so that
            they depend on the signal-to-noise ratio alone.
        weight: "alpha": c = a, ADD's default. "sds": c = a s / 2, that is a / (2 s) w(t) with w = s^2, which makes it the gradient
            s^2 (eps_teacher - eps) of score distillation sampling (Poole et al. 2022, arXiv 2209.14988). "const": c = 1.

    Raises:
        ValueError: an unknown weight, or different shapes.
    """
    if x0_student.shape != x0_teacher.shape:
        raise ValueError(f"The student's x0 is {tuple(x0_student.shape)}, but the teacher's is {tuple(x0_teacher.shape)}.")
    a = torch.as_tensor(level.alpha / level.norm)
    weights = {"alpha": lambda: a, "sds": lambda: a * torch.as_tensor(level.sigma / level.norm) / 2, "const": lambda: a**0}
    if weight not in weights:
        raise unknown("distillation weight", weight, weights)
    error = (_full(x0_student) - _full(x0_teacher).detach()).square().flatten(1).mean(1)
    return (weights[weight]().to(error) * error).mean()


def reconstruction(x0_student: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 distance to the teacher's sample of the same noise, a scalar; for pairs of noise and sample (AMD's Nitro-1)."""
    return F.smooth_l1_loss(_full(x0_student), _full(target))


def distribution_matching(x: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """A scalar whose gradient in x is g / x.numel(), g = (x0_fake - x0_real) / mean|x - x0_real|, the mean over a sample.

    Args:
        x: the student's samples (B, ...).
        x0_fake, x0_real: what the denoisers of the student's and of the data's distribution make of x with noise on it.
    """
    x = _full(x)
    with torch.no_grad():
        scale = (x - x0_real).abs().flatten(1).mean(1).clamp(min=1e-8)
        g = (_full(x0_fake) - _full(x0_real)) / scale.reshape(-1, *[1] * (x.ndim - 1))
    return F.mse_loss(x, (x - g).detach()) / 2


def _check(kind: str) -> None:
    if kind not in GAN_KINDS:
        raise unknown("adversarial loss", kind, GAN_KINDS)


def _heads(logits: Logits) -> list[Tensor]:
    return [logits] if isinstance(logits, Tensor) else list(logits)


def _mean(logits: Logits, loss: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([loss(_full(d)).mean() for d in _heads(logits)]).mean()


def _full(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
