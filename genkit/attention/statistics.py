"""Statistics of attention maps, by algebra on fused calls: the L x S matrix of probabilities p is never made.

    s = scale q k^T + mask,   p = softmax(s),   LSE_i = log sum_j exp(s_ij)

    map of keys J     p[:, J]                                values with a one-hot column for each key: p [e_j] = p[:, j]
    row statistic     p f, f (S, C)                          centroids, mass of a region, sums over the tokens of a word, ...
    log-sum-exp       LSE                                    `genkit.attention.fused`
    row entropy       H = LSE - sum_j p_j s_j                sum_j p_j s_j = scale q . (p k) + p mask: keys as values
    KL(p_t || p_s)    sum_j p_t s_t - LSE_t + LSE_s - sum_j p_t s_s,      sum_j p_t s_s = scale_s q_s . (p_t k_s)

Everything is differentiable, once. The entropy's derivative, dH/ds_ij = -p_ij (s_ij - sum_j p_ij s_ij), comes through p alone,
while the queries and keys outside of it are held fixed: the rest cancels with the derivative of LSE.

Shapes: B batch, H heads, L queries, S keys, D width of queries and keys, E width of values, J selected keys, C statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.attention import kernels
from genkit.attention.fused import aligned, attend, padded
from genkit.attention.shapes import check, check_keys

Keys = Sequence[int] | Sequence[Sequence[int]] | Tensor


def log_sum_exp(q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """LSE (B, H, L) of the logits of queries (B, H, L, D) and keys (B, H, S, D), in nats; -inf where a row attends to nothing.

    Arguments and errors as of `genkit.attention.attend`.
    """
    return attend(q, k, k.detach(), mask=mask, scale=scale)[1]


def row_statistic(q: Tensor, k: Tensor, values: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """p f (B, H, L, C): the mean of C numbers f that belong to the keys, under each query's attention.

    Args:
        q, k: queries (B, H, L, D) and keys (B, H, S, D).
        values: f, (S, C), (B, S, C) or (B, H, S, C): indicators of a region, positions, ...
        mask, scale: as of `genkit.attention.attend`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        >>> centroid = row_statistic(q, k, torch.stack([rows.flatten(), columns.flatten()], -1))
    """
    q, k = kernels.autocast(q, k)
    check(q, k)
    values = values.to(q.dtype)
    batch, heads, count, width = k.shape
    if values.ndim in (2, 3):
        if values.shape[-2] != count or (values.ndim == 3 and len(values) != batch):
            raise ValueError(
                f"values have shape {tuple(values.shape)}, but B = {batch} and S = {count}: give (S, C), (B, S, C) or (B, H, S, C)."
            )
        values = values[None, None] if values.ndim == 2 else values[:, None]
        values = values.expand(batch, heads, -1, -1)
    added = check(q, k, values, mask)
    scale = width**-0.5 if scale is None else float(scale)
    shared = aligned(max(width, values.shape[-1]))  # fused calls want one width
    q, k, wide = (padded(x, shared) for x in (q, k, values))
    return F.scaled_dot_product_attention(q, k, wide, added, scale=scale)[..., : values.shape[-1]]


def token_map(
    q: Tensor, k: Tensor, keys: Keys, *, mask: Tensor | None = None, scale: float | None = None, average: bool = True
) -> Tensor:
    """How much each query attends to each of some keys: p[..., keys], from 0 to 1.

    Args:
        q, k: queries (B, H, L, D) and keys (B, H, S, D).
        keys: J positions, or J for each sample (B, J).
        mask, scale: as of `genkit.attention.attend`.
        average: average over the heads.

    Returns:
        (B, L, J), or (B, H, L, J) with `average=False`.

    Raises:
        ValueError: shapes that do not fit, or keys out of range.

    Example:
        >>> map_BLJ = token_map(q, k, keys=[2, 3])
    """
    q, k = kernels.autocast(q, k)
    check(q, k)
    chosen = check_keys(keys, k.shape[2], len(k), k.device)
    one_hot = F.one_hot(chosen, k.shape[2]).transpose(-1, -2).to(k.dtype)
    map_BHLJ = row_statistic(q, k, one_hot, mask=mask, scale=scale)
    return map_BHLJ.mean(1) if average else map_BHLJ


def row_entropy(q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Entropy (B, H, L) of each query's attention in nats, from 0 (one key) to log S (all alike); 0 where a row attends to nothing.

    Args:
        q, k: queries (B, H, L, D) and keys (B, H, S, D).
        mask, scale: as of `genkit.attention.attend`; an added mask that varies from query to query may hold 0 and -inf only.

    Raises:
        ValueError: shapes that do not fit, or such a mask.
    """
    q, k = kernels.autocast(q, k)
    return entropy_and_lse(q, k, check(q, k, None, mask), q.shape[-1] ** -0.5 if scale is None else float(scale))[0]


def entropy_and_lse(q: Tensor, k: Tensor, added: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`row_entropy` and `log_sum_exp` by one call; what it is given has been checked."""
    values, extra = k.detach(), None
    if added is not None:
        finite = added.masked_fill(added == float("-inf"), 0)
        if bool(finite.any()):
            extra = _of_keys(finite, k)
            values = torch.cat([values, extra], -1)
    means, lse = attend(q, k, values, mask=added, scale=scale)
    mean_logit = scale * (q.detach() * means[..., : k.shape[-1]].to(lse.dtype)).sum(-1)
    if extra is not None:
        mean_logit = mean_logit + means[..., -1].to(lse.dtype)
    fixed = lse.detach()
    return torch.where(fixed == float("-inf"), 0, fixed - mean_logit), lse


def attention_kl(
    teacher: tuple[Tensor, Tensor],
    student: tuple[Tensor, Tensor],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
) -> Tensor:
    """KL(teacher || student) (B, H, L) in nats between two attention maps, row by row; the student gets exact gradients.

    Args:
        teacher, student: queries and keys of each, (B, H, L, D) and (B, H, S, D); D may differ. The teacher is held fixed.
        mask: of both, as of `genkit.attention.attend`.
        scale, teacher_scale: of the logits, by default 1/sqrt(D) of each.

    Raises:
        ValueError: shapes that do not fit, of one or between the two.

    Example:
        >>> loss = attention_kl((q_teacher, k_teacher), (q, k)).mean()
    """
    (q_t, k_t), (q_s, k_s) = kernels.autocast(*(x.detach() for x in teacher)), kernels.autocast(*student)
    added = check(q_s, k_s, None, mask)
    check(q_t, k_t, None, added)
    if q_t.shape[:3] != q_s.shape[:3] or k_t.shape[:3] != k_s.shape[:3]:
        raise ValueError(
            f"The attention maps differ in shape: the teacher's q and k are {tuple(q_t.shape)} and {tuple(k_t.shape)}, "
            f"the student's {tuple(q_s.shape)} and {tuple(k_s.shape)}. B, H, L and S must agree; average over heads that do not."
        )
    scale_t = q_t.shape[-1] ** -0.5 if teacher_scale is None else float(teacher_scale)
    scale_s = q_s.shape[-1] ** -0.5 if scale is None else float(scale)
    # The mask's mean under p_t is in both cross terms, and cancels.
    means, lse_t = attend(q_t, k_t, torch.cat([k_t, k_s], -1), mask=added, scale=scale_t)
    mean_t, mean_s = means.to(lse_t.dtype).split([k_t.shape[-1], k_s.shape[-1]], -1)
    own = scale_t * (q_t * mean_t).sum(-1) - lse_t
    lse_s = log_sum_exp(q_s, k_s, mask=added, scale=scale_s)
    empty = lse_t == float("-inf")
    return torch.where(empty, 0, own.masked_fill(empty, 0) + lse_s.masked_fill(empty, 0) - scale_s * (q_s * mean_s).sum(-1))


def _of_keys(mask: Tensor, k: Tensor) -> Tensor:
    """A mask of finite numbers, one for each key, as values (B, H, S, 1)."""
    if mask.shape[2] != 1 and not bool((mask == mask[:, :, :1]).all()):
        raise ValueError(
            f"The entropy is not served with an added mask {tuple(mask.shape)} that varies from query to query, unless it is 0 and "
            "-inf. Give a boolean mask, or one number for each key: (B|1, H|1, 1, S)."
        )
    return mask[:, :, :1].transpose(-1, -2).expand(*k.shape[:3], 1).to(k.dtype)
