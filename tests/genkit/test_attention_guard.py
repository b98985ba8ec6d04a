"""strict(), its exceptions, and what it says."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from genkit.attention import jvp_fallback, lint, second_order, strict
from genkit.attention.guard import tolerant
from genkit.errors import UnfusedAttentionError
from tests import tiny

pytestmark = pytest.mark.unfused  # on purpose


@functools.cache
def _pipe() -> Any:
    return tiny.pipeline("stable_diffusion")


def unet() -> Any:
    return copy.deepcopy(_pipe().unet)


def attend(q: Tensor, k: Tensor | None = None, **options: Any) -> Tensor:
    k = q if k is None else k
    return F.scaled_dot_product_attention(q, k, k, **options)


def heads(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 2, 6, 8, dtype=dtype)


class Model(nn.Module):
    """Attention in a module in a module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(options)])

    def forward(self, q: Tensor, k: Tensor | None = None) -> Tensor:
        return self.blocks[0](q, k)


class _Block(nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor | None) -> Tensor:
        return attend(q, k, **self.options)


class TestWhatIsRefused:
    def test_the_message_has_module_reason_shapes_and_remedy(self) -> None:
        model = Model()
        with strict(model), pytest.raises(UnfusedAttentionError) as error:
            model(heads(1), heads(3))
        assert str(error.value) == (
            "The attention of Model.blocks.0 is not fused: fused kernels do not broadcast over batch or heads: expand the smaller "
            "tensor (query (1, 2, 6, 8), key (3, 2, 6, 8), value (3, 2, 6, 8), float32 on cpu)."
        )

    def test_paths_start_with_the_component_of_a_pipeline(self) -> None:
        attention = _pipe().unet.mid_block.attentions[0].transformer_blocks[0].attn1
        says = pytest.raises(UnfusedAttentionError, match=r"of unet\.mid_block\.attentions\.0\.\S+\.attn1 is not")
        with strict(_pipe()), sdpa_kernel(SDPBackend.MATH), says:
            attention(torch.randn(1, 4, 16))

    def test_outside_modules_the_line_is_named(self) -> None:
        with strict(), pytest.raises(UnfusedAttentionError, match=r"test_attention_guard\.py:\d+ \(attend\)"):
            attend(heads(1), heads(3))

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"dropout_p": 0.1}, "the fused CPU kernel has no dropout, here 0.1: use eval mode"),
            ({"attn_mask": torch.zeros(6, 6, requires_grad=True)}, "the mask wants a gradient"),
        ],
    )
    def test_dropout_and_masks_with_gradients(self, options: dict[str, Any], says: str) -> None:
        with strict(), pytest.raises(UnfusedAttentionError, match=says):
            attend(heads(), **options)

    def test_other_shapes_have_torchs_words(self) -> None:
        with strict(), pytest.raises(UnfusedAttentionError, match="head dimension, 8 and 4: pad"):
            F.scaled_dot_product_attention(heads(), heads(), heads()[..., :4])

    def test_an_inner_choice_of_the_unfused_kernel_does_not_pass(self) -> None:
        with strict(), sdpa_kernel(SDPBackend.MATH), pytest.raises(UnfusedAttentionError, match="the code itself asks"):
            attend(heads())

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_in_every_gradient_mode(self, mode: Any) -> None:
        with mode():
            q, k = heads(1), heads(3)
            with strict(), pytest.raises(UnfusedAttentionError):
                attend(q, k)

    def test_when_recomputed_in_the_backward_pass(self) -> None:
        model, q = Model(), heads().requires_grad_()
        out = checkpoint(model, q, use_reentrant=False)
        model.blocks[0].options = {"dropout_p": 0.5}
        with strict(model), pytest.raises(UnfusedAttentionError, match=r"Model\.blocks\.0"):
            out.sum().backward()

    def test_processors_that_never_fuse_are_refused_at_once(self) -> None:
        network = unet()
        network.set_default_attn_processor()
        with (
            pytest.raises(UnfusedAttentionError, match=r"attn1 never fuses \(AttnProcessor\)\. Use set_attn_processor"),
            strict(network),
        ):
            raise AssertionError("not reached")

    def test_hand_written_attention_is_seen_by_watching(self) -> None:
        q = heads()
        with strict():
            (q @ q.mT).softmax(-1) @ q  # a blind spot, without
        with strict(watch=True), pytest.raises(UnfusedAttentionError, match="matmul, softmax and matmul in separate operators"):
            (q @ q.mT).softmax(-1) @ q


class TestWhatPasses:
    def test_fused_attention_forward_and_backward_with_the_same_bits(self) -> None:
        network, x, text = unet(), torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 3, 8)

        def run() -> list[Tensor]:
            out = network(x, 5, text).sample
            return [out, *torch.autograd.grad(out.square().sum(), x)]

        plain = run()
        with strict(network, watch=True) as log:
            guarded = run()
        assert all(torch.equal(a, b) for a, b in zip(plain, guarded, strict=True))
        assert not log.fallbacks
        assert not log.exceptions

    def test_float64_on_the_cpu(self) -> None:
        with strict():
            attend(heads(dtype=torch.float64))

    def test_nothing_is_left_behind(self) -> None:
        with pytest.raises(KeyError), strict():
            raise KeyError
        attend(heads(1), heads(3))

    def test_fallbacks_have_the_same_bits(self) -> None:
        q, k = heads(1), heads(3)
        plain = attend(q, k)
        with warnings.catch_warnings(), tolerant():
            warnings.simplefilter("ignore")
            assert torch.equal(plain, attend(q, k))

    def test_a_guard_may_close_before_one_that_it_holds(self) -> None:
        outer, inner = strict(), strict()
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        with pytest.raises(UnfusedAttentionError):
            attend(heads(1), heads(3))
        inner.__exit__(None, None, None)
        attend(heads(1), heads(3))

    def test_it_is_for_all_threads(self) -> None:
        errors: list[Exception] = []

        def work() -> None:
            try:
                attend(heads(1), heads(3))
            except UnfusedAttentionError as error:
                errors.append(error)

        with strict():
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert len(errors) == 1


class TestExceptions:
    def test_second_order_is_right_and_counted(self) -> None:
        q = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)

        def penalty(q: Tensor) -> Tensor:
            return torch.autograd.grad(attend(q).square().sum(), q, create_graph=True)[0].square().sum()

        with strict() as log, second_order():
            assert torch.autograd.gradcheck(lambda q: torch.autograd.grad(attend(q).square().sum(), q, create_graph=True)[0], q)
            penalty(q).backward()
        assert log.exceptions["second order"] > 0
        assert not log.fallbacks
        with pytest.raises(RuntimeError, match="derivative"):
            penalty(q).backward()  # fused kernels cannot

    def test_forward_mode_is_counted_under_its_own_name(self) -> None:
        q = heads()
        with strict() as log, jvp_fallback():
            torch.func.jvp(attend, (q,), (q,))
        assert log.exceptions == {"jvp": 1}

    def test_a_strict_guard_inside_an_exception_still_refuses(self) -> None:
        with second_order(), strict(), pytest.raises(UnfusedAttentionError):
            attend(heads(1), heads(3))

    def test_exceptions_also_cover_what_tolerates(self) -> None:
        with warnings.catch_warnings(), strict() as outer, second_order(), tolerant() as inner:
            warnings.simplefilter("error")
            attend(heads(1), heads(3))
        assert outer.exceptions == inner.exceptions == {"second order": 1}
        assert not inner.fallbacks

    def test_they_end(self) -> None:
        with strict():
            with second_order():
                attend(heads())
            attend(heads())
            with pytest.raises(UnfusedAttentionError):
                attend(heads(1), heads(3))


class TestTolerance:
    def test_one_warning_for_each_module_and_every_call_counted(self) -> None:
        model = Model()
        with warnings.catch_warnings(record=True) as caught, tolerant(model) as log:
            warnings.simplefilter("always")
            for _ in range(3):
                model(heads(1), heads(3))
        assert [str(warning.message)[:49] for warning in caught] == ["The attention of Model.blocks.0 is not fused: fus"]
        assert log.fallbacks == {"Model.blocks.0": 3}
        assert "expand" in log.reasons["Model.blocks.0"]

    def test_strict_around_it_wins(self) -> None:
        with strict(), tolerant(), pytest.raises(UnfusedAttentionError):
            attend(heads(1), heads(3))


class TestLint:
    def test_the_families_have_nothing_but_the_text_encoder_of_sana(self) -> None:
        assert lint(_pipe()) == ()
        assert lint(_pipe().unet, _pipe().vae) == ()
        found = lint(tiny.gemma())
        assert [finding.kind for finding in found] == ["never"]
        assert "Encode text once" in found[0].text

    def test_processors(self) -> None:
        network = unet()
        network.set_attention_slice(1)
        found = lint(network)
        assert {(finding.kind, finding.what) for finding in found} == {("never", "SlicedAttnProcessor")}
        network.set_attn_processor(diffusers.models.attention_processor.AttnAddedKVProcessor())
        assert "Use AttnAddedKVProcessor2_0" in lint(network)[0].fix
        network.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
        assert lint(network) == ()

    @pytest.mark.parametrize(
        ("backend", "kind"), [("flex", "never"), ("_native_math", "never"), ("sage", "unproven"), ("native", None), (None, None)]
    )
    def test_backends_of_the_dispatcher(self, backend: str | None, kind: str | None) -> None:
        network = tiny.pipeline("flux").transformer
        for module in network.modules():
            if hasattr(module, "processor"):
                module.processor._attention_backend = backend
        assert {finding.kind for finding in lint(network)} == ({kind} if kind else set())

    def test_transformers(self) -> None:
        import transformers

        text = transformers.CLIPTextModel._from_config(tiny.clip_text().config, attn_implementation="eager")
        assert [finding.never for finding in lint(text)] == [True]
        assert 'set_attn_implementation("sdpa")' in lint(text)[0].fix
        text.set_attn_implementation("sdpa")
        assert lint(text) == ()
        biased = lint(tiny.t5())
        assert [finding.kind for finding in biased] == ["grad"]
        assert biased[0].path.endswith("relative_attention_bias")
        assert lint(tiny.t5().requires_grad_(False)) == ()

    @pytest.mark.parametrize(
        ("name", "kinds"),
        [
            ("vit_tiny_patch16_224", set()),
            ("vit_small_patch14_dinov2", set()),
            ("eva02_tiny_patch14_224", set()),
            ("resnet18", set()),
            ("skresnet18", set()),  # a softmax over branches, no attention
            ("swin_tiny_patch4_window7_224", {"never", "grad"}),
            ("cait_xxs24_224", {"never"}),
            ("levit_128s", {"never", "grad"}),
            ("beit_base_patch16_224", {"grad"}),
        ],
    )
    def test_networks_of_timm(self, name: str, kinds: set[str]) -> None:
        import timm

        with torch.device("meta"):
            network = timm.create_model(name, pretrained=False)
        assert {finding.kind for finding in lint(network)} == kinds

    def test_compiled_and_multi_head(self) -> None:
        layer = nn.MultiheadAttention(8, 2)
        assert [finding.kind for finding in lint(layer)] == ["depends"]
        assert "unproven" in {finding.kind for finding in lint(torch.compile(Model(), backend="eager"))}
