"""Nothing that is unfused passes for fused: the seeded cases of known blind spots, and the families themselves."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from genkit.attention import audit, use_attention
from genkit.denoisers import Denoiser
from genkit.errors import UnfusedAttentionError, UnfusedAttentionWarning
from genkit.levels import Level, levels_of
from tests import tiny

pytestmark = pytest.mark.unfused  # on purpose


def counts(report: Any) -> tuple[int, int, int]:
    return report.fused, report.unfused, report.unproven


def heads(batch: int = 2, length: int = 6, grad: bool = False) -> Tensor:
    return torch.randn(batch, 2, length, 8, requires_grad=grad)


@functools.cache
def _unet() -> Any:
    return tiny.pipeline("stable_diffusion").unet


def unet() -> Any:
    return copy.deepcopy(_unet())


def run_unet(network: Any) -> None:
    network(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 8))


class TestSeeded:
    """The cases of the host's study, in its order."""

    def test_1_the_default_processor_is_the_unfused_one(self) -> None:
        network = unet()
        assert counts(audit(lambda: run_unet(network), network)) == (8, 0, 0)
        network.set_default_attn_processor()
        report = audit(lambda: run_unet(network), network)
        assert counts(report) == (0, 8, 0)
        assert report.modules[0].path == "UNet2DConditionModel.down_blocks.0.attentions.0.transformer_blocks.0.attn1"

    def test_2_slicing(self) -> None:
        pipe = tiny.pipeline("stable_diffusion")
        pipe.enable_attention_slicing(1)
        report = audit(lambda: run_unet(pipe.unet), pipe)
        assert report.fused == 0
        assert report.unfused >= 8
        assert all(module.path.startswith("unet.") for module in report.modules)

    def test_3_t5_with_gradients(self) -> None:
        encoder, tokens = tiny.t5().eval(), torch.tensor([[1, 2, 3]])
        report = audit(lambda: encoder(tokens).last_hidden_state.sum().backward(), encoder)
        assert counts(report) == (0, 2, 0)  # forward and backward
        assert "mask wants a gradient" in report.modules[0].reason
        with torch.no_grad():
            assert counts(audit(lambda: encoder(tokens))) == (1, 0, 0)
        encoder.requires_grad_(False)
        assert counts(audit(lambda: encoder(tokens))) == (1, 0, 0)

    def test_4_one_query_for_many_keys(self) -> None:
        q, k = heads(1), heads(3)
        report = audit(lambda: F.scaled_dot_product_attention(q, k, k))
        assert counts(report) == (0, 1, 0)
        assert "expand the smaller tensor" in report.modules[0].reason
        assert "query (1, 2, 6, 8), key (3, 2, 6, 8)" in report.modules[0].reason
        assert "test_attention_audit.py" in report.modules[0].path
        assert counts(audit(lambda: F.scaled_dot_product_attention(q.expand(3, -1, -1, -1), k, k))) == (1, 0, 0)

    @pytest.mark.parametrize(("need_weights", "expected"), [(True, (0, 2, 0)), (False, (2, 0, 0))])
    def test_5_multi_head_attention_in_training(self, need_weights: bool, expected: tuple[int, int, int]) -> None:
        layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
        report = audit(lambda: layer(x, x, x, need_weights=need_weights)[0].sum().backward(), layer)
        assert counts(report) == expected

    def test_5_multi_head_attention_in_evaluation_is_opaque(self) -> None:
        x = torch.randn(2, 5, 8)
        with torch.no_grad():
            layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
            assert counts(audit(lambda: layer(x, x, x))) == (0, 0, 1)
            whole = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
            report = audit(lambda: whole(x))
        assert counts(report) == (0, 0, 1)
        assert report.modules[0].kernels == ("transformer_encoder_layer_fwd",)

    @pytest.mark.parametrize(
        ("name", "options", "unfused"),
        [
            ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1,), "num_heads": (2,)}, True),
            ("cait_xxs24_224", {"embed_dim": 8, "depth": 1, "num_heads": 2}, True),
            ("vit_tiny_patch16_224", {"embed_dim": 8, "depth": 1, "num_heads": 2}, False),
        ],
    )
    def test_6_networks_of_timm(self, name: str, options: dict[str, Any], unfused: bool) -> None:
        network = timm.create_model(name, pretrained=False, num_classes=2, **options).eval()
        report = audit(lambda: network(torch.randn(1, 3, 224, 224)).sum().backward(), network)
        assert (report.unfused > 0) == unfused
        assert report.fused > 0 or unfused

    def test_6_a_trained_bias_is_a_mask_that_wants_a_gradient(self) -> None:
        network = timm.create_model("beit_base_patch16_224", embed_dim=8, depth=1, num_heads=2, num_classes=2).eval()
        x = torch.randn(1, 3, 224, 224)
        assert counts(audit(lambda: network(x))) == (0, 1, 0)
        with torch.no_grad():
            assert counts(audit(lambda: network(x))) == (1, 0, 0)

    def test_7_einsum_and_softmax_by_hand(self) -> None:
        q, k, v = (heads(grad=True) for _ in range(3))

        def by_hand() -> None:
            weights = (torch.einsum("bhld,bhsd->bhls", q, k) / 8**0.5).float().softmax(-1)
            torch.einsum("bhls,bhsd->bhld", F.dropout(weights, 0.1), v).sum().backward()

        report = audit(by_hand)
        assert counts(report) == (0, 2, 0)
        assert (report.modules[0].unfused, report.modules[0].unfused_backward) == (1, 1)

    def test_8_a_text_encoder_with_soft_capping(self) -> None:
        encoder = tiny.gemma().eval()
        with torch.no_grad():
            report = audit(lambda: encoder(torch.tensor([[5, 6, 7]])), encoder)
        assert counts(report) == (0, 1, 0)
        assert report.modules[0].path == "Gemma2Model.layers.0.self_attn"

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_9_flex_attention_that_is_not_compiled(self) -> None:
        q = heads(length=16)
        report = audit(lambda: flex_attention(q, q, q))
        assert counts(report) == (0, 1, 0)
        assert report.modules[0].kernels == ("flex_attention",)

    def test_9_output_attentions_brings_no_maps_and_stays_fused(self) -> None:
        encoder, tokens = tiny.clip_text().eval(), torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            assert counts(audit(lambda: encoder(tokens, output_attentions=True))) == (2, 0, 0)
        eager = transformers.CLIPTextModel._from_config(encoder.config, attn_implementation="eager").eval()
        with torch.no_grad():
            assert counts(audit(lambda: eager(tokens))) == (0, 2, 0)


class TestWhatElseCouldPass:
    def test_an_inner_kernel_choice(self) -> None:
        q = heads()

        def inner() -> None:
            with sdpa_kernel(SDPBackend.MATH):
                F.scaled_dot_product_attention(q, q, q)

        report = audit(inner)
        assert counts(report) == (0, 1, 0)
        assert "asks for the unfused kernel" in report.modules[0].reason

    def test_dropout_on_the_cpu(self) -> None:
        q = heads()
        report = audit(lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
        assert counts(report) == (0, 1, 0)
        assert "no dropout, here 0.5" in report.modules[0].reason

    @pytest.mark.parametrize(
        "attend",
        [
            lambda q, k, v: torch.bmm(torch.baddbmm(torch.zeros(4, 6, 6), q, k.mT, beta=0, alpha=0.3).softmax(-1), v),
            lambda q, k, v: (e := (q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True) @ v,
            lambda q, k, v: F.log_softmax(q @ k.mT, -1).exp() @ v,
            lambda q, k, v: torch.cat([(part @ k.mT).softmax(-1) for part in q.chunk(3, 1)], 1) @ v,
            lambda q, k, v: (
                (q @ k.mT).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1).to(torch.float64) @ v.double()
            ),
            lambda q, k, v: (q[0] @ k[0].T).softmax(-1) @ v[0],
            lambda q, k, v: (q @ k.mT).half().softmax(-1).float().clone().contiguous().reshape(4, 6, 6) @ v,
        ],
        ids=["baddbmm", "exp and sum", "log-softmax", "chunks", "mask and cast", "two-dimensional", "half"],
    )
    @pytest.mark.parametrize("inference", [False, True])
    def test_hand_written_forms(self, attend: Callable[..., Tensor], inference: bool) -> None:
        with torch.inference_mode(inference):
            q, k, v = (torch.randn(4, 6, 8) for _ in range(3))
            report = audit(lambda: attend(q, k, v))
        assert report.fused == report.unproven == 0
        assert report.unfused >= 1

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            q, k = heads(1), heads(3)
            assert counts(audit(lambda: F.scaled_dot_product_attention(k, k, k))) == (1, 0, 0)
            assert counts(audit(lambda: F.scaled_dot_product_attention(q, k, k))) == (0, 1, 0)

    def test_what_is_no_attention(self) -> None:
        x, linear = torch.randn(4, 6, 8), nn.Linear(8, 8)

        def others() -> None:
            linear(x).softmax(-1)  # a gate
            F.cross_entropy(linear(x).flatten(0, 1), torch.zeros(24, dtype=torch.long))
            (x @ x.mT).softmax(-1).sum(-1)  # a map that meets no values
            torch.relu(x) @ (torch.relu(x).mT @ x)  # linear attention has no L x S matrix

        assert counts(audit(others)) == (0, 0, 0)
        # Pooling with learned scores is no product of queries and keys; nothing proves that it is harmless.
        assert counts(audit(lambda: linear(x).mT.softmax(-1) @ x)) == (0, 0, 1)

    @pytest.mark.parametrize("whole", [True, False])
    def test_a_compiled_region_is_unproven(self, whole: bool) -> None:
        network = unet()
        network = torch.compile(network, backend="eager") if whole else network
        if not whole:
            network.compile(backend="eager")
        report = audit(lambda: run_unet(network))
        assert counts(report) == (0, 0, 8)
        assert "torch.compile" in report.modules[0].reason

    def test_a_compiled_function_is_unproven(self) -> None:
        attend = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="eager")
        assert counts(audit(lambda: attend(heads()))) == (0, 0, 1)

    def test_backward_passes_go_to_their_modules_also_when_recomputed(self) -> None:
        network = unet()
        x = torch.randn(1, 4, 8, 8, requires_grad=True)
        text = torch.randn(1, 3, 8)
        report = audit(lambda: network(x, 5, text).sample.sum().backward(), network)
        assert counts(report) == (16, 0, 0)
        assert all((m.fused, m.fused_backward) == (1, 1) for m in report.modules)
        again = audit(lambda: checkpoint(lambda x: network(x, 5, text).sample, x, use_reentrant=False).sum().backward(), network)
        assert all((m.fused, m.fused_backward) == (2, 1) for m in again.modules)
        assert {m.path for m in again.modules} == {m.path for m in report.modules}

    def test_memory_that_is_used_again_leads_to_no_other_module(self) -> None:
        """Log-sum-exps of calls that are forgotten are as large as the queries here, which come to lie where they were."""

        class Attention(nn.Module):
            def forward(self, q: torch.Tensor) -> torch.Tensor:
                return F.scaled_dot_product_attention(q, q, q)

        network = nn.ModuleDict({"forgotten": Attention(), "kept": Attention()})
        x = torch.randn(1, 4, 64, 1, requires_grad=True)

        def run() -> None:
            for _ in range(4):
                network["forgotten"](x)
            sum(network["kept"](q).sum() for q in [x * k for k in range(8)]).backward()

        found = {module.path.rpartition(".")[2]: (module.fused, module.fused_backward) for module in audit(run, network).modules}
        assert found == {"forgotten": (4, 0), "kept": (8, 8)}

    def test_memory_that_scores_lay_in_makes_no_scores_of_what_comes_to_lie_there(self) -> None:
        """Softmaxes are thrown away; what attention gives, each as large, comes to lie where they were, and is multiplied."""
        a, q, c = torch.randn(4, 64, 8), torch.randn(4, 1, 64, 64), torch.randn(4, 64, 64)

        def run() -> None:
            thrown_away = [torch.softmax(torch.bmm(a, a.mT), -1) for _ in range(8)]
            del thrown_away
            for out in [F.scaled_dot_product_attention(q, q, q) for _ in range(8)]:
                torch.bmm(out[:, 0], c)

        assert counts(audit(run)) == (8, 0, 0)

    def test_forward_mode_and_second_order(self) -> None:
        q = heads()

        def forward_mode() -> None:
            with sdpa_kernel(SDPBackend.MATH):
                torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, q, q), (q,), (q,))

        assert audit(forward_mode).unfused >= 1

    def test_an_error_inside_comes_out_and_nothing_stays(self) -> None:
        def broken() -> None:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            audit(broken)
        assert counts(audit(lambda: F.scaled_dot_product_attention(*[heads()] * 3))) == (1, 0, 0)


def inputs_of(family: str, denoiser: Denoiser) -> Any:
    if family in ("ddpm", "ddim"):
        return None
    return denoiser.condition(labels=[1, 2]) if family == "dit" else denoiser.condition(prompts=["a red seven", "a cat"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_forward_and_backward(family: str) -> None:
    """Every attention of every family is fused, but that of Sana's text encoder, whose soft-capped scores no kernel has."""
    pipe = tiny.pipeline(family)
    denoiser = Denoiser.of(pipe)
    denoiser.set_timesteps(pipe.scheduler, 4, denoiser.latent_shape(None, None))
    level = levels_of(pipe.scheduler)[1]

    def one_step() -> None:
        cond = inputs_of(family, denoiser)
        x = torch.randn(2, *denoiser.latent_shape(None, None), requires_grad=True)
        denoiser(x, level, cond).raw.square().sum().backward()
        denoiser.decode(denoiser.encode(torch.zeros(1, 3, 16, 16)))

    report = audit(one_step, pipe)
    expected = {"text_encoder.layers.0.self_attn"} if family == "sana" else set()
    assert {m.path for m in report.modules if m.unfused or m.unproven} == expected
    network = [m for m in report.modules if m.path.startswith(("unet", "transformer"))]
    assert network
    assert all(m.fused == m.fused_backward > 0 for m in network)
    assert all(m.path.split(".")[0] in pipe.components for m in report.modules)


def test_the_report_as_data_and_as_a_table() -> None:
    network = unet()
    report = audit(lambda: run_unet(network), network)
    document = json.loads(json.dumps(report.to_dict()))
    assert set(document) == {"fused", "unfused", "unproven", "modules"}
    assert document["fused"] == 8
    assert document["modules"][0]["forward"] == {"fused": 1, "unfused": 0, "unproven": 0}
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    assert "up_blocks.*.attentions.*.transformer_blocks.*.attn1" in text
    assert "flash_attention_for_cpu" in text


def test_auditing_changes_no_bit() -> None:
    network, x, text = unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    plain = network(x, 5, text).sample
    found = []
    audit(lambda: found.append(network(x, 5, text).sample), network)
    assert torch.equal(plain, found[0])


class TestNetworksOfGenkit:
    """What genkit brings itself: pooling heads, discriminators, classifiers of noisy samples, heads on features."""

    def test_pooling_and_attention_heads(self) -> None:
        from genkit.features import AttentionHead
        from genkit.guidance.networks import PooledHead

        h = torch.randn(2, 16, 4, 4, requires_grad=True)
        pooled = PooledHead(16, 3, attention_head_dim=8, norm_num_groups=4)
        transformer = AttentionHead({"a": (16, 4, 4)}, 3, width=8, num_heads=2)
        for head, layers in ((pooled, 1), (transformer, 2)):
            value = functools.partial(head, h if head is pooled else {"a": h})
            assert counts(audit(lambda: value().sum().backward(), head)) == (2 * layers, 0, 0)  # noqa: B023
            with torch.no_grad():
                assert counts(audit(value, head.eval())) == (layers, 0, 0)

    def test_the_embedded_discriminator(self) -> None:
        from genkit.denoisers import Cond
        from genkit.guidance import load_discriminator

        network = load_discriminator("digits-discriminator")
        x = torch.randn(2, *network.config.sample_shape, requires_grad=True)
        level, cond = Level(0.8, 0.6, 300.0), Cond({"prompt_embeds": torch.randn(2, 12, 128)})
        report = audit(lambda: (network(x, level, cond) + network.matching(x, level, cond)).sum().backward(), network)
        assert report.fused > 0
        assert report.unfused == report.unproven == 0

    @pytest.mark.filterwarnings("error::genkit.errors.UnfusedAttentionWarning")
    def test_encoders_that_are_brought_are_looked_at(self) -> None:
        from genkit.distill.sources import PixelEncoder

        sizes = {"embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 0}
        PixelEncoder(timm.create_model("vit_tiny_patch16_224", **sizes), None, ["blocks.0"], size=224)
        never = timm.create_model("cait_xxs24_224", **sizes)
        with pytest.raises(UnfusedAttentionWarning, match=r"Cait\.blocks\.0\.attn never fuses"):
            PixelEncoder(never, None, ["blocks.0"], size=224)
        with use_attention(never, "strict"), pytest.raises(UnfusedAttentionError, match="never fuses"):
            PixelEncoder(never, None, ["blocks.0"], size=224)
