"""`genkit::attend_probe` and `genkit::attend_jvp`: the kernels as operators of torch, with shapes for tracing and gradients.

Operators work under `torch.compile` and `torch.export` (fake implementations), in autograd (first derivatives), and are seen by
dispatch modes. Their CPU implementation is Triton's interpreter: with TRITON_INTERPRET=1 in the environment they run on the CPU,
slowly, for tests. `torch.ops.genkit` has them once this file is imported, which calls of `genkit.attention.kernels` do. No GPU
has run them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.attention.kernels.launch import Launch, contiguous_rows
from genkit.attention.kernels.serving import unserved
from genkit.attention.shapes import check, check_tangents

CHUNK = 1024  # rows a program of `probe_dk_map`


def _checked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor | None = None) -> Tensor | None:
    """The mask as it is added; an error for what the kernels do not take."""
    added = check(q, k, v, mask)
    if keys is not None and not (keys.ndim == 1 or (keys.ndim == 2 and len(keys) == len(q))):
        raise ValueError(f"keys are (J,) or (B, J) with B = {len(q)}, not {tuple(keys.shape)}.")
    return added


def _must_run(operator: str, q: Tensor, v: Tensor) -> None:
    if (why := unserved(operator, q, v)) is not None:
        raise ValueError(f"{why} genkit.attention.attend_probe and attend_jvp choose a way that serves them.")


@torch.library.custom_op("genkit::attend_probe", mutates_args=())
def attend_probe(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, H, L, D), log-sum-exp and row entropy (B, H, L), head-averaged map (B, L, J); see `kernels.attend_probe`."""
    from genkit.attention.kernels.probe import probe_forward, probe_map

    mask = _checked(q, k, v, mask, keys)
    _must_run("attend_probe", q, v)
    q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    launch = Launch(q, k, mask, scale, keys)
    out, lse, entropy = launch.matrix(launch.L), launch.statistic(), launch.statistic()
    launch.run(probe_forward, "rows", [q, k, v, launch.mask, out, lse, entropy], [q, k, v, out])
    mean = q.new_empty(launch.B, launch.L, launch.J, dtype=torch.float32)
    if launch.J:
        launch.run(probe_map, "map", [q, k, launch.mask, launch.keys, lse, mean], [q, k], keyed=True)
    return out, lse, entropy, mean


@torch.library.custom_op("genkit::attend_probe_backward", mutates_args=())
def attend_probe_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    keys: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    d_map: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; an output without a gradient is None."""
    from genkit.attention.kernels.probe_backward import probe_dk_map, probe_dkv, probe_dq, probe_rows

    q, k, v, out = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), contiguous_rows(out)
    launch = Launch(q, k, check(q, k, v, mask), scale, keys if d_map is not None else None)
    d_out = torch.zeros_like(out) if d_out is None else contiguous_rows(d_out.to(q.dtype))
    statistics = (d_lse, d_entropy, entropy)
    d_lse, d_entropy, entropy = (torch.zeros_like(lse) if x is None else x.float().contiguous() for x in statistics)
    d_map = lse.new_empty(0) if d_map is None else d_map.float().contiguous()
    c, dq, dk, dv = launch.statistic(), launch.matrix(launch.L), launch.matrix(launch.S), launch.matrix(launch.S)
    common = [q, k, launch.mask, launch.keys]
    launch.run(probe_rows, "rows", [*common, out, lse, entropy, d_out, d_lse, d_entropy, d_map, c], [q, k, out, d_out], keyed=True)
    pointers = [q, k, v, launch.mask, launch.keys, lse, c, d_out, d_entropy, d_map, dq]
    launch.run(probe_dq, "rows", pointers, [q, k, v, d_out, dq], keyed=True)
    launch.run(probe_dkv, "keys", [q, k, v, launch.mask, lse, c, d_out, d_entropy, dk, dv], [q, k, v, d_out, dk, dv])
    if launch.J:
        parts = lse.new_empty(-(-launch.L // CHUNK), launch.B, launch.H, launch.J, launch.D)
        launch.run(probe_dk_map, "chunks", [*common, lse, d_map, parts], [q, k], keyed=True, chunk=CHUNK)
        # Exact unless a key is named twice: then CUDA adds its two parts to dK in any order. A key out of range has a part of 0.
        at = launch.keys.long().clamp(0, launch.S - 1).expand(launch.B, launch.J)[:, None, :, None].expand(parts.shape[1:])
        dk.scatter_add_(2, at, parts.sum(0).to(dk.dtype))
    return dq, dk, dv


@torch.library.custom_op("genkit::attend_jvp", mutates_args=())
def attend_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and its tangent (B, H, L, D), log-sum-exp (B, H, L); see `kernels.attend_jvp`."""
    from genkit.attention.kernels.tangent import tangent_forward

    mask = _checked(q, k, v, mask)
    check_tangents(q=(q, tq), k=(k, tk), v=(v, tv))
    _must_run("attend_jvp", q, v)
    q, k, v, tq, tk, tv = map(contiguous_rows, (q, k, v, tq, tk, tv))
    launch = Launch(q, k, mask, scale)
    out, t_out, lse = launch.matrix(launch.L), launch.matrix(launch.L), launch.statistic()
    launch.run(tangent_forward, "rows", [q, k, v, tq, tk, tv, launch.mask, out, t_out, lse], [q, k, v, tq, tk, tv, out])
    return out, t_out, lse


def _matrix(q: Tensor, length: int) -> Tensor:
    """As `Launch.matrix`."""
    return q.new_empty(q.shape[0], length, q.shape[1], q.shape[3]).transpose(1, 2)


@attend_probe.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    _checked(q, k, v, mask, keys)
    (B, _, L, _), J = q.shape, 0 if keys is None else keys.shape[-1]
    lse, mean = q.new_empty(q.shape[:3], dtype=torch.float32), q.new_empty(B, L, J, dtype=torch.float32)
    return _matrix(q, L), lse, torch.empty_like(lse), mean


@attend_probe_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _matrix(q, q.shape[2]), _matrix(q, k.shape[2]), _matrix(q, k.shape[2])


@attend_jvp.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _checked(q, k, v, mask)
    return _matrix(q, q.shape[2]), _matrix(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _save_probe(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, keys, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, keys, *output[:3])


def _probe_gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, mask, keys, out, lse, entropy = ctx.saved_tensors
    return *attend_probe_backward(q, k, v, mask, keys, ctx.scale, out, lse, entropy, *gradients), None, None, None


def _save_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _tq, _tk, _tv, mask, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, output[0], output[2])


def _jvp_gradients(ctx: Any, d_out: Tensor | None, d_t_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_t_out is not None:
        raise RuntimeError("The tangent of attend_jvp has no gradient: stop it with t_out.detach(), as sCM and MeanFlow do.")
    q, k, v, mask, out, lse = ctx.saved_tensors
    return *attend_probe_backward(q, k, v, mask, None, ctx.scale, out, lse, None, d_out, d_lse, None, None), *[None] * 5


def _second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError("Fused attention has no second derivative. Use scaled_dot_product_attention with SDPBackend.MATH for it.")


attend_probe.register_autograd(_probe_gradients, setup_context=_save_probe)
attend_jvp.register_autograd(_jvp_gradients, setup_context=_save_jvp)
attend_probe_backward.register_autograd(_second_derivative)
