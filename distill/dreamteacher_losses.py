"""The losses of DreamTeacher (Li et al., ICCV 2023, arXiv 2307.07487), and of the branch that learns from few labels.

    L_MSE  = 1/L sum_l || f_l^r - W(f_l^g) ||^2                               W: normalisation without learnables, of f^g only
    L_AT   = 1/L sum_l || Q_l^r / ||Q_l^r||_2 - Q_l^g / ||Q_l^g||_2 ||_p,     Q = vec(sum_c |A_c|^p), p = 2
    L_feat = L_MSE + 10 L_AT                                                  levels l, features f^g of teacher, f^r of student
    L_ld   = H(softmax(g / tau), softmax(r / tau)), tau = 4                   g: the interpreter's logits, r: the student's
    L_mix  = L_feat + 1 L_ld                                                  and for the interpreter itself CE + 3 Dice

Both parts of L_feat are means over samples of what each sample has, so that none depends on what else is in the batch (a public
reimplementation divides attention maps by the norm of the whole batch). || . ||^2 in L_MSE is the mean over values, which keeps
levels of unequal size alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.errors import unknown

WHITENINGS = ("chw", "c", "none")
IGNORED = 255  # in label maps: pixels that nothing is learned from


def whiten(features: Tensor, over: str = "chw", eps: float = 1e-6) -> Tensor:
    """W(f): zero mean and unit variance of each sample's features (B, C, h, w), without learned parameters.

    Args:
        over: "chw": of all values of a sample; "c": of the channels at each place; "none" leaves them. The paper says LayerNorm and
            not over which axes. Over "c" all places get the same sum_c |f_c|^2, so that L_MSE would ask for attention maps that are
            flat, against L_AT; over "chw" it does not.

    Raises:
        ValueError: another choice.
    """
    if over not in WHITENINGS:
        raise unknown("whitening", over, WHITENINGS)
    if over == "none":
        return features
    axes = (1, 2, 3) if over == "chw" else (1,)
    variance, mean = torch.var_mean(features, axes, correction=0, keepdim=True)
    return (features - mean) * (variance + eps).rsqrt()


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """Q / ||Q||_2 (B, h w) of features (B, C, h, w): where a sample's activations are large, its own norm divided out."""
    return F.normalize(features.abs().pow(p).sum(1).flatten(1), dim=1, eps=1e-12)


def mse_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], over: str = "chw") -> Tensor:
    """L_MSE of levels of features (B, C, h, w)."""
    return torch.stack([F.mse_loss(r, whiten(g, over)) for r, g in zip(student, teacher, strict=True)]).mean()


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """L_AT of levels of features (B, C, h, w)."""
    gaps = [attention_map(r, p) - attention_map(g, p) for r, g in zip(student, teacher, strict=True)]
    return torch.stack([torch.linalg.vector_norm(gap, ord=p, dim=1).mean() for gap in gaps]).mean()


def soft_label_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """L_ld of logits (B, K) or (B, K, H, W), a mean over samples and pixels; gradients reach the student only."""
    return F.cross_entropy(student / temperature, (teacher.detach() / temperature).softmax(1))


def label_loss(logits: Tensor, labels: Tensor, dice: float = 3.0) -> Tensor:
    """What the interpreter learns from true labels: cross-entropy, and of label maps `dice` times the Dice loss.

    Args:
        logits: (B, K), or (B, K, H, W).
        labels: classes (B,), or label maps (B, H, W) in which `IGNORED` pixels count for nothing.
    """
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    return loss if logits.ndim == 2 or not dice else loss + dice * dice_loss(logits, labels)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|) with soft predictions P and truth T over a batch, a mean over the classes that it shows."""
    seen = (labels != IGNORED)[:, None]
    truth = F.one_hot(labels.where(seen[:, 0], 0), logits.shape[1]).movedim(-1, 1) * seen
    predicted = logits.softmax(1) * seen
    axes = (0, *range(2, logits.ndim))
    both, sizes = (predicted * truth).sum(axes), predicted.sum(axes) + truth.sum(axes)
    return 1 - (2 * both / sizes.clamp_min(1e-6))[truth.sum(axes) > 0].mean()
