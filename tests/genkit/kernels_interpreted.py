"""The Triton kernels in Triton's interpreter, against dense attention in float64. `test_attention_kernels.py` runs this file in a
process of its own:

    TRITON_INTERPRET=1 pytest tests/genkit/kernels_interpreted.py
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from genkit.attention import attend_jvp, attend_probe, audit, kernels
from genkit.attention.kernels import ops
from tests.oracles import dense_attention

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest number of an output, or of 1


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(B: int, H: int, L: int, S: int, D: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> list[Tensor]:
    """q, k and v as diffusers has them: heads split off a row, so that nothing is contiguous."""
    return [draw(B, n, H, D, dtype=dtype, seed=seed + i).transpose(1, 2) for i, n in enumerate((L, S, S))]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    finite = expected.isfinite()
    assert torch.equal(actual.double()[~finite], expected.double()[~finite])
    largest = max(1.0, expected[finite].abs().max().item()) if finite.any() else 1.0
    torch.testing.assert_close(actual.double()[finite], expected.double()[finite], rtol=0, atol=TOLERANCE[dtype] * largest)


def masks(kind: str, B: int, H: int, L: int, S: int, dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "padding":  # the last keys of the first image are closed, and the others' first one
        mask = torch.zeros(B, 1, 1, S, dtype=dtype)
        mask[0, ..., S // 2 :] = -math.inf
        mask[1:, ..., 0] = -math.inf
        return mask
    if kind == "boolean":
        return torch.rand(L, S, generator=torch.Generator().manual_seed(1)) > 0.3
    bias = draw(B, H, L, S, dtype=dtype, seed=9)
    bias[:, :, L // 2] = -math.inf  # a row that sees no key
    return bias


# Odd lengths, several blocks of rows and of keys, padded head dimensions, one key, one row.
CASES = [
    (1, 2, 130, 70, 40, torch.float32, "none"),
    (2, 1, 37, 23, 64, torch.float32, "padding"),
    (1, 1, 17, 65, 56, torch.float32, "bias"),
    (1, 1, 1, 33, 37, torch.float32, "boolean"),
    (1, 1, 5, 1, 8, torch.float32, "none"),
    (2, 1, 33, 66, 64, torch.float16, "bias"),
    (1, 2, 19, 77, 72, torch.float16, "none"),
    (1, 1, 18, 35, 160, torch.float16, "padding"),
    (1, 1, 9, 20, 256, torch.float16, "boolean"),
    (1, 1, 20, 33, 80, torch.bfloat16, "padding"),
]
NAMES = ["-".join(map(str, case[:5])) + f"-{str(case[5])[6:]}-{case[6]}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_probe_is_dense_attention_and_so_are_its_gradients(case: tuple) -> None:
    B, H, L, S, D, dtype, kind = case
    q, k, v = (x.requires_grad_() for x in inputs(B, H, L, S, D, dtype))
    mask, keys = masks(kind, B, H, L, S, dtype), torch.arange(B * 3).reshape(B, 3) % S
    outputs = kernels.attend_probe(q, k, v, keys, mask=mask, scale=0.2)
    assert [x.dtype for x in outputs] == [dtype, *[torch.float32] * 3]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse, entropy, p = dense_attention(*exact, mask if mask is None or mask.dtype == torch.bool else mask.double(), 0.2)
    heat = p.mean(1).gather(2, keys[:, None].expand(B, L, 3))
    expected = [out, lse, entropy, heat]
    for actual, wanted in zip(outputs, expected, strict=True):
        close(actual, wanted, dtype)
    cotangents = [draw(*x.shape, dtype=x.dtype, seed=20 + i) for i, x in enumerate(outputs)]
    cotangents[1] = cotangents[1].masked_fill(~lse.isfinite(), 0)
    gradients = torch.autograd.grad(outputs, (q, k, v), cotangents)
    wanted_gradients = torch.autograd.grad(expected, exact, [x.double() for x in cotangents])
    for actual, wanted in zip(gradients, wanted_gradients, strict=True):
        assert actual.dtype == dtype
        close(actual, wanted, dtype)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[4] <= 128], ids=[n for n, case in zip(NAMES, CASES, strict=True) if case[4] <= 128]
)
def test_jvp_is_that_of_dense_attention(case: tuple) -> None:
    B, H, L, S, D, dtype, kind = case
    primals, tangents = inputs(B, H, L, S, D, dtype), inputs(B, H, L, S, D, dtype, seed=5)
    mask = masks(kind, B, H, L, S, dtype)
    out, t_out = kernels.attend_jvp(*primals, *tangents, mask=mask)
    added = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted, t_wanted = torch.func.jvp(
        lambda *x: dense_attention(*x, added)[0], tuple(x.double() for x in primals), tuple(x.double() for x in tangents)
    )
    close(out, wanted, dtype)
    close(t_out, t_wanted, dtype)


@pytest.mark.parametrize("which", range(4))
def test_each_output_has_a_gradient_of_its_own(which: int) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 9, 12, 16))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse, entropy, p = dense_attention(*exact)
    expected = (out, lse, entropy, p.mean(1)[..., [3, 3, 7]])[which]
    actual = kernels.attend_probe(q, k, v, [3, 3, 7])[which]  # a key may be named twice
    gradients = torch.autograd.grad(actual.sin().sum(), (q, k, v), materialize_grads=True)
    for a, b in zip(gradients, torch.autograd.grad(expected.sin().sum(), exact, materialize_grads=True), strict=True):
        close(a, b, torch.float32)


def test_rows_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 40, 20, 16))

    def gradient() -> Tensor:
        return torch.autograd.grad(kernels.attend_probe(q, k, v, [0, 19])[3].square().sum(), k)[0]

    whole = gradient()
    monkeypatch.setattr(ops, "CHUNK", 32)
    torch.testing.assert_close(gradient(), whole, rtol=0, atol=1e-6)


def test_same_call_same_bits() -> None:
    q, k, v = inputs(2, 2, 40, 20, 16)
    first, second = (kernels.attend_probe(q, k, v, [1, 2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_logits_keep_their_digits() -> None:
    q, k, v = inputs(1, 1, 16, 40, 32)
    out, lse, entropy, _ = kernels.attend_probe(60 * q, k, v, [0])
    expected = dense_attention(60 * q.double(), k.double(), v.double())
    for actual, wanted in zip((out, lse, entropy), expected, strict=False):
        close(actual, wanted, torch.float32)


def test_primal_of_the_jvp_is_differentiable_and_the_tangent_is_not() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 9, 12, 16))
    tangents = inputs(1, 2, 9, 12, 16, seed=5)
    out, t_out = kernels.attend_jvp(q, k, v, *tangents)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(dense_attention(*exact)[0].sin().sum(), exact)
    for a, b in zip(torch.autograd.grad(out.sin().sum(), (q, k, v), retain_graph=True), expected, strict=True):
        close(a, b, torch.float32)
    with pytest.raises(RuntimeError, match="tangent of attend_jvp has no gradient"):
        t_out.sum().backward()


def test_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, 4, 4, 16))
    (gradient,) = torch.autograd.grad(kernels.attend_probe(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_operators_pass_torchs_own_checks() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 5, 6, 16))
    keys, mask = torch.tensor([1, 3]), torch.zeros(1, 1, 1, 6)
    torch.library.opcheck(torch.ops.genkit.attend_probe.default, (q, k, v, mask, keys, 0.25))
    torch.library.opcheck(torch.ops.genkit.attend_probe.default, (q, k, v, None, None, 0.25))
    tangents = inputs(1, 2, 5, 6, 16, seed=5)
    # Gradients of the tangent are refused, so autograd is checked without.
    torch.library.opcheck(torch.ops.genkit.attend_jvp.default, (*(x.detach() for x in (q, k, v)), *tangents, mask, 0.25))


def test_operators_are_traced_whole() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 5, 6, 16))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse, entropy, heat = torch.ops.genkit.attend_probe(q, k, v, None, torch.tensor([1, 3]), 0.25)
        return out.square().sum() + lse.sum() + entropy.sum() + heat.square().sum()

    eager = loss(q, k, v)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager, (q, k, v)), torch.autograd.grad(compiled, (q, k, v)), strict=True):
        assert torch.equal(a, b)


def test_callers_get_the_kernels_where_they_run() -> None:
    q, k, v = inputs(1, 2, 5, 6, 16)
    report = audit(lambda: (attend_probe(q, k, v, [1]), attend_jvp(q, k, v, q, k, v)))
    assert (report.fused, report.unfused, report.unproven) == (2, 0, 0)
    (module,) = report.modules
    assert set(module.kernels) == {"attend_probe", "attend_jvp"}
    probe = attend_probe(q, k, v, entropy=False)
    assert probe.entropy is None
    assert probe.map is None


def test_keys_that_nobody_checked_are_harmless() -> None:
    q, k, v = inputs(1, 1, 5, 6, 16)
    heat = torch.ops.genkit.attend_probe(q, k, v, None, torch.tensor([0, 6, -1, 10**6]), 0.25)[3]
    assert heat[..., 0].gt(0).all()
    assert heat[..., 1:].eq(0).all()
