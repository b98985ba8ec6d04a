"""What a run says of its own attention: in pipelines, scorers, extractors and trainers; and that saying it changes nothing."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from genkit.attention import audit, use_attention
from genkit.attention.proof import Proof, proving
from genkit.denoisers import Denoiser
from genkit.errors import UnfusedAttentionError, UnfusedAttentionWarning
from genkit.features import FeatureExtractor
from genkit.guidance import EnergyGuidance, attach
from genkit.pipelines import DiffusionClassifierPipeline, GuidedPipeline
from genkit.scoring import PairPlan, Scorer
from genkit.training import TrainConfig, fit
from tests import tiny

pytestmark = pytest.mark.unfused  # on purpose


@functools.cache
def _pipe() -> Any:
    return tiny.pipeline("stable_diffusion")


def guided(family: str = "stable_diffusion") -> GuidedPipeline:
    return GuidedPipeline.from_pipe(copy.deepcopy(_pipe()) if family == "stable_diffusion" else tiny.pipeline(family))


def draw(pipe: GuidedPipeline, **options: Any) -> Tensor:
    return pipe("a red seven", seeds=[0, 1], num_inference_steps=2, output_type="pt", **options).images


def clean(account: dict[str, Any] | None) -> bool:
    assert account is not None
    return account["fused"] > 0 and not (account["unfused"] or account["unproven"] or account["fallbacks"] or account["modules"])


class Broadcast(nn.Module):
    """One query for every sample, the natural mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query, x, x).mean()


class TestGuidedPipeline:
    def test_a_fused_run(self) -> None:
        pipe = guided()
        assert pipe.attention is None
        first = draw(pipe)
        account = pipe.attention
        assert clean(account)
        assert account["fused"] == 2 * 2 + 8 + 1  # two prompts through two layers, a step, a picture
        with use_attention(pipe, "strict"):
            assert torch.equal(draw(pipe), first)
        assert pipe.attention == {**account, "mode": "strict"}
        json.dumps(account)

    def test_the_same_bits_as_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = guided()
        guidance = EnergyGuidance(lambda x: x.mean((1, 2, 3)), 5.0, route="through_denoiser")
        audited = [draw(pipe), draw(pipe, guidance=guidance), draw(pipe, guidance_scale=1.0)]
        monkeypatch.setattr(Proof, "step", lambda self, *kind, fresh=False: warnings.catch_warnings())
        monkeypatch.setattr("genkit.attention.proof.guarding", lambda *models, **options: warnings.catch_warnings())
        plain = [draw(pipe), draw(pipe, guidance=guidance), draw(pipe, guidance_scale=1.0)]
        assert all(torch.equal(a, b) for a, b in zip(audited, plain, strict=True))

    def test_only_new_kinds_of_steps_are_audited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, made = guided(), []
        watch = pytest.importorskip("genkit.attention.proof").Watch
        monkeypatch.setattr("genkit.attention.proof.Watch", lambda *a, **k: made.append(1) or watch(*a, **k))
        draw(pipe)
        assert len(made) == 3  # condition, step, decode
        account = pipe.attention
        draw(pipe)
        assert len(made) == 3
        assert pipe.attention == account
        pipe("a red seven", seeds=[0], num_inference_steps=2, output_type="latent")
        assert len(made) == 5  # of another shape, and without a picture
        pipe.host.unet.set_attn_processor(AttnProcessor())
        with pytest.warns(UnfusedAttentionWarning):
            draw(pipe)
        assert pipe.attention["unfused"] == 8

    def test_gradients_of_a_guidance_are_counted(self) -> None:
        pipe = guided()
        draw(pipe, guidance=EnergyGuidance(lambda x: x.mean((1, 2, 3)), 5.0, route="through_denoiser"))
        assert clean(pipe.attention)
        assert pipe.attention["fused"] > 2 * 8 + 2

    def test_what_never_fuses_is_said_by_name_and_the_run_goes_on(self) -> None:
        pipe = guided()
        plain = draw(pipe)
        pipe.host.unet.set_attn_processor(AttnProcessor())
        with pytest.warns(UnfusedAttentionWarning, match=r"unet\.down_blocks\S+ never fuses \(AttnProcessor\)") as said:
            out = draw(pipe)
        assert len([w for w in said if w.category is UnfusedAttentionWarning]) == 1
        assert torch.allclose(out, plain, atol=1e-4)
        account = pipe.attention
        assert account["unfused"] == 8
        assert len(account["modules"]) == 8
        assert "separate operators" in account["modules"][0]["reason"]
        with use_attention(pipe, "strict"), pytest.raises(UnfusedAttentionError, match="never fuses"):
            draw(pipe)

    def test_sana_says_what_its_text_encoder_does(self) -> None:
        pipe = guided("sana")
        with pytest.warns(UnfusedAttentionWarning, match="text_encoder never fuses"):
            draw(pipe)
        assert [module["path"] for module in pipe.attention["modules"]] == ["text_encoder.layers.0.self_attn"]

    def test_a_fall_back_in_the_middle_of_a_run(self) -> None:
        pipe, late = guided(), Broadcast()
        energy = EnergyGuidance(lambda x: late(x[:, :, :2, :4]) + x.sum((1, 2, 3)), 1.0).between(0.5, 1)
        with pytest.warns(UnfusedAttentionWarning, match="Broadcast is not fused: fused kernels do not broadcast"):
            pipe("a", seeds=[0, 1], num_inference_steps=4, guidance=energy, output_type="pt")
        assert pipe.attention["unfused"] == 0  # in the first step
        (fallback,) = pipe.attention["fallbacks"]
        assert fallback["path"] == "Broadcast"
        assert fallback["calls"] >= 1
        with use_attention(pipe, "strict"), pytest.raises(UnfusedAttentionError, match="Broadcast"):
            pipe("a", seeds=[0, 1], num_inference_steps=4, guidance=energy, output_type="pt")

    def test_compiled_networks_run_compiled_and_are_unproven(self) -> None:
        pipe = guided()
        calls = []

        def backend(graph: Any, inputs: Any) -> Any:
            calls.append(1)
            return graph.forward

        pipe.host.unet.compile(backend=backend)
        draw(pipe)
        assert calls
        assert pipe.attention["unproven"] == 1  # the network
        assert "torch.compile" in pipe.attention["modules"][0]["reason"]

    def test_nothing_stays_open_after_an_error(self) -> None:
        pipe = guided()

        def broken(x: Tensor) -> Tensor:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            draw(pipe, guidance=EnergyGuidance(broken, 1.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Broadcast()(torch.zeros(3, 1, 2, 4))


def test_attach_guards_a_stock_pipeline() -> None:
    pipe, late = copy.deepcopy(_pipe()), Broadcast()
    guidance = EnergyGuidance(lambda x: late(x[:, :, :2, :4]) + x.sum((1, 2, 3)), 1.0)
    latents = torch.randn(2, 4, 8, 8)
    with pytest.warns(UnfusedAttentionWarning, match="Broadcast"), attach(pipe, guidance):
        pipe(["a", "a"], latents=latents, num_inference_steps=2, output_type="pt")
    with pytest.raises(UnfusedAttentionError, match="Broadcast"), use_attention(pipe, "strict"), attach(pipe, guidance):
        pipe(["a", "a"], latents=latents, num_inference_steps=2, output_type="pt")


@pytest.mark.parametrize("policy", ["race", "taylor"])
def test_classifier(policy: str) -> None:
    pipe = DiffusionClassifierPipeline.from_pipe(copy.deepcopy(_pipe()))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    first = pipe(images, labels=["seven", "three", "cat"], template="a {}", plan=PairPlan(count=4), policy=policy, batch_size=4)
    assert clean(pipe.attention)
    with use_attention(pipe, "strict"):
        again = pipe(images, labels=["seven", "three", "cat"], template="a {}", plan=PairPlan(count=4), policy=policy, batch_size=4)
    assert again.scores == first.scores


def test_scorer_and_extractor() -> None:
    denoiser = Denoiser.of(_pipe())
    scorer = Scorer(denoiser, PairPlan(count=2))
    from genkit.scoring import Exhaustive

    list(scorer.run(torch.zeros(1, 4, 8, 8), denoiser.condition(prompts=["a seven", "a cat"]), Exhaustive()))
    assert clean(scorer.proof.to_dict())
    extractor = FeatureExtractor(denoiser, ["mid"], t=100)
    extractor(latents=torch.zeros(2, 4, 8, 8))
    assert clean(extractor.proof.to_dict())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.layer(x)
        return F.scaled_dot_product_attention(q, q, q)


def test_training_logs_it_once_and_a_resumed_run_does_not_say_it_again(tmp_path: Path) -> None:
    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        return model(torch.randn(2, 2, 3, 4, generator=generator)).square().mean()

    options: dict[str, Any] = {"batch_size": 2, "validate_every": 1, "bf16": False}
    for steps in (2, 4):
        config = TrainConfig(steps=steps, **options)
        fit(Small(), loss, config, tmp_path, name="small", resume=True, validate=lambda model: {"loss": 0.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["attention" in line for line in lines] == [True, False, False, False]
    assert clean(lines[0]["attention"])
    assert lines[0]["attention"]["fused"] == 2  # forward and backward of one update


class TestProof:
    def test_it_may_be_entered_again_and_adds_up(self) -> None:
        model = Broadcast()
        proof = Proof(model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                with proof, proof.step("call"):
                    model(torch.zeros(3, 1, 2, 4))
        assert len(said) == 1
        account = proof.to_dict()
        assert (account["unfused"], account["fallbacks"][0]["calls"]) == (1, 3)

    def test_proving_takes_the_open_one(self) -> None:
        own, outer = Proof(), Proof()
        with proving(own) as proof:
            assert proof is own
        with outer, proving(own) as proof:
            assert proof is outer

    def test_without_audits_it_guards(self) -> None:
        model = Broadcast()
        proof = Proof(model, audits=False)
        with pytest.warns(UnfusedAttentionWarning), proof, proof.step("call"):
            model(torch.zeros(3, 1, 2, 4))
        assert proof.report.modules == ()
        assert proof.to_dict()["fallbacks"][0]["calls"] == 1

    def test_strict_refuses_hand_written_attention_in_the_first_step(self) -> None:
        x = torch.randn(2, 3, 4)
        with use_attention(nn.Identity(), "strict"), Proof() as proof, proof.step("a"), pytest.raises(UnfusedAttentionError):
            (x @ x.mT).softmax(-1) @ x

    def test_it_works_inside_an_audit(self) -> None:
        q = torch.randn(1, 1, 2, 4)

        def run() -> None:
            with Proof() as proof, proof.step("a"):
                F.scaled_dot_product_attention(q, q, q)
            assert proof.report.fused == 1

        assert audit(run).fused == 1
