"""Folded batches against plain ones, on every family at tiny random configurations, and what they leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from genkit import _host
from genkit.attention.folding import Evaluator, Layout, attended, evaluator, tiled
from genkit.attention.prefix import Stop, record, replayed, trace
from genkit.denoisers import Cond, Denoiser
from genkit.levels import Level, training_level
from genkit.scoring import Exhaustive, PairPlan, Race, Scorer
from tests import tiny

CROSSING = ("stable_diffusion", "sdxl", "pixart_alpha", "pixart_sigma", "sana")
OTHERS = ("dit", "sd3", "flux")
PROMPTS = ["a red seven", "cat", "three on yellow paper", "a blue cat"]
# Prompts of 4, 3, 1 and 3 rows, samples that come twice, and in no order.
SAMPLES = torch.tensor([0, 1, 2, 0, 1, 0, 2, 2, 1, 0, 1])
ROWS = torch.tensor([0, 0, 0, 1, 1, 2, 0, 3, 3, 3, 1])


def setting(family: str, **config: Any) -> tuple[Denoiser, Cond, torch.Tensor, Level]:
    """A denoiser, four conditions, and three noisy samples at different levels."""
    denoiser = Denoiser.of(tiny.pipeline(family, **config))
    cond = denoiser.condition(labels=[0, 1, 2, 3]) if family == "dit" else denoiser.condition(prompts=PROMPTS)
    shape = denoiser.latent_shape(8 * denoiser.factor, 8 * denoiser.factor)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    return denoiser, cond, x, training_level(denoiser.pipe.scheduler, [0.2, 0.5, 0.9])


def assert_same(one: Evaluator, other: Evaluator, x: torch.Tensor, level: Level) -> None:
    for samples, rows in ((SAMPLES, ROWS), (torch.arange(3).repeat(4), torch.arange(4).repeat_interleave(3)), (ROWS[:1], ROWS[:1])):
        a, b = one(x, level, samples, rows), other(x, level, samples, rows)
        torch.testing.assert_close(a.raw, b.raw, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.eps, b.eps, rtol=1e-5, atol=1e-5)
        assert (a.variance is None) == (b.variance is None)
        if a.variance is not None:
            torch.testing.assert_close(a.variance, b.variance, rtol=1e-5, atol=1e-5)


def is_folded(evaluate: Evaluator) -> bool:
    return hasattr(evaluate, "attentions")


@contextmanager
def rows_of(modules: dict[str, nn.Module]) -> Iterator[Counter[str]]:
    """How many rows each module computes in the block."""
    counts: Counter[str] = Counter()

    def counting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(value: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            counts[name] += len(value)
            return forward(value, *arguments, **named)

        return call

    for name, module in modules.items():
        module.forward = counting(name, module.forward)
    try:
        yield counts
    finally:
        for module in modules.values():
            del module.forward


# Families


@pytest.mark.parametrize("family", CROSSING)
def test_folded_is_plain(family: str) -> None:
    denoiser, cond, x, level = setting(family)
    folded = evaluator(denoiser, cond)
    assert is_folded(folded)
    assert_same(folded, evaluator(denoiser, cond, fold=False), x, level)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_plain(family: str) -> None:
    denoiser, cond, x, level = setting(family)
    evaluate = evaluator(denoiser, cond)
    assert not is_folded(evaluate)
    expected = denoiser(x[SAMPLES], level[SAMPLES], cond[ROWS]).raw
    assert torch.equal(evaluate(x, level, SAMPLES, ROWS).raw, expected)


@pytest.mark.parametrize("family", CROSSING)
def test_each_prompt_is_projected_once(family: str) -> None:
    denoiser, cond, x, level = setting(family)
    evaluate = evaluator(denoiser, cond)
    attentions = _host.cross_attentions(denoiser.network)
    projections = {f"{i}.{name}": getattr(a, name) for i, a in enumerate(attentions) for name in ("to_k", "to_v")}
    with rows_of(projections) as counts:
        for _ in range(3):
            evaluate(x, level, SAMPLES, ROWS)
    assert set(counts) == set(projections)
    assert set(counts.values()) == {len(cond)}


def test_the_prefix_is_computed_once_a_sample() -> None:
    denoiser, cond, x, level = setting("stable_diffusion")
    evaluate = evaluator(denoiser, cond)
    evaluate(x, level, SAMPLES, ROWS)
    block = denoiser.network.down_blocks[0]
    modules = {
        "in": denoiser.network.conv_in, "resnet": block.resnets[0], "self": block.attentions[0].transformer_blocks[0].attn1,
        "late": denoiser.network.mid_block,
    }  # fmt: skip
    with rows_of(modules) as counts:
        evaluate(x, level, SAMPLES, ROWS)
    assert counts == {"in": 3, "resnet": 3, "self": 3, "late": len(ROWS)}


def test_a_pooled_prompt_shortens_the_prefix() -> None:
    """SDXL adds it to the time, which enters the first residual unit after its first convolution."""
    denoiser, cond, x, level = setting("sdxl")
    evaluate = evaluator(denoiser, cond)
    evaluate(x, level, SAMPLES, ROWS)
    first = denoiser.network.down_blocks[0].resnets[0]
    with rows_of({"in": denoiser.network.conv_in, "conv1": first.conv1, "conv2": first.conv2}) as counts:
        evaluate(x, level, SAMPLES, ROWS)
    assert counts == {"in": 3, "conv1": 3, "conv2": len(ROWS)}


@pytest.mark.parametrize(("family", "limit"), [("stable_diffusion", 0), ("pixart_sigma", 0), ("pixart_sigma", 5000)])
def test_a_cache_that_is_too_small(family: str, limit: int) -> None:
    denoiser, cond, x, level = setting(family)
    evaluate = evaluator(denoiser, cond, cache_bytes=limit)
    assert_same(evaluate, evaluator(denoiser, cond, fold=False), x, level)
    attentions = _host.cross_attentions(denoiser.network)
    with rows_of({str(i): a.to_k for i, a in enumerate(attentions)}) as counts:
        evaluate(x, level, SAMPLES[:4], ROWS[:4])
    # Two of the prompts are in this batch; each is projected once, by layers that have no room.
    assert set(counts.values()) == {2}
    assert len(counts) == len(attentions) - (limit > 0)


def test_one_condition() -> None:
    denoiser, cond, x, level = setting("pixart_sigma")
    one, plain = (evaluator(denoiser, cond[1:2], fold=fold) for fold in (True, False))
    samples, rows = torch.tensor([0, 2, 2]), torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(one(x, level, samples, rows).raw, plain(x, level, samples, rows).raw)


def test_half_precision() -> None:
    denoiser, cond, x, level = setting("stable_diffusion")
    denoiser.pipe.unet.to(torch.bfloat16)
    folded, plain = (evaluator(denoiser, cond, fold=fold)(x, level, SAMPLES, ROWS).raw for fold in (True, False))
    torch.testing.assert_close(folded, plain, rtol=0, atol=2**-6 * plain.abs().max().item())


def test_samples_with_further_channels() -> None:
    """They belong to the condition, so nothing is shared before the cross-attention."""
    denoiser, cond, x, level = setting("stable_diffusion", in_channels=9)
    cond = Cond(cond.tensors | {"concat": torch.randn(4, 5, 8, 8)})
    x = x[:, :4]
    folded, plain = evaluator(denoiser, cond), evaluator(denoiser, cond, fold=False)
    assert is_folded(folded)
    assert_same(folded, plain, x, level)


# What others have done to the network


@pytest.mark.unfused
def test_adapters_hooks_and_the_unfused_processor_are_respected() -> None:
    denoiser, cond, x, level = setting("stable_diffusion")
    unet = denoiser.pipe.unet
    bare = evaluator(denoiser, cond)(x, level, SAMPLES, ROWS).raw
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_q", "to_v"], init_lora_weights=False))
    unet.set_attn_processor(AttnProcessor())
    hooks = [
        unet.conv_in.register_forward_hook(lambda _, __, output: 2 * output),
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.register_forward_hook(lambda _, __, output: output + 1),
    ]
    folded = evaluator(denoiser, cond)
    assert is_folded(folded)
    assert_same(folded, evaluator(denoiser, cond, fold=False), x, level)
    assert not torch.allclose(folded(x, level, SAMPLES, ROWS).raw, bare, atol=1e-3)
    for hook in hooks:
        hook.remove()


class Foreign(AttnProcessor2_0):
    """A processor that genkit knows nothing of."""


def _compile(unet: Any) -> None:
    unet.mid_block.compile()  # nothing happens before the first call


def _fuse(unet: Any) -> None:
    for module in unet.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections(fuse=True)


def _hook(unet: Any) -> None:
    unet.enable_layerwise_casting(torch.bfloat16, torch.float32)


@pytest.mark.parametrize("change", [_compile, _fuse, _hook, lambda unet: unet.set_attn_processor(Foreign())])
def test_changed_networks_are_evaluated_plainly(change: Callable[[Any], None]) -> None:
    denoiser, cond, _, _ = setting("stable_diffusion")
    change(denoiser.pipe.unet)
    assert not is_folded(evaluator(denoiser, cond))


def test_networks_with_another_use_of_the_text_are_evaluated_plainly() -> None:
    simple = {"cross_attention_norm": "layer_norm", "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2}
    for config in ({"dual_cross_attention": True}, simple):
        denoiser, cond, _, _ = setting("stable_diffusion", **config)
        assert not is_folded(evaluator(denoiser, cond))


def test_the_network_is_left_as_it_was() -> None:
    denoiser, cond, x, level = setting("stable_diffusion")
    network, evaluate = denoiser.network, evaluator(denoiser, cond)
    before = denoiser(x, level, cond[:3]).raw
    own = denoiser.network.conv_in.forward
    network.conv_in.forward = own  # as offloading does
    evaluate(x, level, SAMPLES, ROWS)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop here")

    for place in ("conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn2", "mid_block", "conv_out"):
        hook = network.get_submodule(place).register_forward_pre_hook(fail)
        for broken in (evaluate, evaluator(denoiser, cond)):
            with pytest.raises(RuntimeError, match="stop here"):
                broken(x, level, SAMPLES, ROWS)
        hook.remove()
    assert [name for name, module in network.named_modules() if "forward" in module.__dict__] == ["conv_in"]
    assert network.conv_in.forward is own
    assert torch.equal(denoiser(x, level, cond[:3]).raw, before)
    assert not any(module._forward_hooks for module in network.modules())
    assert_same(evaluate, evaluator(denoiser, cond, fold=False), x, level)


# Scoring


@pytest.mark.parametrize("policy", [Exhaustive(), Race(floor=4)], ids=lambda p: type(p).__name__)
def test_scores_are_those_of_plain_batches(policy: object) -> None:
    denoiser, cond, x, _ = setting("pixart_sigma")
    results = []
    for fold, batch_size, pad in ((False, 64, False), (True, 64, False), (True, 7, True)):
        scorer = Scorer(denoiser, PairPlan(count=12), batch_size=batch_size, pad=pad, fold=fold)
        results.append(dict(scorer.run(x, cond, policy)))
    for i, plain in results[0].items():
        for other in results[1:]:
            np.testing.assert_allclose(other[i].scores, plain.scores, rtol=1e-5)
            assert other[i].evaluations == plain.evaluations
            assert other[i].label == plain.label


def test_tables_of_many_conditions() -> None:
    denoiser, cond, x, _ = setting("stable_diffusion")
    cond = denoiser.condition(prompts=[f"{a} {b}" for a in ("red", "blue", "green") for b in ("seven", "three", "cat", "paper")])
    pairs = PairPlan(count=9).pairs(denoiser.pipe.scheduler, x.shape[1:])
    folded, plain = (denoiser.losses(x[:2], pairs, cond, batch_size=32, fold=fold) for fold in (True, False))
    assert folded.shape == (2, 12, 9)
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=0)
    assert plain[1, 7, 3].item() == pytest.approx(denoiser.losses(x[1:2], pairs, cond[7:8], fold=False)[0, 0, 3].item(), rel=1e-5)


def test_ten_prompts_on_digits() -> None:
    """The figure of the issue: the same losses to 1e-5."""
    from genkit.data import digits
    from genkit.pipelines import GuidedPipeline

    denoiser = GuidedPipeline.from_pretrained("digits").denoiser
    cond = denoiser.condition(prompts=[digits.with_articles(f"a {name}") for name in digits.DIGITS])
    with torch.no_grad():
        x0 = denoiser.encode(digits.draw("test", 1, seed=0).images)
    pairs = PairPlan(count=3).pairs(denoiser.pipe.scheduler, x0.shape[1:])
    folded, plain = (denoiser.losses(x0, pairs, cond, fold=fold) for fold in (True, False))
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=0)


# Parts


@pytest.mark.parametrize("seed", range(6))
def test_layouts(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, [1, 2, 5, 9, 30, 4][seed], (40,), generator=rng)
    layout = Layout.of(prompts)
    assert sorted(layout.order.tolist()) == list(range(40))
    assert torch.equal(torch.cat([layout.groups.repeat_interleave(layout.size), layout.rest]), prompts[layout.order])
    counts = torch.bincount(prompts)
    reads = {m: int((counts // m + counts % m).sum()) for m in range(1, 41)}
    assert len(layout.groups) + len(layout.rest) == reads[layout.size]
    assert reads[layout.size] <= 1.25 * min(reads.values())  # it tries the counts and powers of two


def test_a_rectangle_is_one_group_a_prompt() -> None:
    layout = Layout.of(torch.arange(5).repeat(6))
    assert (layout.size, layout.groups.tolist(), len(layout.rest)) == (6, [0, 1, 2, 3, 4], 0)


def test_tiles_are_blocks() -> None:
    samples, prompts = np.indices((40, 100)).reshape(2, -1)
    order = tiled(samples, prompts, 128)
    assert sorted(order) == list(range(4000))
    batches = np.array_split(order, range(128, 4000, 128))
    for items in batches:
        assert len(set(samples[items])) <= 16  # a block, or parts of two
        assert len(set(prompts[items])) <= 18
    assert set(samples[order[:800]]) == set(range(8))
    few = tiled(samples % 5, prompts % 10, 128)
    assert (np.diff((samples % 5)[few]) >= 0).all()


def test_attended_tokens() -> None:
    text = torch.randn(3, 6, 4)
    heard = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0.0]])
    kept, mask = attended(text, ((1 - heard) * -10000)[:, None])
    assert torch.equal(kept, text[:, :3])
    assert torch.equal(mask[:, 0] == 0, heard[:, :3] == 1)
    kept, mask = attended(text, ((1 - heard[:1]) * -10000)[:, None].expand(3, -1, -1))
    assert torch.equal(kept, text[:, :2])
    assert mask is None
    # A prompt without any token attends to all of them alike.
    bias = (torch.cat([heard[:2], torch.zeros(1, 6)]) - 1)[:, None] * 10000
    assert attended(text, bias)[0] is text


class Toy(nn.Module):
    """y = f(x), g(f(x)), then the prompt, then f again."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.h, self.last = (nn.Linear(2, 2) for _ in range(3))
        self.g = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return self.f(self.last(self.g(self.f(x)) + self.h(prompt)))


def test_a_prefix_is_read_off_a_run() -> None:
    from genkit.attention.prefix import Marked

    toy, x, prompt = Toy(), torch.randn(3, 2), torch.randn(3, 2)

    def stop(*_: Any) -> None:
        raise Stop

    hook = toy.last.register_forward_pre_hook(stop)
    prefix = trace(toy, 3, lambda: toy(x, prompt.as_subclass(Marked)))
    hook.remove()
    assert prefix == [toy.f, toy.g]
    with torch.no_grad():
        outputs = record(prefix, lambda: toy(x, prompt))
        index = torch.tensor([2, 0, 0, 1])
        others = torch.randn(4, 2)
        with replayed(prefix, outputs, index):
            # The second call of f is computed.
            torch.testing.assert_close(toy(torch.zeros(4, 2), others), toy.f(toy.last(toy.g(toy.f(x[index])) + toy.h(others))))
