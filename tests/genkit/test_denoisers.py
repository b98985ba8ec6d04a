"""Every adapter against the stock pipeline of its family, on real diffusers classes at tiny random configurations."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genkit import pipelines
from genkit.denoisers import Cond, Denoiser, find, register, registry
from genkit.denoisers.dit import use_original_time_embedding
from genkit.denoisers.flux import pack, unpack
from genkit.denoisers.stable_diffusion import StableDiffusionDenoiser
from genkit.levels import Level, levels_of
from genkit.sampling import sample
from tests import tiny

TEXT = ["stable_diffusion", "sdxl", "sd3", "flux", "pixart_alpha", "pixart_sigma", "sana"]
LABELLED = ["dit"]
GUIDED = TEXT + LABELLED  # families with a null condition
FAMILIES = ["ddpm", "ddim", *GUIDED]
PROMPTS = ["a red cat", "blue seven on paper"]
OTHER_SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]
STEPS = 4
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make(family: str, **config: Any) -> Denoiser:
    options = {"original_time_embedding": False} if family == "dit" else {}
    return Denoiser.of(tiny.pipeline(family, **config), **options)


def condition(denoiser: Denoiser, rows: slice = slice(None), **extra: Any) -> Cond | None:
    if denoiser.family == "UNet2D":
        return None
    if denoiser.family == "DiT":
        return denoiser.condition(labels=[3, 871][rows])
    return denoiser.condition(prompts=PROMPTS[rows], **extra)


def size_of(denoiser: Denoiser) -> tuple[int, int]:
    """Not square, so that height and width cannot be confused, or what the stock pipeline insists on."""
    if denoiser.family in ("UNet2D", "DiT"):
        return denoiser.latent_shape(None, None)[-2:]
    return (8, 16) if denoiser.family == "Sana" else (8, 12)


def latents(denoiser: Denoiser, count: int = 2, seed: int = 1) -> Tensor:
    shape = (count, denoiser._channels(), *size_of(denoiser))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def level_of(denoiser: Denoiser, index: int = 1) -> Level:
    scheduler = denoiser.pipe.scheduler
    denoiser.set_timesteps(scheduler, STEPS, size_of(denoiser))
    return levels_of(scheduler)[index]


def ours(denoiser: Denoiser, noise: Tensor, cond: Cond | None, guidance_scale: float = 1.0, **extra: Any) -> Tensor:
    scheduler = denoiser.pipe.scheduler
    denoiser.set_timesteps(scheduler, STEPS, noise.shape)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    with torch.no_grad():
        return sample(denoiser, scheduler, x, cond, guidance_scale=guidance_scale, **extra)


def images(denoiser: Denoiser, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = denoiser.decode(x)
    return (x / 2 + 0.5).clamp(0, 1)


# (a) The stock pipeline


def stock(denoiser: Denoiser, noise: Tensor, output_type: str, **extra: Any) -> Tensor:
    height, width = (side * denoiser.factor for side in noise.shape[-2:])
    if denoiser.family in ("PixArt", "Sana"):
        extra["use_resolution_binning"] = False
    arguments = {"num_inference_steps": STEPS, "height": height, "width": width, "output_type": output_type}
    return denoiser.pipe(PROMPTS, latents=noise.clone(), **arguments, **extra).images


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("family", [f for f in TEXT if f != "flux"])
def test_text_families_equal_the_stock_pipeline(family: str, scale: float) -> None:
    denoiser = make(family)
    noise = latents(denoiser)
    x = ours(denoiser, noise, condition(denoiser), scale)
    torch.testing.assert_close(x, stock(denoiser, noise, "latent", guidance_scale=scale), **CLOSE)
    expected = stock(denoiser, noise, "pt", guidance_scale=scale)
    torch.testing.assert_close(images(denoiser, x), expected, **CLOSE)
    assert expected.std() > 0.01  # not a comparison of two constant pictures


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("family", TEXT)
def test_negative_prompts_equal_the_stock_pipeline(family: str, scale: float) -> None:
    denoiser = make(family)
    noise = latents(denoiser)
    x = ours(denoiser, noise, condition(denoiser, negative_prompts="bad paper"), scale)
    if family == "flux":
        extra = {"true_cfg_scale": scale, "guidance_scale": 3.5, "negative_prompt": ["bad paper"] * 2}
        expected = unpack(stock_flux(denoiser, noise, "latent", **extra), noise.shape[-2] // 2)
    elif family.startswith("pixart") or family == "sana":
        expected = stock(denoiser, noise, "latent", guidance_scale=scale, negative_prompt="bad paper")
    else:
        expected = stock(denoiser, noise, "latent", guidance_scale=scale, negative_prompt=["bad paper"] * 2)
    torch.testing.assert_close(x, expected, **CLOSE)


def stock_flux(denoiser: Denoiser, noise: Tensor, output_type: str, **extra: Any) -> Tensor:
    height, width = (side * denoiser.factor for side in noise.shape[-2:])
    arguments = {"num_inference_steps": STEPS, "height": height, "width": width, "output_type": output_type}
    return denoiser.pipe(PROMPTS, latents=pack(noise), **arguments, **extra).images


@pytest.mark.parametrize("distilled", [True, False])
def test_flux_equals_the_stock_pipeline(distilled: bool) -> None:
    denoiser = make("flux", guidance_embeds=distilled)
    noise = latents(denoiser)
    cond = condition(denoiser, **({"distilled_guidance": 5.0} if distilled else {}))
    x = ours(denoiser, noise, cond)
    expected = stock_flux(denoiser, noise, "latent", guidance_scale=5.0)
    torch.testing.assert_close(x, unpack(expected, noise.shape[-2] // 2), **CLOSE)
    torch.testing.assert_close(images(denoiser, x), stock_flux(denoiser, noise, "pt", guidance_scale=5.0), **CLOSE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", OTHER_SCHEDULERS)
def test_stable_diffusion_equals_the_stock_pipeline_under_other_schedulers(name: str, prediction_type: str) -> None:
    denoiser = make("stable_diffusion")
    denoiser.pipe.scheduler = getattr(diffusers, name)(**tiny.SCHEDULE, prediction_type=prediction_type)
    denoiser = Denoiser.of(denoiser.pipe)
    noise = latents(denoiser)
    x = ours(denoiser, noise, condition(denoiser), 3.0, generator=torch.Generator().manual_seed(5))
    expected = stock(denoiser, noise, "latent", guidance_scale=3.0, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(x, expected, **CLOSE)


def test_the_image_to_image_pipeline_has_the_same_denoiser() -> None:
    denoiser = make("stable_diffusion")
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**denoiser.pipe.components, requires_safety_checker=False)
    noise, level = latents(denoiser), level_of(denoiser)
    with torch.no_grad():
        raws = [d(noise, level, condition(d), guidance_scale=3.0).raw for d in (denoiser, Denoiser.of(pipe))]
    torch.testing.assert_close(*raws)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_equals_the_stock_pipeline(scale: float) -> None:
    denoiser = make("dit")
    noise = randn_tensor((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    x = ours(denoiser, noise, denoiser.condition(labels=["tench", 871]), scale)
    arguments = {"generator": torch.Generator().manual_seed(3), "num_inference_steps": STEPS, "output_type": "pt"}
    expected = denoiser.pipe([0, 871], guidance_scale=scale, **arguments).images
    torch.testing.assert_close(images(denoiser, x), expected, **CLOSE)


@pytest.mark.parametrize("family", ["ddpm", "ddim"])
def test_pixel_unets_equal_the_stock_pipeline(family: str) -> None:
    denoiser = make(family)
    generator = torch.Generator().manual_seed(3)
    noise = randn_tensor((2, 3, 8, 8), generator=generator)
    x = ours(denoiser, noise, denoiser.condition(), generator=generator)
    arguments = {"generator": torch.Generator().manual_seed(3), "num_inference_steps": STEPS, "output_type": "pt"}
    torch.testing.assert_close(images(denoiser, x), denoiser.pipe(batch_size=2, **arguments).images, **CLOSE)


def test_sdxl_micro_conditioning_equals_the_stock_pipeline() -> None:
    denoiser = make("sdxl")
    noise = latents(denoiser)
    sizes = {"original_size": (40, 30), "crops_coords_top_left": (4, 2), "target_size": (20, 10)}
    x = ours(denoiser, noise, condition(denoiser, **sizes), 3.0)
    torch.testing.assert_close(x, stock(denoiser, noise, "latent", guidance_scale=3.0, **sizes), **CLOSE)
    own = condition(denoiser, crops_coords_top_left=(4, 2)).tensors["time_ids"]
    assert own.tolist() == [[16, 16, 4, 2, 16, 16]] * 2


@pytest.mark.parametrize("solver", ["euler", "dpm"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_dynamic_shifting_equals_the_stock_pipeline(family: str, solver: str) -> None:
    denoiser = make(family)
    if solver == "euler":
        denoiser.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.3)
    else:
        dpm = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
        denoiser.pipe.scheduler = diffusers.DPMSolverMultistepScheduler(**dpm, time_shift_type="exponential")
    noise = latents(denoiser)
    x = ours(denoiser, noise, condition(denoiser, negative_prompts="bad"), 3.0)
    ours_timesteps = denoiser.pipe.scheduler.timesteps.clone()
    if family == "flux":
        extra = {"true_cfg_scale": 3.0, "negative_prompt": ["bad"] * 2}
        expected = unpack(stock_flux(denoiser, noise, "latent", **extra), noise.shape[-2] // 2)
    else:
        expected = stock(denoiser, noise, "latent", guidance_scale=3.0, negative_prompt=["bad"] * 2)
    torch.testing.assert_close(ours_timesteps, denoiser.pipe.scheduler.timesteps, rtol=0, atol=0)
    torch.testing.assert_close(x, expected, **CLOSE)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_clip_skip_equals_the_stock_pipeline(family: str) -> None:
    denoiser = make(family)
    noise = latents(denoiser)
    # One layer less is another picture, so the option arrives.
    plain, skipped = condition(denoiser), condition(denoiser, clip_skip=1)
    assert not torch.allclose(plain.tensors["prompt_embeds"], skipped.tensors["prompt_embeds"])
    x = ours(denoiser, noise, skipped, 3.0)
    torch.testing.assert_close(x, stock(denoiser, noise, "latent", guidance_scale=3.0, clip_skip=1), **CLOSE)


def test_sana_without_its_instruction_equals_the_stock_pipeline() -> None:
    denoiser = make("sana")
    noise = latents(denoiser)
    x = ours(denoiser, noise, condition(denoiser, complex_human_instruction=[]), 3.0)
    expected = stock(denoiser, noise, "latent", guidance_scale=3.0, complex_human_instruction=[])
    torch.testing.assert_close(x, expected, **CLOSE)


# (b), (c) Batches


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_samples(family: str) -> None:
    denoiser = make(family)
    noise, level = latents(denoiser), level_of(denoiser)
    scale = 3.0 if family in GUIDED else 1.0
    with torch.no_grad():
        both = denoiser(noise, level, condition(denoiser), guidance_scale=scale).raw
        single = [
            denoiser(noise[i : i + 1], level, condition(denoiser, slice(i, i + 1)), guidance_scale=scale).raw for i in range(2)
        ]
    torch.testing.assert_close(both, torch.cat(single), **CLOSE)


@pytest.mark.parametrize("family", GUIDED)
def test_guidance_in_one_batch_equals_two_calls(family: str) -> None:
    denoiser = make(family)
    noise, level, cond = latents(denoiser), level_of(denoiser), condition(denoiser)
    with torch.no_grad(), mock.patch.object(denoiser, "_forward", wraps=denoiser._forward) as forward:
        one, null = denoiser(noise, level, cond), denoiser(noise, level, cond, guidance_scale=0.0)
        guided = denoiser(noise, level, cond, guidance_scale=3.0)
    assert [len(call.args[0]) for call in forward.call_args_list] == [2, 2, 4]
    torch.testing.assert_close(guided.raw, null.raw + 3 * (one.raw - null.raw), **CLOSE)
    assert not torch.allclose(one.raw, null.raw)  # the condition matters
    if guided.variance is not None:
        torch.testing.assert_close(guided.variance, one.variance, **CLOSE)


@pytest.mark.parametrize("family", GUIDED)
def test_a_level_for_each_sample(family: str) -> None:
    denoiser = make(family)
    noise, cond = latents(denoiser), condition(denoiser)
    first, second = level_of(denoiser, 1), level_of(denoiser, 2)
    values = {n: torch.tensor([getattr(first, n), getattr(second, n)], dtype=torch.float64) for n in ("alpha", "sigma", "t")}
    with torch.no_grad():
        mixed = denoiser(noise, Level(**values), cond, guidance_scale=3.0)
        apart = [denoiser(noise[i : i + 1], level, cond[i], guidance_scale=3.0) for i, level in enumerate((first, second))]
    torch.testing.assert_close(mixed.x0, torch.cat([p.x0 for p in apart]), **CLOSE)


# (d) Conditioning


def test_conditions_are_indexed_repeated_and_moved() -> None:
    cond = Cond({"a": torch.arange(6).view(3, 2)}, {"a": torch.zeros(3, 2)})
    assert len(cond) == 3
    assert cond[1].tensors["a"].tolist() == [[2, 3]]
    assert cond[1:].tensors["a"].tolist() == [[2, 3], [4, 5]]
    assert cond[[2, 0]].tensors["a"].tolist() == [[4, 5], [0, 1]]
    assert cond[torch.tensor([True, False, False])].tensors["a"].tolist() == [[0, 1]]
    assert cond.repeat(2).tensors["a"][:, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert len(cond.repeat(2).null_tensors["a"]) == 6
    assert cond.null().tensors is cond.null_tensors
    assert cond.to("meta").tensors["a"].device.type == "meta"
    assert len(Cond({})) == 0


def test_conditions_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="'a': 1, 'b': 2"):
        Cond({"a": torch.zeros(1), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        Cond({"a": torch.zeros(1, 2)}, {"a": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="no null condition"):
        Cond({"a": torch.zeros(1)}).null()


@pytest.mark.parametrize("family", TEXT)
def test_a_distinct_prompt_is_encoded_once(family: str) -> None:
    denoiser = make(family)
    encode = denoiser.pipe.encode_prompt
    with mock.patch.object(denoiser.pipe, "encode_prompt", wraps=encode) as spy:
        first = denoiser.condition(prompts=["a cat", "red paper", "a cat"])
        count = spy.call_count
        again = denoiser.condition(prompts="red paper")
        assert spy.call_count == count
        assert sum(len(call.args[0]) for call in spy.call_args_list) <= 3  # two prompts and the empty one
        denoiser.forget()
        denoiser.condition(prompts="red paper")
        assert spy.call_count > count
    for name in denoiser.inputs:
        assert torch.equal(first.tensors[name][0], first.tensors[name][2])
        assert torch.equal(first.tensors[name][1:2], again.tensors[name])
    assert not any(v.requires_grad for v in first.tensors.values())


@pytest.mark.parametrize("family", TEXT)
def test_given_embeddings_equal_prompts_and_carry_gradients(family: str) -> None:
    denoiser = make(family)
    noise, level, cond = latents(denoiser), level_of(denoiser), condition(denoiser, negative_prompts=["bad", "a"])
    given = {name: cond.tensors[name].clone() for name in denoiser.inputs}
    given["prompt_embeds"].requires_grad_(True)
    nulls = {f"negative_{name}": cond.null_tensors[name] for name in denoiser.inputs}
    prediction = denoiser(noise, level, denoiser.condition(**given, **nulls), guidance_scale=3.0)
    torch.testing.assert_close(prediction.raw, denoiser(noise, level, cond, guidance_scale=3.0).raw, **CLOSE)
    (gradient,) = torch.autograd.grad(prediction.x0.square().sum(), given["prompt_embeds"])
    assert gradient.abs().sum() > 0


def test_embeddings_without_text_encoders_have_no_null_condition() -> None:
    denoiser = make("stable_diffusion")
    embeds = condition(denoiser).tensors["prompt_embeds"]
    denoiser.forget()
    denoiser.pipe.text_encoder = None
    assert denoiser.condition(prompt_embeds=embeds).null_tensors is None


def test_class_conditional_unets() -> None:
    denoiser = make("ddpm", num_class_embeds=5)
    noise, level = latents(denoiser), level_of(denoiser)
    cond = denoiser.condition(labels=torch.tensor([1, 4]))
    assert cond.tensors["class_labels"].tolist() == [1, 4]
    with pytest.raises(ValueError, match="no null condition"):
        denoiser(noise, level, cond, guidance_scale=2.0)
    cond = denoiser.condition(labels=[1, 4], null_label=0)
    with torch.no_grad():
        guided = denoiser(noise, level, cond, guidance_scale=2.0)
        zero = denoiser(noise, level, denoiser.condition(labels=[0, 0]))
        one = denoiser(noise, level, cond)
    torch.testing.assert_close(guided.raw, 2 * one.raw - zero.raw, **CLOSE)
    with pytest.raises(ValueError, match="labels from 0 to 4"):
        denoiser.condition()


# (e) Errors


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either prompts or prompt_embeds"),
        ({"prompts": []}, r"prompts=\[\] is not a string"),
        ({"prompts": ["a", 3]}, r"prompts=\['a', 3\]"),
        ({"prompts": "a", "prompt_embeds": torch.zeros(1, 8, 8)}, "either prompts or prompt_embeds"),
        ({"prompts": ["a", "a"], "negative_prompts": ["a"] * 3}, "3 negative_prompts for 2 prompts"),
        ({"prompts": "a", "negative_prompts": "a", "negative_prompt_embeds": torch.zeros(1, 8, 8)}, "Give one of them"),
        ({"prompts": "a", "labels": [1]}, "takes no labels. It takes prompts, negative_prompts, prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 9, 8)}, r"\(1, 9, 8\).*\(1, 8, 8\)"),
    ],
)
def test_prompts_that_make_no_sense(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("stable_diffusion").condition(**inputs)


def test_embeddings_come_together() -> None:
    with pytest.raises(ValueError, match="prompt_embeds came without pooled_prompt_embeds"):
        make("sdxl").condition(prompt_embeds=torch.zeros(1, 8, 16))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels from 0 to 999"),
        ([], "labels is empty"),
        ([1000], "Label 1000 is out of range. Give a number from 0 to 999"),
        (-1, "Label -1 is out of range"),
        ("tenche", "no label 'tenche'. Known names are in pipe.labels"),
    ],
)
def test_labels_that_make_no_sense(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("dit").condition(labels=labels)


def test_inputs_of_another_family() -> None:
    with pytest.raises(ValueError, match=r"DiT takes no prompts. It takes labels"):
        make("dit").condition(labels=[1], prompts=["a"])
    with pytest.raises(ValueError, match=r"UNet2D takes no labels. It takes nothing"):
        make("ddpm").condition(labels=[1])
    with pytest.raises(ValueError, match=r"distilled_guidance=2.0, but this network has none"):
        make("flux", guidance_embeds=False).condition(prompts="a", distilled_guidance=2.0)


def test_calls_that_make_no_sense() -> None:
    denoiser = make("stable_diffusion")
    noise, level = latents(denoiser), level_of(denoiser)
    with pytest.raises(ValueError, match="needs a condition with prompt_embeds"):
        denoiser(noise, level)
    with pytest.raises(ValueError, match="for 1 samples, but x has 2"):
        denoiser(noise, level, condition(denoiser)[0])


@pytest.mark.parametrize(
    ("family", "shape", "multiple"),
    [
        ("ddpm", (3, 8, 8), 2),
        ("dit", (4, 8, 8), 4),
        ("stable_diffusion", (4, 8, 8), 2),
        ("sdxl", (4, 8, 8), 2),
        ("sd3", (16, 8, 8), 4),
        ("flux", (16, 128, 128), 4),
        ("pixart_sigma", (4, 8, 8), 4),
        ("sana", (4, 8, 8), 4),
    ],
)
def test_sizes(family: str, shape: tuple[int, ...], multiple: int) -> None:
    denoiser = make(family)
    assert denoiser.latent_shape(None, None) == shape
    assert denoiser.latent_shape(3 * multiple, None)[1:] == (3 * multiple // denoiser.factor, shape[2])
    wrong = 3 * multiple + 1
    with pytest.raises(ValueError, match=f"height={wrong} does not fit the model. Use a positive multiple of {multiple}"):
        denoiser.latent_shape(wrong, None)
    with pytest.raises(ValueError, match="width=0"):
        denoiser.latent_shape(None, 0)


def test_a_network_without_a_size() -> None:
    denoiser = make("ddpm", sample_size=None)
    assert denoiser.latent_shape(4, 6) == (3, 4, 6)
    with pytest.raises(ValueError, match="Give width, a multiple of 2"):
        denoiser.latent_shape(4, None)


def test_custom_schedules() -> None:
    denoiser = make("stable_diffusion")
    scheduler = diffusers.EulerDiscreteScheduler(**tiny.SCHEDULE)
    denoiser.set_timesteps(scheduler, 30, (4, 8, 8), timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == [900, 500, 100]
    denoiser.set_timesteps(scheduler, 30, (4, 8, 8), sigmas=[9.0, 3.0, 1.0, 0.0])
    assert scheduler.sigmas.tolist() == [9, 3, 1, 0]
    with pytest.raises(ValueError, match="Give one of them"):
        denoiser.set_timesteps(scheduler, 30, (4, 8, 8), timesteps=[1], sigmas=[1.0])
    with pytest.raises(ValueError, match="DDIMScheduler takes no custom sigmas"):
        denoiser.set_timesteps(diffusers.DDIMScheduler(), 30, (4, 8, 8), sigmas=[1.0])
    flux, flow = make("flux"), diffusers.FlowMatchHeunDiscreteScheduler()  # takes neither sigmas nor mu
    flux.set_timesteps(flow, 3, (16, 8, 8))
    assert len(flow.timesteps) == 5


# (f), (g) Precision and gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_network_predicts_in_float32(family: str) -> None:
    denoiser = make(family)
    noise, level, scale = latents(denoiser), level_of(denoiser), 3.0 if family in GUIDED else 1.0
    with torch.no_grad():
        exact = denoiser(noise, level, condition(denoiser), guidance_scale=1.0)
        denoiser.network.to(torch.bfloat16)  # and the text encoders stay in float32
        prediction = denoiser(noise, level, condition(denoiser), guidance_scale=scale)
        assert prediction.raw.dtype == prediction.x0.dtype == torch.float32
        rough = denoiser(noise, level, condition(denoiser), guidance_scale=1.0)
    assert (rough.raw - exact.raw).norm() < 0.1 * exact.raw.norm()
    assert denoiser(noise.double(), level, condition(denoiser)).raw.dtype == torch.float64


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_from_the_prediction_to_the_sample(family: str) -> None:
    denoiser = make(family)
    noise, level = latents(denoiser).requires_grad_(True), level_of(denoiser)
    scale = 3.0 if family in GUIDED else 1.0
    prediction = denoiser(noise, level, condition(denoiser), guidance_scale=scale)
    (direct,) = torch.autograd.grad(prediction.raw.square().sum(), noise, retain_graph=True)
    (gradient,) = torch.autograd.grad(prediction.x0[0].square().sum(), noise)
    assert direct.abs().sum() > 0  # through the network
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0  # samples do not mix


# DiT's timestep embedding


def test_the_original_time_embedding_of_dit() -> None:
    pipe = tiny.pipeline("dit")
    Denoiser.of(pipe)  # by default the original
    t = torch.tensor([50.0, 250.0, 998.0], dtype=torch.float64)
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = t[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    for block in pipe.transformer.transformer_blocks:
        torch.testing.assert_close(block.norm1.emb.time_proj(t), expected, rtol=0, atol=1e-4)
    use_original_time_embedding(pipe.transformer, False)
    embedding = pipe.transformer.transformer_blocks[0].norm1.emb.time_proj
    stock_angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 127)
    stock_embedding = torch.cat([stock_angles.cos(), stock_angles.sin()], dim=1).float()
    torch.testing.assert_close(embedding(t), stock_embedding, rtol=0, atol=1e-4)
    gap = (stock_embedding - expected).norm(dim=1) / expected.norm(dim=1)
    assert [round(g, 2) for g in gap.tolist()] == [0.06, 0.32, 1.01]  # specs/discriminative.md, 1e.8


def test_the_original_time_embedding_changes_the_prediction() -> None:
    pipe = tiny.pipeline("dit")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    raws = []
    for original in (False, True):
        denoiser = Denoiser.of(pipe, original_time_embedding=original)
        with torch.no_grad():
            raws.append(denoiser(noise, level_of(denoiser), condition(denoiser)).raw)
    assert not torch.allclose(*raws)


# Finding an adapter


@pytest.mark.parametrize("name", registry._BUILT_IN)
def test_the_table_of_families_agrees_with_the_adapters(name: str) -> None:
    host = getattr(diffusers if hasattr(diffusers, name) else pipelines, name)
    adapter = find(object.__new__(host))
    assert name in adapter.classes
    assert adapter.__name__ == registry._BUILT_IN[name][1]


def test_subclasses_and_registered_classes_are_found() -> None:
    class Mine(diffusers.StableDiffusionPipeline):
        pass

    pipe = object.__new__(Mine)
    assert find(pipe) is StableDiffusionDenoiser

    class MyDenoiser(StableDiffusionDenoiser):
        classes = ("Mine",)

    with mock.patch.dict(registry._registered, clear=True):
        assert register(MyDenoiser) is MyDenoiser
        assert find(pipe) is MyDenoiser
        assert find(object.__new__(diffusers.StableDiffusionPipeline)) is StableDiffusionDenoiser


def test_a_class_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match=r"object is not supported. Supported: DDIMPipeline.*genkit/denoisers/base.py"):
        Denoiser.of(object())


def test_the_package_imports_neither_torch_nor_diffusers() -> None:
    code = "import sys, genkit.denoisers as d; d.find, d.__all__; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
