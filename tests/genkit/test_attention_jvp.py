"""Forward derivatives of attention by fused calls: against dense attention, inside functions and models that know nothing of
them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.attention.jvp import attend_jvp, forward_mode
from tests import tiny
from tests.oracles import dense_attention

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(B, H, L, S, D, *, seed=0, dtype=torch.float64):
    """q, k, v and their tangents."""
    return [draw(B, H, length, D, seed=seed + i, dtype=dtype) for i, length in enumerate((L, S, S, L, S, S))]


def mask_of(kind, B, L, S):
    if kind is None:
        return None
    open_ = torch.rand(B, 1, L, S, generator=torch.Generator().manual_seed(7)) > 0.3
    open_[0, 0, 0] = False  # a row that sees no key
    return open_ if kind == "boolean" else torch.zeros(B, 1, L, S, dtype=torch.float64).masked_fill(~open_, -math.inf)


@pytest.mark.parametrize("shape", [(2, 3, 7, 5, 8), (1, 1, 1, 1, 3), (1, 2, 33, 77, 40)])
@pytest.mark.parametrize("mask", [None, "boolean", "added"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_output_and_tangent_are_those_of_dense_attention_by_fused_calls(shape, mask, scale):
    q, k, v, *tangents = inputs(*shape)
    mask = mask_of(mask, shape[0], *shape[2:4])
    with sdpa_kernel(FUSED):
        out, t_out = attend_jvp(q, k, v, *tangents, mask=mask, scale=scale)
    expected, t_expected = torch.func.jvp(lambda *x: dense_attention(*x, mask, scale)[0], (q, k, v), tuple(tangents))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(t_out, t_expected, rtol=0, atol=1e-12)


def test_error_in_float32():
    given = inputs(2, 2, 65, 130, 64, dtype=torch.float32)
    exact = [x.double() for x in given]
    expected = torch.func.jvp(lambda *x: dense_attention(*x)[0], tuple(exact[:3]), tuple(exact[3:]))
    for actual, wanted in zip(attend_jvp(*given), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-5)


def test_output_is_differentiable_and_the_tangent_a_constant():
    q, k, v, *tangents = inputs(1, 2, 5, 6, 8)
    q.requires_grad_()
    out, t_out = attend_jvp(q, k, v, *tangents)
    assert not t_out.requires_grad
    (gradient,) = torch.autograd.grad(out.square().sum(), q)
    (expected,) = torch.autograd.grad(dense_attention(q, k, v)[0].square().sum(), q)
    torch.testing.assert_close(gradient, expected)


class Block(torch.nn.Module):
    """Self-attention between linear layers, which has never heard of forward mode."""

    def __init__(self, dense=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(16, 16).double()
        self.dense = dense

    def forward(self, x):
        heads = self.linear(x).view(2, 5, 2, 8).transpose(1, 2)
        arguments = (heads, 2 * heads, heads.sin())
        out = dense_attention(*arguments)[0] if self.dense else F.scaled_dot_product_attention(*arguments)
        return self.linear(out.transpose(1, 2).reshape(2, 5, 16) + x).tanh()


def test_a_function_that_calls_torchs_attention_has_a_forward_derivative():
    x, dx = draw(2, 5, 16), draw(2, 5, 16, seed=1)
    model, dense = Block(), Block(dense=True)
    with sdpa_kernel(FUSED), forward_mode():
        y, dy = torch.func.jvp(model, (x,), (dx,))
        loss = (y * dy.detach()).sum()  # as in MeanFlow: the derivative is part of a constant target
    expected, d_expected = torch.func.jvp(dense, (x,), (dx,))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dy, d_expected)
    gradient = torch.autograd.grad(loss, model.linear.weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * d_expected.detach()).sum(), dense.linear.weight)[0])


def test_forward_ad_without_functorch():
    x, dx = draw(2, 5, 16), draw(2, 5, 16, seed=1)
    with forward_mode(), forward_ad.dual_level():
        _, dy = forward_ad.unpack_dual(Block()(forward_ad.make_dual(x, dx)))
    torch.testing.assert_close(dy, torch.func.jvp(Block(dense=True), (x,), (dx,))[1])


def test_without_a_tangent_the_bits_are_torchs_own():
    model, x = Block(), draw(2, 5, 16)
    before = model(x)
    with forward_mode():
        assert torch.equal(model(x), before)


@pytest.mark.unfused
@pytest.mark.parametrize("family", ["stable_diffusion", "sd3"])
def test_a_whole_denoiser(family):
    pipe = tiny.pipeline(family)
    network = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).double()
    x, dx = draw(1, network.config.in_channels, 8, 8), draw(1, network.config.in_channels, 8, 8, seed=1)
    t, dt = torch.tensor([300.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    if family == "sd3":
        text = {
            "encoder_hidden_states": draw(1, 5, network.config.joint_attention_dim, seed=2),
            "pooled_projections": draw(1, network.config.pooled_projection_dim, seed=3),
        }
    else:
        text = {"encoder_hidden_states": draw(1, 5, network.config.cross_attention_dim, seed=2)}

    def run(x, t):
        return network(x, timestep=t, return_dict=False, **text)[0]

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(run, (x, t), (dx, dt))
    with sdpa_kernel(FUSED):
        with pytest.raises(NotImplementedError):
            torch.func.jvp(run, (x, t), (dx, dt))
        with forward_mode():
            actual = torch.func.jvp(run, (x, t), (dx, dt))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # timestep embeddings are float32


def test_autocast_is_that_of_torchs_attention():
    given = inputs(1, 2, 9, 9, 8, dtype=torch.float32)
    given[2] = given[2].bfloat16()
    given[5] = given[5].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, t_out = attend_jvp(*given)
    assert out.dtype == t_out.dtype == torch.bfloat16


def test_errors_name_the_shapes():
    q, k, v, tq, tk, tv = inputs(2, 2, 5, 6, 8)
    with pytest.raises(ValueError, match=r"tangent of q must be like q, shape \(2, 2, 5, 8\).*\(2, 2, 4, 8\)"):
        attend_jvp(q, k, v, tq[:, :, 1:], tk, tv)
    with pytest.raises(ValueError, match=r"tangent of v must be like v.*float64; it is .*float32"):
        attend_jvp(q, k, v, tq, tk, tv.float())
    with pytest.raises(ValueError, match=r"mask's shape \(1, 1, 5, 5\) does not fit"):
        attend_jvp(q, k, v, tq, tk, tv, mask=torch.zeros(1, 1, 5, 5, dtype=torch.float64))


@pytest.mark.unfused  # dropout never is on the CPU
@pytest.mark.parametrize("asked", [{"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}])
def test_forward_mode_refuses_what_it_does_not_serve(asked):
    x, dx = draw(1, 2, 5, 8), draw(1, 2, 5, 8, seed=1)
    name, value = next(iter(asked.items()))
    with forward_mode(), pytest.raises(ValueError, match=f"{name}={value}"):
        torch.func.jvp(lambda x: F.scaled_dot_product_attention(x, x, x, **asked), (x,), (dx,))
    with forward_mode():
        F.scaled_dot_product_attention(x, x, x, **asked)  # without a tangent it is torch's business
