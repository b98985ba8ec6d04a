"""The switch: every choice does what it says on every kind of host, and leaves nothing behind."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from genkit import _host
from genkit.attention import audit, strict, use_attention, why_unusable
from genkit.attention._torch import kernels_in_order
from genkit.attention.backends import _around, _attention_modules, _both, _Instead, _scope_of, current_mode
from genkit.attention.choices import CHOICES, check_choice
from genkit.attention.varlen import attend_varlen
from genkit.errors import UnfusedAttentionError
from tests import tiny

HOSTS = ("stable_diffusion", "sd3", "flux", "pixart_sigma", "dit", "ddpm")


@functools.cache
def pipeline(family: str) -> Any:
    return tiny.pipeline(family)


def run(pipe: Any, **options: Any) -> Tensor:
    from genkit.denoisers import Denoiser
    from genkit.levels import levels_of

    denoiser = Denoiser.of(pipe)
    denoiser.set_timesteps(pipe.scheduler, 4, denoiser.latent_shape(None, None))
    cond = None
    if "tokenizer" in pipe.components:
        cond = denoiser.condition(prompts=["a red seven"])
    elif denoiser.family == "DiT":
        cond = denoiser.condition(labels=[1])
    x = torch.ones(1, *denoiser.latent_shape(None, None))
    with torch.no_grad():
        return denoiser(x, levels_of(pipe.scheduler)[1], cond, **options).raw


def unet_arguments() -> tuple[Any, ...]:
    return torch.ones(1, 4, 8, 8), 5, torch.ones(1, 3, 8)


def state_of(network: nn.Module) -> list[Any]:
    """Everything that a switch could leave changed."""
    processors = [(type(m.processor), getattr(m.processor, "_attention_backend", "none")) for m in _attention_modules(network)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()]
    cuda = torch.backends.cuda
    kernels = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled())
    order = torch._C._get_sdp_priority_order()
    return [processors, hooks, kernels, order, _AttentionBackendRegistry.get_active_backend()[0], current_mode()]


@pytest.mark.parametrize("family", HOSTS)
def test_flash_and_math_on_every_kind_of_host(family: str) -> None:
    pipe = pipeline(family)
    network = getattr(pipe, "transformer", None) or pipe.unet
    before, plain = state_of(network), run(pipe)
    with use_attention(pipe, "flash"):
        report = audit(lambda: run(pipe), pipe)
        assert torch.equal(run(pipe), plain)
    assert report.unfused == 0 < report.fused
    with use_attention(pipe, "math"), strict() as log:
        report = audit(lambda: run(pipe), pipe)
        assert torch.allclose(run(pipe), plain, atol=1e-5)
    inside = [m for m in report.modules if m.path.startswith(("unet", "transformer"))]
    assert all(m.unfused and not m.fused for m in inside)
    assert all(m.fused and not m.unfused for m in report.modules if m not in inside)  # text encoders keep torch's choice
    assert log.exceptions["attention math"] == 2 * sum(m.unfused for m in inside)
    assert state_of(network) == before


@pytest.mark.parametrize("choice", ["flash", "math", "strict", "auto"])
def test_everything_is_put_back_after_an_error(choice: str) -> None:
    network = pipeline("flux").transformer
    for module in _attention_modules(network):
        module.processor._attention_backend = AttentionBackendName.NATIVE
    before = state_of(network)
    with pytest.raises(KeyError, match=choice), use_attention(network, choice):
        raise KeyError(current_mode())
    assert state_of(network) == before


def test_a_backend_that_the_user_set_is_overruled_and_comes_back() -> None:
    network = copy.deepcopy(pipeline("flux").transformer)
    default = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        network.set_attention_backend("_native_math")  # which changes the default of the process as well
        with use_attention(pipeline("flux"), "flash"), strict():
            run(pipeline("flux"))
        with use_attention(network, "flash"):
            assert {m.processor._attention_backend for m in _attention_modules(network)} == {AttentionBackendName.NATIVE}
        assert {m.processor._attention_backend for m in _attention_modules(network)} == {AttentionBackendName._NATIVE_MATH}
        assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName._NATIVE_MATH
    finally:
        _AttentionBackendRegistry.set_active_backend(default)


def test_the_chosen_kernel_comes_before_the_unfused_one() -> None:
    """Torch's own order has the unfused one before cuDNN's on most devices."""
    own = torch._C._get_sdp_priority_order()
    for choice, kernel in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), _scope_of(choice)():
            assert torch._C._get_sdp_priority_order()[:2] == [int(kernel), int(SDPBackend.MATH)]
            assert torch.backends.cuda.math_sdp_enabled()
            assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch._C._get_sdp_priority_order() == own
    with pytest.raises(KeyError), kernels_in_order(SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        raise KeyError
    assert torch._C._get_sdp_priority_order() == own


def with_dropout(attn: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*[hidden_states[None]] * 3, dropout_p=0.5)[0]


@pytest.mark.unfused  # the last line, on purpose
def test_a_kernel_that_does_not_take_the_call_says_which_module_and_why() -> None:
    network = copy.deepcopy(pipeline("stable_diffusion").unet)
    network.mid_block.attentions[0].transformer_blocks[0].attn2.processor = with_dropout
    says = r"mid_block\S+attn2 is not fused by the flash kernel, which alone is allowed: the fused CPU kernel has no dropout"
    with use_attention(network, "flash"), pytest.raises(UnfusedAttentionError, match=says):
        network(*unet_arguments())
    F.scaled_dot_product_attention(torch.ones(1, 2, 3, 4), *[torch.ones(2, 2, 3, 4)] * 2)  # and the scopes are closed


def test_it_holds_when_gradient_checkpointing_computes_again() -> None:
    network = copy.deepcopy(pipeline("stable_diffusion").unet).train()
    network.enable_gradient_checkpointing()
    x, t, text = unet_arguments()
    with use_attention(network, "math"):
        report = audit(lambda: network(x.requires_grad_(), t, text).sample.sum().backward(), network)
    assert report.fused == 0
    assert all(m.unfused == 2 and m.unfused_backward == 1 for m in report.modules if "transformer_blocks" in m.path)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("efficient", "torch has no such kernel for cpu"),
        ("cudnn", "torch has no such kernel for cpu"),
        ("xformers", "xformers|do not run on cpu"),
        ("varlen", "no kernel for cpu"),
        ("hub:flash", "kernels` package|do not run on cpu"),
        ("hub:flsh", r"Unknown Hub kernel 'flsh'\. Did you mean 'flash'"),
    ],
)
def test_what_is_not_there_is_said_with_the_alternatives(choice: str, reason: str) -> None:
    network = pipeline("stable_diffusion").unet
    before = state_of(network)
    with pytest.raises(ValueError, match=rf"(?s)({reason}).*Usable: auto, strict, flash, math\."), use_attention(network, choice):
        raise AssertionError("not reached")
    assert state_of(network) == before


def test_names() -> None:
    assert [check_choice(name) for name in ("AUTO", "hub:flash_3")] == ["auto", "hub:flash_3"]
    with pytest.raises(ValueError, match=r"Unknown attention 'flesh'\. Did you mean 'flash'"):
        check_choice("flesh")
    assert {name: why_unusable(name) is None for name in CHOICES if ":" not in name} == {
        **dict.fromkeys(("auto", "strict", "flash", "math"), True),
        **dict.fromkeys(("efficient", "cudnn", "varlen"), False),
        "xformers": why_unusable("xformers") is None,
    }


def test_a_compiled_network_is_refused() -> None:
    network = torch.compile(copy.deepcopy(pipeline("stable_diffusion").unet), backend="eager")
    with pytest.raises(ValueError, match="is compiled, so its attention is fixed"), use_attention(network, "flash"):
        raise AssertionError("not reached")


class TestInThePlaceOfSdpa:
    """What xformers and Hub kernels go through, with a function of diffusers that runs here."""

    @pytest.mark.parametrize("family", HOSTS)
    def test_the_function_is_called_and_nothing_else_changes(self, family: str) -> None:
        pipe = pipeline(family)
        network = getattr(pipe, "transformer", None) or pipe.unet
        plain, calls = run(pipe), []
        attend = _host.attention_function("_native_flash" if family != "pixart_sigma" else "native")

        def counted(*args: Any, **options: Any) -> Tensor:
            calls.append(args)
            return attend(*args, **options)

        scopes = [
            _around(m, lambda: _both(sdpa_kernel(SDPBackend.FLASH_ATTENTION), _Instead(counted)))
            for m in _attention_modules(network)
        ]
        for scope in scopes:
            scope.__enter__()
        out = run(pipe)
        for scope in scopes:
            scope.__exit__(None, None, None)
        assert torch.equal(out, plain)
        assert len(calls) == len(scopes)

    def test_what_a_backend_would_ignore_is_refused(self) -> None:
        q = torch.ones(1, 2, 3, 4)
        with pytest.raises(ValueError, match="'sage' would ignore dropout_p, enable_gqa"):
            _host.attention_function("sage")(q, q, q, dropout_p=0.5, enable_gqa=True)


class TestVarlen:
    """The packing, with a kernel in plain torch."""

    @staticmethod
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, longest: int, most: int, **options: Any
    ) -> Tensor:
        assert most == int(key_starts.diff().max())
        out = []
        for (a, b), (c, d) in zip(itertools.pairwise(starts.tolist()), itertools.pairwise(key_starts.tolist()), strict=True):
            rows = F.scaled_dot_product_attention(
                *(t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])),
                is_causal=options.get("window_size") == (-1, 0), scale=options.get("scale"),
            )  # fmt: skip
            out.append(rows[0].transpose(0, 1))
        return torch.cat(out)

    @pytest.mark.parametrize("mask", [None, "bool", "additive", "rows"])
    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_it_equals_sdpa(self, mask: str | None, scale: float | None) -> None:
        q, k, v = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
        kept = torch.arange(7) < torch.tensor([7, 3, 1])[:, None]
        masks = {
            None: None,
            "bool": kept[:, None, None],
            "additive": (~kept[:, None, None]) * -10000.0,
            "rows": kept[:, None, None].expand(3, 2, 5, 7),
        }
        expected = F.scaled_dot_product_attention(q, k, v, masks[mask], scale=scale)
        assert torch.allclose(attend_varlen(q, k, v, masks[mask], scale=scale, kernel=self.kernel), expected, atol=1e-6)

    def test_causal(self) -> None:
        q = torch.randn(2, 2, 5, 8)
        expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert torch.allclose(attend_varlen(q, q, q, is_causal=True, kernel=self.kernel), expected, atol=1e-6)

    @pytest.mark.parametrize("mask", [torch.randn(5, 7), torch.ones(5, 7).tril().bool(), torch.zeros(7).bool()])
    def test_other_masks_are_refused(self, mask: Tensor) -> None:
        q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
        with pytest.raises(ValueError, match="leaves keys out"):
            attend_varlen(q, k, k, mask, kernel=self.kernel)

    def test_other_calls_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\(1, 2, 5, 8\), \(3, 2, 7, 8\), dropout 0"):
            attend_varlen(torch.randn(1, 2, 5, 8), *[torch.randn(3, 2, 7, 8)] * 2, kernel=self.kernel)


def test_checkpoint_functions_see_the_scope_too() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 3, 8, requires_grad=True)
    with use_attention(layer, "math"):
        report = audit(lambda: checkpoint(lambda x: layer(x, x, x, need_weights=False)[0], x, use_reentrant=False).sum().backward())
    assert (report.fused, report.unfused) == (0, 3)
