"""Attend-and-Excite: shares against the dense matrix, the gradient against differences, displacements, refinement, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from genkit.attention import watching as watching_module
from genkit.attention.watching import watching
from genkit.denoisers import Denoiser
from genkit.denoisers.words import prompt_positions, word_positions
from genkit.guidance import AttendAndExcite, State, attach, registry
from genkit.guidance.attend import SHARPNESS, AttentionReader, smoothed
from genkit.levels import levels_of
from genkit.pipelines import GuidedPipeline
from tests import tiny
from tests.oracles import dense_attention

FAMILIES = ["stable_diffusion", "sdxl", "sd3", "flux", "pixart_sigma"]
PROMPTS = ["a red seven on paper", "seven red cat"]
WORDS = ["red", "seven"]


def denoiser_of(family, **config):
    return Denoiser.of(tiny.pipeline(family, **config))


def state_of(denoiser, scheduler=None, *, index=0, steps=10, batch=2):
    scheduler = denoiser.pipe.scheduler if scheduler is None else scheduler
    shape = denoiser.latent_shape(16, 16)
    denoiser.set_timesteps(scheduler, steps, shape)
    levels = levels_of(scheduler)
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    cond = denoiser.condition(prompts=PROMPTS[:batch])
    return State(x, levels[index], levels, cond, denoiser.codec, None, scheduler, denoiser)


def dense_shares(denoiser, state, x, grid):
    """(B, W) from whole matrices in float64: the definition."""
    seen = []
    with watching(denoiser, seen.append), torch.no_grad():
        denoiser(x, state.level, state.cond)
    layers = [a for a in seen if a.text is not None and a.grid == grid]
    maps = []
    for a in layers:
        q, k, mask = (value if value is None else value.double() for value in (a.q, a.k, a.mask))
        maps.append(dense_attention(q, k, k, mask, a.scale)[3].mean(1)[..., a.text :])
    p = sum(maps) / len(maps)
    count = state.cond.tensors["prompt_embeds"].shape[1]
    found = []
    for i in range(len(x)):
        own = prompt_positions(denoiser, PROMPTS[i], count)
        shares = (SHARPNESS * p[i][:, own]).softmax(-1)
        positions = word_positions(denoiser, PROMPTS[i], count)
        words = [shares[:, [own.index(j) for j in positions[word]]].sum(-1).unflatten(0, grid) for word in WORDS]
        found.append(smoothed(torch.stack(words)[None])[0].amax((1, 2)))
    return torch.stack(found)


# The loss


def test_smoothing_keeps_a_level_and_blurs_a_point():
    assert torch.allclose(smoothed(torch.full((1, 2, 4, 4), 0.3)), torch.full((1, 2, 4, 4), 0.3))
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 1
    blurred = smoothed(point)[0, 0]
    ratio = math.exp(-1 / (2 * 0.5**2))
    torch.testing.assert_close(blurred[2, 3] / blurred[2, 2], torch.tensor(ratio))
    torch.testing.assert_close(blurred.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_the_dense_matrix(family):
    denoiser = denoiser_of(family)
    state = state_of(denoiser)
    reader = AttentionReader(denoiser, state.cond, WORDS)
    grids = []
    with watching(denoiser, lambda a: grids.append(a.grid) if a.text is not None else None):
        denoiser(state.x, state.level, state.cond)
    grid = min(set(grids), key=lambda g: abs(math.log(g[0] / 2)))  # latents of side 8: a quarter is 2
    shares, _ = reader(state.x, state)
    torch.testing.assert_close(shares.double(), dense_shares(denoiser, state, state.x, grid), atol=1e-5, rtol=1e-4)


def test_gradient_is_that_of_the_loss():
    """Against differences of the dense loss along random directions, for each sample on its own."""
    denoiser = denoiser_of("stable_diffusion")
    denoiser.network.double()
    state = state_of(denoiser)
    x = state.x.double()
    reader = AttentionReader(denoiser, state.cond, WORDS, grid=8)
    _, gradient = reader(x, state)
    for seed in range(3):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        losses = [(1 - dense_shares(denoiser, state, x + h * direction, (8, 8))).amax(1) for h in (1e-4, -1e-4)]
        slope = (gradient * direction).flatten(1).sum(1)
        torch.testing.assert_close((losses[0] - losses[1]) / 2e-4, slope, rtol=1e-4, atol=1e-9)


# Displacements


def test_displacement_is_the_papers():
    """x - scale sqrt(1 - t/2) grad, in the variance-preserving variable: Euler's is the same, n times as large."""
    denoiser = denoiser_of("stable_diffusion")
    moved = {}
    config = {**tiny.SCHEDULE, "timestep_spacing": "leading", "steps_offset": 1}
    for scheduler in (DDIMScheduler(**config), EulerDiscreteScheduler(**config)):
        denoiser.pipe.scheduler = scheduler
        state = state_of(denoiser, scheduler, index=3)
        n = state.level.norm
        x, state.x = state.x, state.x * n
        guidance = AttendAndExcite(WORDS, 7.0, targets=())
        moved[type(scheduler).__name__] = guidance.before(state) / n
        if n == pytest.approx(1):
            _, gradient = AttentionReader(denoiser, state.cond, WORDS)(x, state)
            expected = x - 7.0 * math.sqrt(1 - (3 / 9) / 2) * gradient
            torch.testing.assert_close(moved[type(scheduler).__name__], expected)
            assert not torch.equal(expected, x)
    first, second = moved.values()
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_neglected_word_gets_more(family):
    denoiser = denoiser_of(family)
    state = state_of(denoiser)
    reader = AttentionReader(denoiser, state.cond, WORDS)
    before, gradient = reader(state.x, state)
    step = 0.01 / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    after, _ = reader(state.x - step * gradient, state)
    assert (after.amin(1) > before.amin(1)).all()


def test_samples_do_not_mix():
    denoiser = denoiser_of("stable_diffusion")
    both = state_of(denoiser)
    alone = state_of(denoiser, batch=1)
    guidance = AttendAndExcite(WORDS, 20.0)
    torch.testing.assert_close(guidance.before(both)[:1], guidance.before(alone), atol=1e-5, rtol=1e-4)


def test_each_prompt_may_have_words_of_its_own():
    denoiser = denoiser_of("stable_diffusion")
    state = state_of(denoiser)
    own = {PROMPTS[0]: ["red", "paper"], PROMPTS[1]: ["cat"]}
    shares, gradient = AttentionReader(denoiser, state.cond, own.__getitem__)(state.x, state)
    assert shares[1, 1] == 1.0  # there is no second word
    for i, words in enumerate(own.values()):
        one = AttentionReader(denoiser, state.cond[i], words)(state.x[i : i + 1], state)
        torch.testing.assert_close((shares[i : i + 1, : len(words)], gradient[i : i + 1]), one, atol=1e-6, rtol=1e-4)


def evaluations(denoiser):
    calls = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_refinement_stops_at_its_target_or_after_so_many():
    denoiser = denoiser_of("stable_diffusion")
    calls = evaluations(denoiser)
    guidance = AttendAndExcite(WORDS, 1e-3, targets=[(0.0, 0.999)], refinements=4)
    guidance.before(state_of(denoiser))
    assert len(calls) == 1 + 4
    easy = AttendAndExcite(WORDS, 1e-3, targets=[(0.0, 0.001)])
    easy.before(state_of(denoiser))
    assert len(calls) == 1 + 4 + 1
    later = AttendAndExcite(WORDS, 1e-3, targets=[(0.35, 0.999)], refinements=4)
    counts = []
    for index in range(6):
        calls.clear()
        later.before(state_of(denoiser, DDIMScheduler(**tiny.SCHEDULE), index=index))
        counts.append(len(calls))
    assert counts == [1, 1, 1, 1, 5, 0]  # at the first evaluation with a progress of at least 0.35; none after a half


def test_only_samples_that_fall_short_are_refined():
    denoiser = denoiser_of("stable_diffusion")
    state = state_of(denoiser)
    shares, _ = AttentionReader(denoiser, state.cond, WORDS)(state.x, state)
    low, high = shares.amin(1).sort().values.tolist()
    guidance = AttendAndExcite(WORDS, 1e-3, targets=[(0.0, (low + high) / 2)], refinements=3)
    plain = AttendAndExcite(WORDS, 1e-3, targets=())
    distance = (guidance.before(state) - state.x).flatten(1).norm(dim=1) / (plain.before(state) - state.x).flatten(1).norm(dim=1)
    rich = int(shares.amin(1).argmax())
    assert distance[rich] == pytest.approx(1.0, abs=1e-3)
    assert distance[1 - rich] > 2


# In a run


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_on_every_family_and_leaves_nothing_behind(family):
    pipe = GuidedPipeline.from_pipe(tiny.pipeline(family))
    arguments = {"seeds": [0, 1], "num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
    plain = pipe(PROMPTS, **arguments).images
    kind = type(pipe.denoiser)
    guided = pipe(PROMPTS, guidance=AttendAndExcite(WORDS, 50.0), **arguments)
    assert not torch.equal(plain, guided.images)
    assert set(guided.energy) == {"attend"}
    assert type(pipe.denoiser) is kind
    assert not any(module._forward_hooks for module in pipe.denoiser.network.modules())
    assert torch.equal(plain, pipe(PROMPTS, **arguments).images)


def test_scale_0_is_bit_identical_and_costs_nothing():
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    calls = evaluations(pipe.denoiser)
    arguments = {"seeds": [0], "num_inference_steps": 3, "output_type": "latent"}
    plain = pipe(PROMPTS[0], **arguments).images
    count = len(calls)
    for guidance in (AttendAndExcite(WORDS, 0.0), 0.0 * AttendAndExcite(WORDS)):
        assert torch.equal(plain, pipe(PROMPTS[0], guidance=guidance, **arguments).images)
    assert len(calls) == 3 * count


def test_only_the_first_stage_of_a_step_is_displaced():
    denoiser = denoiser_of("stable_diffusion")
    scheduler = HeunDiscreteScheduler(**tiny.SCHEDULE)
    active = [AttendAndExcite(WORDS, until=1.0).active(state_of(denoiser, scheduler, index=i, steps=3)) for i in range(5)]
    assert active == [True, False, True, False, True]


def test_checkpointed_networks_give_the_same_gradient():
    pipe = tiny.pipeline("stable_diffusion")
    denoiser = Denoiser.of(pipe)
    state = state_of(denoiser)
    reader = AttentionReader(denoiser, state.cond, WORDS)
    plain = reader(state.x, state)
    pipe.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(reader(state.x, state), plain)


def test_by_name():
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    guidance = registry.parse("attend:words=red+Seven,scale=5,grid=8,until=0.3", pipe)
    assert (guidance.words, guidance.scale, guidance.grid, guidance.until) == (["red", "Seven"], 5.0, 8, 0.3)
    with pytest.raises(ValueError, match="needs words="):
        registry.parse("attend")


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": []}, "words of the prompt"),
        ({"words": ["a", 3]}, "words of the prompt"),
        ({"words": ""}, "words of the prompt"),
        ({"words": "a", "scale": float("nan")}, "scale=nan"),
        ({"words": "a", "scale": -1.0}, "scale=-1"),
        ({"words": "a", "grid": 0}, "grid=0"),
        ({"words": "a", "until": 1.5}, "until=1.5"),
        ({"words": "a", "targets": [(0.5, 1.0)]}, "targets="),
        ({"words": "a", "refinements": -1}, "refinements=-1"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttendAndExcite(**arguments)


def test_what_it_does_not_fit():
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    run = {"num_inference_steps": 2, "output_type": "latent", "seeds": [0]}
    with pytest.raises(ValueError, match="Unknown word of the prompt 'a red seven on paper' 'cat'"):
        pipe(PROMPTS[0], guidance=AttendAndExcite(["cat"]), **run)
    with pytest.raises(ValueError, match=r"no grid of side 5\. It has 8, 4"):
        pipe(PROMPTS[0], guidance=AttendAndExcite(WORDS, grid=5), **run)
    with pytest.raises(ValueError, match="made from embeddings"):
        pipe(prompt_embeds=torch.randn(1, 8, 8), guidance=AttendAndExcite(WORDS), guidance_scale=1.0, **run)
    with pytest.raises(ValueError, match="beyond the 8 tokens"):
        pipe("zebra zebra red", guidance=AttendAndExcite(["red"]), **run)
    with pytest.raises(ValueError, match="not DiT"):
        GuidedPipeline.from_pipe(tiny.pipeline("dit"))(class_labels=[1], guidance=AttendAndExcite(WORDS), **run)
    host = tiny.pipeline("stable_diffusion")
    with attach(host, AttendAndExcite(WORDS)), pytest.raises(ValueError, match="Use it with GuidedPipeline"):
        host(PROMPTS[0], num_inference_steps=2, output_type="latent")
    assert watching_module._observing.get() is False
