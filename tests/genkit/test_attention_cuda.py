"""Attention on a CUDA device: the Triton kernels against dense attention in float64, and the switch, the guard and the audit with
CUDA's fused kernels. Skipped where there is no such device; a machine that has one runs

    pytest tests/genkit/test_attention_cuda.py tests/genkit/test_device_cuda.py

Tolerances are those of the interpreted kernels, of the largest number of an output or of 1: 1e-5 in float32, 2e-3 in float16, and
1.6e-2 in bfloat16, whose last digit is 8 times as coarse.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.attention import attend_jvp, attend_probe, audit, forward_mode, kernels, strict, use_attention, why_unusable
from genkit.attention.probe import by_algebra
from genkit.attention.shapes import check
from genkit.attention.statistics import attention_kl, row_entropy, token_map
from genkit.denoisers import Denoiser
from genkit.errors import UnfusedAttentionError
from genkit.levels import training_level
from tests import tiny
from tests.genkit.kernels_interpreted import close, draw, inputs, masks
from tests.oracles import dense_attention

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# B, H, L, S, D: head dimensions of Stable Diffusion (40, 80, 160), PixArt and DiT (72), most others (64, 128), the widest, and one
# whose rows are not aligned; lengths of several blocks that end within one.
CASES = [
    (2, 3, 130, 70, 40, torch.float32, "none"),
    (1, 2, 257, 77, 64, torch.float32, "bias"),
    (2, 2, 65, 130, 64, torch.float32, "padding"),
    (1, 2, 33, 45, 37, torch.float32, "boolean"),
    (1, 1, 1, 1, 8, torch.float32, "none"),
    (2, 2, 300, 77, 40, torch.float16, "bias"),
    (1, 2, 1000, 515, 64, torch.float16, "none"),
    (1, 2, 129, 200, 72, torch.float16, "none"),
    (2, 1, 140, 77, 80, torch.float16, "padding"),
    (1, 2, 260, 333, 128, torch.float16, "bias"),
    (1, 1, 70, 150, 160, torch.float16, "padding"),
    (1, 1, 90, 200, 256, torch.float16, "boolean"),
    (2, 2, 257, 140, 64, torch.bfloat16, "padding"),
    (1, 2, 129, 200, 72, torch.bfloat16, "bias"),
    (1, 2, 300, 77, 80, torch.bfloat16, "none"),
    (1, 2, 260, 333, 128, torch.bfloat16, "none"),
    (1, 1, 70, 150, 256, torch.bfloat16, "none"),
]
NAMES = ["-".join(map(str, case[:5])) + f"-{str(case[5])[6:]}-{case[6]}" for case in CASES]
NARROW = [(case, name) for case, name in zip(CASES, NAMES, strict=True) if case[4] <= 128]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions round their inputs to TF32 by default, which is nothing that these tests look for."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def here(tensors: list[Tensor]) -> list[Tensor]:
    return [x.to(DEVICE) for x in tensors]


def mask_of(kind: str, *shape: Any) -> tuple[Tensor | None, Tensor | None]:
    """A mask, and the same for float64."""
    mask = masks(kind, *shape)
    mask = None if mask is None else mask.to(DEVICE)
    return mask, mask if mask is None or mask.dtype == torch.bool else mask.double()


class TestKernels:
    """`attend_probe` and `attend_jvp` of Triton."""

    @pytest.mark.parametrize("case", CASES, ids=NAMES)
    def test_probe_and_its_gradients(self, case: tuple) -> None:
        B, H, L, S, D, dtype, kind = case
        q, k, v = (x.requires_grad_() for x in here(inputs(B, H, L, S, D, dtype)))
        mask, exact_mask = mask_of(kind, B, H, L, S, dtype)
        keys = torch.arange(B * 3, device=DEVICE).reshape(B, 3) % S
        outputs = kernels.attend_probe(q, k, v, keys, mask=mask, scale=0.2)
        assert [x.dtype for x in outputs] == [dtype, *[torch.float32] * 3]
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out, lse, entropy, p = dense_attention(*exact, exact_mask, 0.2)
        expected = [out, lse, entropy, p.mean(1).gather(2, keys[:, None].expand(B, L, 3))]
        for actual, wanted in zip(outputs, expected, strict=True):
            close(actual, wanted, dtype)
        cotangents = [draw(*x.shape, dtype=x.dtype, seed=20 + i).to(DEVICE) for i, x in enumerate(outputs)]
        cotangents[1] = cotangents[1].masked_fill(~lse.isfinite(), 0)
        gradients = torch.autograd.grad(outputs, (q, k, v), cotangents)
        wanted_gradients = torch.autograd.grad(expected, exact, [x.double() for x in cotangents])
        for actual, wanted in zip(gradients, wanted_gradients, strict=True):
            assert actual.dtype == dtype
            close(actual, wanted, dtype)

    @pytest.mark.parametrize("case", [case for case, _ in NARROW], ids=[name for _, name in NARROW])
    def test_jvp(self, case: tuple) -> None:
        B, H, L, S, D, dtype, kind = case
        primals, tangents = here(inputs(B, H, L, S, D, dtype)), here(inputs(B, H, L, S, D, dtype, seed=5))
        mask, exact_mask = mask_of(kind, B, H, L, S, dtype)
        out, t_out = kernels.attend_jvp(*primals, *tangents, mask=mask)
        wanted, t_wanted = torch.func.jvp(
            lambda *x: dense_attention(*x, exact_mask)[0], tuple(x.double() for x in primals), tuple(x.double() for x in tangents)
        )
        close(out, wanted, dtype)
        close(t_out, t_wanted, dtype)

    @pytest.mark.parametrize("layout", ["sliced", "expanded", "shifted"])
    def test_memory_of_any_layout(self, layout: str) -> None:
        if layout == "sliced":  # of one projection for all three, heads not yet split off
            q, k, v = draw(2, 50, 3, 4, 64, dtype=torch.float16).to(DEVICE).permute(2, 0, 3, 1, 4)
        elif layout == "expanded":
            q, k, v = (draw(1, 4, 50, 64, dtype=torch.float16, seed=i).to(DEVICE).expand(3, -1, -1, -1) for i in range(3))
        else:  # no row starts on a boundary of 16 bytes
            q, k, v = (draw(2, 4, 50, 65, dtype=torch.float16, seed=i).to(DEVICE)[..., 1:] for i in range(3))
        mask = draw(1, 1, 1, 53, dtype=torch.float16).to(DEVICE)[..., 3:]
        outputs = kernels.attend_probe(q, k, v, [1, -2], mask=mask)
        out, lse, entropy, p = dense_attention(*(x.double() for x in (q, k, v)), mask.double())
        for actual, wanted in zip(outputs, (out, lse, entropy, p.mean(1)[..., [1, -2]]), strict=True):
            close(actual, wanted, torch.float16)

    def test_tensors_of_more_than_2_to_the_31_numbers(self) -> None:
        q = torch.randn(33, 16, 65536, 64, device=DEVICE, dtype=torch.float16)
        k, v = (draw(33, 16, 16, 64, dtype=torch.float16, seed=i).to(DEVICE) for i in range(2))
        outputs = kernels.attend_probe(q, k, v, [3])
        rows = slice(65000, None)
        out, lse, entropy, p = dense_attention(q[-1:, :, rows].double(), k[-1:].double(), v[-1:].double())
        expected = (out, lse, entropy, p.mean(1)[..., 3:4])
        found = (outputs[0][-1:, :, rows], outputs[1][-1:, :, rows], outputs[2][-1:, :, rows], outputs[3][-1:, rows])
        for actual, wanted in zip(found, expected, strict=True):
            close(actual, wanted, torch.float16)

    def test_same_call_same_bits(self) -> None:
        def once() -> list[Tensor]:
            q, k, v = (x.requires_grad_() for x in here(inputs(2, 4, 300, 200, 64, torch.float16)))
            outputs = kernels.attend_probe(q, k, v, [1, 2])
            return [*outputs, *torch.autograd.grad(sum(x.float().square().sum() for x in outputs), (q, k, v))]

        assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))

    def test_on_a_stream_of_its_own(self) -> None:
        q, k, v = here(inputs(1, 4, 300, 200, 64, torch.float16))
        expected = kernels.attend_probe(q, k, v)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = kernels.attend_probe(2 * (0.5 * q), k, v)[0]
        stream.synchronize()
        assert torch.equal(found, expected)

    def test_large_logits_keep_their_digits(self) -> None:
        q, k, v = here(inputs(1, 1, 40, 70, 32))
        expected = dense_attention(60 * q.double(), k.double(), v.double())
        for actual, wanted in zip(kernels.attend_probe(60 * q, k, v, [0])[:3], expected, strict=False):
            close(actual, wanted, torch.float32)

    def test_autocast(self) -> None:
        q, k, v = here(inputs(1, 2, 40, 50, 64))
        with torch.autocast(DEVICE, torch.bfloat16):
            out, lse, _, _ = kernels.attend_probe(q, k, v.bfloat16())
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)

    def test_operators_pass_torchs_own_checks(self) -> None:
        q, k, v = (x.requires_grad_() for x in here(inputs(1, 2, 20, 24, 16)))
        keys, mask = torch.tensor([1, 3], device=DEVICE), torch.zeros(1, 1, 1, 24, device=DEVICE)
        torch.library.opcheck(torch.ops.genkit.attend_probe.default, (q, k, v, mask, keys, 0.25))
        tangents = here(inputs(1, 2, 20, 24, 16, seed=5))
        torch.library.opcheck(torch.ops.genkit.attend_jvp.default, (*(x.detach() for x in (q, k, v)), *tangents, mask, 0.25))

    def test_compiled_with_what_is_around_them(self) -> None:
        q, k, v = (x.requires_grad_() for x in here(inputs(1, 2, 40, 50, 64, torch.float16)))
        keys = torch.tensor([1, 3], device=DEVICE)

        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse, entropy, heat = torch.ops.genkit.attend_probe(q.cos(), k, v, None, keys, 0.25)
            return out.float().square().mean() + lse.mean() + entropy.mean() + heat.square().mean()

        eager, compiled = loss(q, k, v), torch.compile(loss, fullgraph=True)(q, k, v)
        close(compiled, eager.double(), torch.float16)
        for a, b in zip(torch.autograd.grad(compiled, (q, k, v)), torch.autograd.grad(eager, (q, k, v)), strict=True):
            close(a, b.double(), torch.float16)


class TestCallers:
    """The public functions: the kernels where they serve, fused calls of torch where they do not."""

    def test_the_kernels_are_chosen(self) -> None:
        q, k, v = here(inputs(1, 2, 40, 50, 64, torch.float16))
        report = audit(lambda: (attend_probe(q, k, v, [1]), attend_jvp(q, k, v, q, k, v)))
        assert (report.fused, report.unfused, report.unproven) == (2, 0, 0)
        assert {name for module in report.modules for name in module.kernels} == {"attend_probe", "attend_jvp"}

    @pytest.mark.parametrize("kind", ["none", "padding", "boolean"])
    @pytest.mark.parametrize("shape", [(2, 3, 130, 70, 40), (1, 2, 65, 77, 80), (1, 2, 33, 45, 37), (1, 1, 20, 30, 160)])
    def test_statistics_by_algebra(self, shape: tuple[int, ...], kind: str) -> None:
        B, H, L, S, _ = shape
        q, k, v = (x.requires_grad_() for x in here(inputs(*shape)))
        mask, exact_mask = mask_of(kind, B, H, L, S, torch.float32)
        added = check(q, k, v, mask)
        keys = torch.tensor([0, S - 1], device=DEVICE)
        found = by_algebra(q, k, v, keys, added, 0.2, entropy=True, output=True)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out, lse, entropy, p = dense_attention(*exact, exact_mask, 0.2)
        expected = [out, lse, entropy, p.mean(1)[..., [0, S - 1]]]
        for actual, wanted in zip(found, expected, strict=True):
            close(actual, wanted, torch.float32)
        chosen = [0, 2, 3]  # as for the kernels, but for rows of which the log-sum-exp is -inf
        gradients = torch.autograd.grad(sum(found[i].sin().sum() for i in chosen), (q, k, v))
        for actual, wanted in zip(gradients, torch.autograd.grad(sum(expected[i].sin().sum() for i in chosen), exact), strict=True):
            close(actual, wanted, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_maps_entropies_and_divergences_are_fused(self, dtype: torch.dtype) -> None:
        """Widths that no fused CUDA kernel takes as they are: 77 one-hot values, and keys with one more number."""
        q, k, _ = here(inputs(2, 2, 40, 77, 40, dtype))
        bias = draw(2, 1, 1, 77, dtype=dtype, seed=3).to(DEVICE)
        _, lse, entropy, p = dense_attention(q.double(), k.double(), k.double(), bias.double())
        tolerance = torch.float32 if dtype == torch.float32 else torch.bfloat16  # algebra adds up rounded numbers
        close(token_map(q, k, list(range(77)), mask=bias), p.mean(1), tolerance)
        close(row_entropy(q, k, mask=bias), entropy, tolerance)
        other, _, _ = here(inputs(2, 2, 40, 77, 40, dtype, seed=7))
        _, lse_s, _, _ = dense_attention(other.double(), k.double(), k.double(), bias.double())
        logits, logits_s = (x.double() @ k.double().mT * 40**-0.5 + bias.double() for x in (q, other))
        expected = (p * (logits - lse[..., None] - logits_s + lse_s[..., None])).sum(-1)
        close(attention_kl((q, k), (other, k), mask=bias), expected, tolerance)

    @pytest.mark.parametrize(("D", "dtype"), [(80, torch.float32), (128, torch.float32), (160, torch.float16)])
    def test_derivative_where_no_kernel_serves(self, D: int, dtype: torch.dtype) -> None:
        primals, tangents = here(inputs(1, 2, 65, 130, D, dtype)), here(inputs(1, 2, 65, 130, D, dtype, seed=5))
        assert kernels.unserved("attend_jvp", primals[0], primals[2])
        found = attend_jvp(*primals, *tangents)
        exact = [tuple(x.double() for x in given) for given in (primals, tangents)]
        for actual, wanted in zip(found, torch.func.jvp(lambda *x: dense_attention(*x)[0], *exact), strict=True):
            close(actual, wanted, dtype)


def pipeline(family: str, dtype: torch.dtype) -> Any:
    """A tiny pipeline on the device, with heads of at least 8 channels, as fused kernels want them."""
    config = {"block_out_channels": (32, 64)} if family in ("stable_diffusion", "sdxl") else {}
    return tiny.pipeline(family, **config).to(DEVICE, dtype)


def call(pipe: Any) -> Any:
    """A function that evaluates a pipeline's network, and the network."""
    denoiser = Denoiser.of(pipe)
    cond = denoiser.condition(prompts=["a red seven"])
    level = training_level(pipe.scheduler, [0.5])
    x = draw(1, *denoiser.latent_shape(None, None)).to(DEVICE)

    def run() -> Tensor:
        with torch.no_grad():
            return denoiser(x, level, cond).raw

    return run, denoiser.network


class TestSwitchAndProof:
    """`use_attention`, `strict` and `audit` on CUDA's fused kernels."""

    @pytest.mark.parametrize("choice", ["flash", "efficient", "cudnn"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("family", ["stable_diffusion", "sd3", "flux"])
    def test_a_kernel_and_no_other(self, family: str, dtype: torch.dtype, choice: str) -> None:
        if (why := why_unusable(choice, DEVICE)) is not None:
            pytest.skip(why)
        pipe = pipeline(family, dtype)
        run, network = call(pipe)
        plain = run()
        with use_attention(pipe, choice), strict(pipe):
            report = audit(run, network)
            chosen = run()
        assert report.unfused == report.unproven == 0 < report.fused
        assert {name for module in report.modules for name in module.kernels} == {f"{choice}_attention"}
        assert (chosen - plain).norm() < 2e-2 * plain.norm()

    @pytest.mark.parametrize("family", ["stable_diffusion", "sd3", "flux", "pixart_sigma"])
    def test_varlen(self, family: str) -> None:
        if (why := why_unusable("varlen", DEVICE)) is not None:
            pytest.skip(why)
        pipe = pipeline(family, torch.bfloat16)
        run, network = call(pipe)
        plain = run()
        with use_attention(pipe, "varlen"):
            report = audit(run, network)
            chosen = run()
        assert report.unfused == 0 < report.fused
        assert (chosen - plain).norm() < 2e-2 * plain.norm()

    @pytest.mark.parametrize("family", ["stable_diffusion", "sd3", "flux"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_forward_and_backward_are_fused(self, family: str, dtype: torch.dtype) -> None:
        denoiser = Denoiser.of(pipeline(family, dtype))
        cond, level = denoiser.condition(prompts=["a red seven"]), training_level(denoiser.pipe.scheduler, [0.5])
        x = draw(1, *denoiser.latent_shape(None, None)).to(DEVICE).requires_grad_()
        report = audit(lambda: denoiser(x, level, cond).raw.square().sum().backward(), denoiser.network)
        assert report.unfused == report.unproven == 0 < report.fused
        assert sum(module.fused_backward for module in report.modules) == report.fused / 2 == sum(m.fused for m in report.modules)

    @pytest.mark.unfused  # on purpose
    def test_what_is_not_fused_is_caught(self) -> None:
        pipe = pipeline("stable_diffusion", torch.float16)
        run, network = call(pipe)
        network.set_default_attn_processor()
        report = audit(run, network)
        assert report.fused == 0 < report.unfused
        with pytest.raises(UnfusedAttentionError, match="AttnProcessor"), strict(pipe):
            run()
        q = draw(1, 2, 16, 64).to(DEVICE)
        for given, reason in (((q.double(),) * 3, "float64"), ((q, *[q.expand(3, -1, -1, -1)] * 2), "expand the smaller tensor")):
            assert audit(lambda given=given: F.scaled_dot_product_attention(*given)).unfused == 1
            with pytest.raises(UnfusedAttentionError, match=reason), strict():
                F.scaled_dot_product_attention(*given)

    def test_a_kernel_that_does_not_take_the_call_says_so(self) -> None:
        pipe = pipeline("stable_diffusion", torch.float32)
        run, _ = call(pipe)
        with use_attention(pipe, "flash"), pytest.raises(UnfusedAttentionError, match="not fused by the flash kernel"):
            run()

    @pytest.mark.unfused  # the reference
    @pytest.mark.parametrize("family", ["stable_diffusion", "sd3"])
    def test_a_denoiser_in_forward_mode(self, family: str) -> None:
        pipe = pipeline(family, torch.float32)
        denoiser = Denoiser.of(pipe)
        cond, level = denoiser.condition(prompts=["a red seven"]), training_level(pipe.scheduler, [0.5])
        x, dx = (draw(1, *denoiser.latent_shape(None, None), seed=i).to(DEVICE) for i in range(2))

        def run(x: Tensor) -> Tensor:
            return denoiser(x, level, cond).raw

        with sdpa_kernel(SDPBackend.MATH):
            expected = torch.func.jvp(run, (x,), (dx,))
        with strict(), forward_mode():
            found = torch.func.jvp(run, (x,), (dx,))
        for actual, wanted in zip(found, expected, strict=True):
            assert (actual - wanted).norm() < 1e-4 * wanted.norm()


def test_a_closed_row_is_nothing_on_every_path() -> None:
    q, k, v = here(inputs(1, 2, 20, 40, 64))
    mask = torch.ones(20, 40, dtype=torch.bool, device=DEVICE)
    mask[3] = False
    for out, lse, entropy, heat in (
        attend_probe(q, k, v, [0], mask=mask),
        by_algebra(q, k, v, torch.tensor([0], device=DEVICE), check(q, k, v, mask), 0.125,
                   entropy=True, output=True),
    ):  # fmt: skip
        assert out[:, :, 3].eq(0).all()
        assert lse[:, :, 3].eq(-math.inf).all()
        assert entropy[:, :, 3].eq(0).all()
        assert heat[:, 3].eq(0).all()
