"""Attention statistics against the dense matrix: values and gradients, fused calls only, and errors that name the shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from genkit.attention import _torch, fused
from genkit.attention.fused import attend
from genkit.attention.probe import attend_probe
from genkit.attention.statistics import attention_kl, log_sum_exp, row_entropy, row_statistic, token_map
from tests.oracles import dense_attention

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
SHAPES = [(2, 3, 37, 23, 40), (1, 2, 5, 77, 8), (1, 1, 1, 1, 3)]  # B, H, L, S, D
MASKS = ["none", "bool", "rows", "keys", "finite keys"]


@pytest.fixture(autouse=True)
def _no_unfused_attention():
    with sdpa_kernel(FUSED):
        yield


def tensors(shape, dtype=torch.float32, *, seed=0, width=None):
    """q, k and v of a shape (B, H, L, S, D); values of another width."""
    batch, heads, rows, count, depth = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(rows, depth), (count, depth), (count, width or depth)]
    return [torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def mask_of(kind, shape, dtype=torch.float32):
    """A mask of a kind; the boolean ones have a row that attends to nothing, if there are several rows."""
    batch, _, rows, count, _ = shape
    generator = torch.Generator().manual_seed(1)
    open_ = torch.rand(batch, 1, rows, count, generator=generator) > 0.4
    open_[..., 0] = True
    if rows > 1:
        open_[0, :, 1] = False
    numbers = torch.randn(batch, 1, 1, count, generator=generator, dtype=torch.float64).to(dtype)
    closed = torch.zeros(open_.shape, dtype=dtype).masked_fill(~open_, -math.inf)
    padding = torch.where(torch.arange(count) < max(1, count - 2), 0.0, -10000.0).to(dtype).expand(batch, 1, 1, count)
    return {"none": None, "bool": open_, "rows": closed, "keys": padding, "finite keys": numbers}[kind]


def everything(q, k, v, mask, scale=0.2):
    """(out, lse, entropy, map) by algebra."""
    keys = [0, -1]
    return tuple(attend_probe(q, k, v, keys, mask=mask, scale=scale))


def dense(q, k, v, mask, scale=0.2):
    out, lse, entropy, probabilities = dense_attention(q, k, v, mask, scale)
    return out, lse, entropy, probabilities[..., [0, -1]].mean(1)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [None, 5, 64])
def test_probe_is_the_dense_matrix(shape, kind, width):
    q, k, v = tensors(shape, width=width)
    found = everything(q, k, v, mask_of(kind, shape))
    exact = dense(*(x.double() for x in (q, k, v)), mask_of(kind, shape, torch.float64))
    for value, reference in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MASKS)
def test_gradients_are_those_of_the_dense_matrix(kind):
    """Of a loss in which all four have a part; rows that attend to nothing have none in the log-sum-exp."""
    shape = (2, 3, 7, 11, 4)
    inputs = [x.requires_grad_() for x in tensors(shape, width=6)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    sizes = [(2, 3, 7, 6), (2, 3, 7), (2, 3, 7), (2, 7, 2)]
    weights = [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]

    def loss(values):
        return sum((w * torch.where(x == -math.inf, 0, x)).sum() for w, x in zip(weights, values, strict=True))

    found = torch.autograd.grad(loss(everything(*inputs, mask_of(kind, shape))), inputs)
    reference = torch.autograd.grad(loss(dense(*exact, mask_of(kind, shape, torch.float64))), exact)
    for value, gradient in zip(found, reference, strict=True):
        torch.testing.assert_close(value.double(), gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "keys", "finite keys"])
@pytest.mark.parametrize("part", range(4))
def test_gradcheck(part, kind):
    shape = (1, 2, 3, 4, 3)
    inputs = [x.requires_grad_() for x in tensors(shape, torch.float64, width=2)]
    mask = mask_of(kind, shape, torch.float64)
    assert gradcheck(lambda *x: everything(*x, mask)[part], inputs)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_log_sum_exp_without_the_cpu_operator(shape, kind):
    """What other devices run: public calls alone, for values and gradients."""
    q, k, v = (x.requires_grad_() for x in tensors(shape, torch.float64))
    mask = fused.check(q, k, v, mask_of(kind, shape, torch.float64))
    out, lse = fused.portable(q, k, v, mask, 0.3)
    exact_out, exact_lse, _, _ = dense_attention(q, k, v, mask, 0.3)
    torch.testing.assert_close((out, lse), (exact_out, exact_lse))
    rows = exact_lse > -math.inf
    found = torch.autograd.grad(lse[rows].square().sum(), (q, k))
    torch.testing.assert_close(found, torch.autograd.grad(exact_lse[rows].square().sum(), (q, k)))


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_log_sum_exp_without_the_cpu_operator_stands_any_logits(size):
    q, k, v = tensors((1, 2, 9, 33, 8))
    q = q * size
    _, lse = fused.portable(q, k, v, None, 0.3)
    exact = dense_attention(q.double(), k.double(), v.double(), None, 0.3)[1]
    torch.testing.assert_close(lse.double(), exact, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(dtype, tolerance):
    q, k, v = tensors((2, 3, 37, 23, 40), dtype)
    found = everything(q, k, v, mask_of("bool", (2, 3, 37, 23, 40)))
    exact = dense(*(x.double() for x in (q, k, v)), mask_of("bool", (2, 3, 37, 23, 40)))
    assert [x.dtype for x in found] == [dtype, torch.float32, torch.float32, torch.float32]
    for value, reference in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", MASKS)
def test_without_values_or_entropy(kind):
    q, k, v = tensors((2, 3, 37, 23, 40))
    mask = mask_of(kind, (2, 3, 37, 23, 40))
    whole = attend_probe(q, k, v, [3], mask=mask)
    for values in (v, None):
        for entropy in (True, False):
            probe = attend_probe(q, k, values, [3], mask=mask, entropy=entropy)
            assert (probe.out is None, probe.entropy is None) == (values is None, not entropy)
            for value, expected in zip(probe, whole, strict=True):
                assert value is None or torch.allclose(value, expected, atol=1e-6)


def test_autocast_is_that_of_torchs_own_attention():
    """Mixed dtypes are cast, as `scaled_dot_product_attention` casts them."""
    q, k, v = tensors((2, 3, 37, 23, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend_probe(q, k.bfloat16(), v, [3])
        assert torch.equal(found.out, torch.nn.functional.scaled_dot_product_attention(q, k.bfloat16(), v))
        assert token_map(q, k.bfloat16(), [3]).dtype == row_statistic(q, k.bfloat16(), torch.ones(23, 1)).dtype == torch.bfloat16
        torch.testing.assert_close(row_entropy(q, k.bfloat16()), found.entropy)
        assert attention_kl((q, k.bfloat16()), (q, k.bfloat16())).abs().max() < 0.05


def test_output_is_that_of_the_fused_call_bit_by_bit():
    q, k, v = tensors((2, 3, 37, 23, 40))
    assert torch.equal(attend_probe(q, k, v, [3]).out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_maps_of_tokens():
    q, k, v = tensors((2, 3, 37, 23, 40))
    probabilities = dense_attention(q, k, v)[3]
    torch.testing.assert_close(token_map(q, k, [4, 0]), probabilities[..., [4, 0]].mean(1))
    torch.testing.assert_close(token_map(q, k, [4, 0], average=False), probabilities[..., [4, 0]])
    own = torch.tensor([[4, 0], [-1, 2]])  # other keys for each sample
    expected = torch.stack([probabilities[0][..., [4, 0]], probabilities[1][..., [-1, 2]]]).mean(1)
    torch.testing.assert_close(token_map(q, k, own), expected)
    torch.testing.assert_close(attend_probe(q, k, v, own).map, expected)
    everywhere = token_map(q, k, range(23))  # more keys than the head has channels
    torch.testing.assert_close(everywhere.sum(-1), torch.ones(2, 37))


def test_a_centroid_is_a_row_statistic():
    """Keys on a grid, and a query that attends to one of them alone: the mean position is that key's."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], -1)
    k = torch.eye(20)[None, None]
    q = 200 * k[:, :, [7, 13]]
    torch.testing.assert_close(row_statistic(q, k, positions)[0, 0], torch.tensor([[1.0, 2.0], [2.0, 3.0]]))


def test_the_mass_of_a_region_can_be_steered():
    q, k = (x.requires_grad_() for x in tensors((1, 2, 6, 10, 4), torch.float64)[:2])
    region = torch.zeros(10, 1, dtype=torch.float64)
    region[3:6] = 1
    assert gradcheck(lambda q, k: row_statistic(q, k, region), (q, k))


def test_entropies_that_are_known():
    k = torch.eye(16)[None, None]
    torch.testing.assert_close(row_entropy(torch.zeros(1, 1, 3, 16), k), torch.full((1, 1, 3), math.log(16)))  # all alike
    torch.testing.assert_close(row_entropy(500 * k[:, :, :3], k), torch.zeros(1, 1, 3), atol=1e-4, rtol=0)  # one key
    two = torch.arange(16) < 2
    torch.testing.assert_close(row_entropy(torch.zeros(1, 1, 3, 16), k, mask=two[None]), torch.full((1, 1, 3), math.log(2)))


@pytest.mark.parametrize("kind", MASKS)
def test_attention_kl(kind):
    shape = (2, 3, 7, 11, 4)
    q_t, k_t, _ = tensors((2, 3, 7, 11, 6), torch.float64, seed=5)
    q_s, k_s, v = (x.requires_grad_() for x in tensors(shape, torch.float64))
    mask = mask_of(kind, shape, torch.float64)
    found = attention_kl((q_t, k_t), (q_s, k_s), mask=mask)
    p_t, p_s = (dense_attention(q, k, v, mask)[3] for q, k in ((q_t, k_t), (q_s, k_s)))
    exact = torch.where(p_t > 0, p_t * (p_t.log() - torch.where(p_t > 0, p_s, 1).log()), 0).sum(-1)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), (q_s, k_s)), torch.autograd.grad(exact.sum(), (q_s, k_s)))
    assert gradcheck(lambda q, k: attention_kl((q_t, k_t), (q, k), mask=mask), (q_s, k_s))


def test_attention_kl_of_equals_is_zero_and_holds_the_teacher_fixed():
    q, k, _ = (x.requires_grad_() for x in tensors((1, 2, 6, 10, 4)))
    kl = attention_kl((q, k), (q, k))
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-5, rtol=0)
    for gradient in torch.autograd.grad(kl.sum(), (q, k)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


class Operators(TorchDispatchMode):
    """Names of the operators that ran, and the largest number of elements of a result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("path", ["probe", "kl", "portable"])
def test_the_matrix_is_never_made(path, monkeypatch):
    """Forward and backward: no softmax, and nothing as large as L x S."""
    length = 512
    q, k, v = (x.requires_grad_() for x in tensors((1, 1, length, length, 8)))
    if path == "portable":
        monkeypatch.setattr(fused, "_on_cpu", fused.portable)
    with Operators() as seen:
        if path == "kl":
            attention_kl((k, q), (q, k)).sum().backward()
        else:
            sum(x.sum() for x in everything(q, k, v, None)).backward()
    assert not [name for name in seen.names if "softmax" in name]
    assert seen.largest < length * length / 16
    assert sum("flash_attention" in name and "backward" in name for name in seen.names) >= 2


# The private operators of torch


def test_version_of_the_cpu_operator():
    """Log-sum-exp as a second result, in natural units; fails where torch has moved it, and `_torch.py` must follow."""
    q, k, v = tensors((1, 2, 5, 7, 4))
    out, lse = _torch.attention_forward(q, k, v, None, 0.3)
    exact = dense_attention(q, k, v, None, 0.3)
    torch.testing.assert_close((out, lse), exact[:2])


def test_version_of_the_cpu_operators_backward():
    """It takes row sums of grad * out, and nothing else, from `out`: a shift of them is a gradient of the log-sum-exp."""
    q, k, v = tensors((1, 2, 5, 7, 4), torch.float64)
    out, lse = _torch.attention_forward(q, k, v, None, 0.3)
    grad = torch.ones_like(out)
    shifted = out.clone()
    shifted[..., 0] -= 1
    with_one, without = (_torch.attention_backward(grad, q, k, v, x, lse, None, 0.3) for x in (shifted, out))
    leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
    expected = torch.autograd.grad(dense_attention(*leaves, v, None, 0.3)[1].sum(), leaves)
    torch.testing.assert_close(tuple(a - b for a, b in zip(with_one[:2], without[:2], strict=True)), expected)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q \(B, H, L, D\) has the wrong rank.*\(3, 7, 4\)"),
        (lambda q, k, v: (q, k[..., :3], v), r"D is 4 and 3 in q .* = \(2, 3, 7, 4\), k .* = \(2, 3, 11, 3\)"),
        (lambda q, k, v: (q, k, v[:, :, :9]), r"S is 11 and 9"),
        (lambda q, k, v: (q, k[:, :1], v), r"H is 3 and 1 .*Use expand"),
        (lambda q, k, v: (q, k[:1], v[:1]), r"B is 2 and 1 .*Use expand"),
        (lambda q, k, v: (q[:, :, :0], k, v), r"q \(B, H, L, D\) is empty"),
        (lambda q, k, v: (q.half(), k, v), r"q is float16, k is float32"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), r"one floating dtype"),
        (lambda q, k, v: (q.to("meta"), k, v), r"on cpu and meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        attend_probe(*change(*tensors((2, 3, 7, 11, 4))))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(11), r"wrong rank: its shape is \(11,\).*B, H, L, S = 2, 3, 7, 11"),
        (torch.zeros(2, 7, 11), r"wrong rank"),
        (torch.zeros(7, 1), r"\(1, 1, 7, 1\) does not fit"),
        (torch.zeros(2, 2, 7, 11), r"\(2, 2, 7, 11\) does not fit"),
        (torch.zeros(7, 11).double(), r"The mask is torch.float64, but q is torch.float32"),
        (torch.zeros(7, 11, requires_grad=True), r"requires a gradient"),
        (torch.zeros(7, 11, device="meta"), r"on cpu and meta"),
        (torch.randn(7, 11), r"varies from query to query"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, message):
    q, k, v = tensors((2, 3, 7, 11, 4))
    with pytest.raises(ValueError, match=message):
        attend_probe(q, k, v, mask=mask)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([11], r"Key 11 is out of range: there are S = 11 keys"),
        ([3, -12], r"Key -12 is out of range"),
        ([], r"at least one"),
        ([0.5], r"whole numbers"),
        (torch.zeros(3, 2, dtype=torch.long), r"\(3, 2\), but the batch is 2"),
    ],
)
def test_keys_that_do_not_fit_are_named(keys, message):
    q, k, v = tensors((2, 3, 7, 11, 4))
    with pytest.raises(ValueError, match=message):
        attend_probe(q, k, v, keys)


@pytest.mark.parametrize("shape", [(10, 1), (3, 11, 1)])
def test_values_that_do_not_fit_are_named(shape):
    q, k, _ = tensors((2, 3, 7, 11, 4))
    with pytest.raises(ValueError, match=r"but B = 2 and S = 11"):
        row_statistic(q, k, torch.zeros(shape))


def test_attention_maps_of_other_shapes_have_no_divergence():
    q, k, _ = tensors((2, 3, 7, 11, 4))
    with pytest.raises(ValueError, match=r"differ in shape: the teacher's .*\(2, 1, 7, 4\)"):
        attention_kl((q[:, :1], k[:, :1]), (q, k))


def test_log_sum_exp_alone():
    q, k, v = tensors((2, 3, 7, 11, 4))
    torch.testing.assert_close(log_sum_exp(q, k), attend(q, k, v)[1])


@pytest.mark.parametrize("columns", [3, 16, 77])
def test_any_width_and_layout_of_values_is_fused(columns):
    """Fused kernels want a last dimension that is contiguous, and those of CUDA multiples of 8 channels."""
    q, k, _ = tensors((2, 3, 9, 77, 16))
    mask = mask_of("finite keys", (2, 3, 9, 77, 16))
    p = dense_attention(q.double(), k.double(), k.double(), mask.double())[3]
    widths = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product" in str(func):
                widths.extend(x.shape[-1] for x in args[:3])
            return func(*args, **(kwargs or {}))

    with Look():
        found = token_map(q, k, list(range(columns)), mask=mask.mT.contiguous().mT)
    torch.testing.assert_close(found.double(), p[..., :columns].mean(1), atol=1e-5, rtol=0)
    with Look():
        _, lse = fused.portable(q[..., :11], k[..., :11], k[..., :5], None, 0.2)
    assert lse.isfinite().all()
    assert not any(width % 8 for width in widths)
