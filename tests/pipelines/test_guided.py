"""Contract of GuidedPipeline on every family, at tiny random configurations of the real diffusers classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.guidance import EnergyGuidance, Guidance
from genkit.pipelines import GuidedPipeline
from tests import tiny


def inputs(family: str, count: int = 2) -> dict:
    if family in ("ddpm", "ddim"):
        return {"seeds": list(range(count))}
    if family == "dit":
        return {"class_labels": [i % 2 for i in range(count)], "seeds": list(range(count))}
    # Flux has no size of its own (its pipeline assumes 1024 x 1024 pixels), and PixArt-alpha's size is what makes it that network.
    size = {"height": 16, "width": 16} if family in ("flux", "pixart_alpha") else {}
    return {"prompt": ["a red seven", "a blue cat", "a three"][:count], "seeds": list(range(count))} | size


@pytest.fixture(params=list(tiny.FAMILIES), scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return GuidedPipeline.from_pipe(tiny.pipeline(family))


def run(pipe, family, **arguments):
    return pipe(**{"num_inference_steps": 3, "output_type": "pt", **inputs(family), **arguments}).images


def darker(scale=1.0, **options):
    return EnergyGuidance(lambda x: -x.flatten(1).mean(1), scale, **options)


def test_outputs_agree(pipe, family):
    pt = run(pipe, family)
    assert pt.ndim == 4
    assert pt.shape[:2] == (2, 3)
    assert torch.isfinite(pt).all()
    array = run(pipe, family, output_type="np")
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pil = run(pipe, family, output_type="pil")
    assert isinstance(pil[0], Image.Image)
    np.testing.assert_allclose(np.asarray(pil[1]) / 255, array[1], atol=0.51 / 255)
    latents = run(pipe, family, output_type="latent")
    arguments = inputs(family)
    assert latents.shape == (2, *pipe.denoiser.latent_shape(arguments.get("height"), arguments.get("width")))
    first, *_ = pipe(**inputs(family), num_inference_steps=3, output_type="pt", return_dict=False)
    assert torch.equal(first, pt)


def test_a_seed_gives_the_same_image_alone_and_in_a_batch(pipe, family):
    together = run(pipe, family)
    alone = run(pipe, family, **{key: value[1:] for key, value in inputs(family).items() if isinstance(value, list)})
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_weight_zero_is_bit_identical_and_costs_nothing(pipe, family):
    calls = []

    def counting(images):
        calls.append(1)
        return images.flatten(1).mean(1)

    handle = pipe.denoiser.network.register_forward_hook(lambda *_: calls.append("network"))
    plain = run(pipe, family)
    evaluations = len(calls)
    calls.clear()
    for zero in (EnergyGuidance(counting, 0.0), 0.0 * EnergyGuidance(counting), EnergyGuidance(counting).scheduled(lambda _: 0.0)):
        assert torch.equal(run(pipe, family, guidance=zero), plain)
        assert calls == ["network"] * evaluations
        calls.clear()
    handle.remove()


def test_guidance_steers(pipe, family):
    """A step along the gradient of the decoded prediction lowers its brightness, whatever the (random) network says."""
    brightness = {}

    def record(owner, step, timestep, tensors):
        if step == 1:  # the middle of the run: neither pure noise nor clean
            brightness[guidance] = pipe.denoiser.decode(tensors["x0"]).double().mean((1, 2, 3))

    steer = darker(1.0).between(0.3, 0.7)
    for guidance in (None, steer):
        run(pipe, family, guidance=guidance, callback_on_step_end=record, callback_on_step_end_tensor_inputs=["x0"])
    assert (brightness[steer] < brightness[None]).all()


def test_gradients_through_the_denoiser(pipe, family):
    plain, guided = run(pipe, family), run(pipe, family, guidance=darker(5.0, route="through_denoiser"))
    assert torch.isfinite(guided).all()
    assert not torch.equal(plain, guided)


def test_callbacks(pipe, family):
    seen = []

    def callback(owner, step, timestep, tensors):
        assert owner is pipe
        seen.append((step, set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == len(owner.scheduler.timesteps) - 1 else None

    names = ["latents", "x0", "eps"]
    latents = run(pipe, family, output_type="latent", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    last = len(pipe.scheduler.timesteps) - 1  # PNDM evaluates once more than it steps
    assert seen == [(i, set(names)) for i in range(last + 1)]
    assert latents.abs().sum() == 0
    with pytest.raises(ValueError, match="sigma"):
        run(pipe, family, callback_on_step_end_tensor_inputs=["sigma"])


def test_interrupt(pipe, family):
    steps = []

    def callback(owner, step, timestep, tensors):
        steps.append(step)
        owner.interrupt()

    run(pipe, family, callback_on_step_end=callback)
    assert steps == [0]


def test_save_and_load(pipe, family, tmp_path):
    pipe.save_pretrained(tmp_path / family)
    again = GuidedPipeline.from_pretrained(tmp_path / family)
    again.set_progress_bar_config(disable=True)
    assert type(again.host) is type(pipe.host)
    torch.testing.assert_close(run(again, family), run(pipe, family))


def test_the_host_is_left_as_it_was(pipe, family):
    scheduler, training = pipe.scheduler, [m.training for m in pipe.denoiser.network.modules()]
    grads = [p.requires_grad for p in pipe.denoiser.network.parameters()]

    class Failing(Guidance):
        def shift(self, state, prediction):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(pipe, family, guidance=Failing())
    assert pipe.scheduler is scheduler
    assert [m.training for m in pipe.denoiser.network.modules()] == training
    assert [p.requires_grad for p in pipe.denoiser.network.parameters()] == grads


def test_two_guidances_do_not_depend_on_their_order(pipe, family):
    a, b = darker(20.0), EnergyGuidance(lambda x: x[:, 0].flatten(1).mean(1), 30.0)
    torch.testing.assert_close(run(pipe, family, guidance=a + b), run(pipe, family, guidance=b + a), rtol=1e-5, atol=1e-6)


def test_bfloat16(family):
    pipe = GuidedPipeline.from_pipe(tiny.pipeline(family).to(torch.bfloat16))
    images = run(pipe, family, guidance=darker(10.0))
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()


# One family is enough for what does not depend on it.


@pytest.fixture(scope="module")
def sd():
    return GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))


def test_generators_follow_diffusers(sd):
    def generators():
        return [torch.Generator().manual_seed(i) for i in range(2)]

    arguments = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    ours = sd(["a cat", "a cat"], generator=generators(), **arguments).images
    stock = sd.host(["a cat", "a cat"], generator=generators(), **arguments).images
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_random_seeds_are_reported_and_repeat(sd):
    out = sd("a cat", batch_size=2, num_inference_steps=2, output_type="pt")
    again = sd("a cat", seeds=out.seeds, num_inference_steps=2, output_type="pt")
    assert torch.equal(out.images, again.images)


def test_num_images_per_prompt(sd):
    out = sd(["a cat", "a red seven"], num_images_per_prompt=2, seeds=[1, 2, 1, 2], num_inference_steps=2, output_type="pt")
    assert len(out.images) == 4
    assert not torch.allclose(out.images[0], out.images[2], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a cat", "output_type": "jpeg"}, "jpeg"),
        ({"prompt": "a cat", "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"prompt": "a cat", "height": 13}, "height=13"),
        ({"prompt": ["a cat"] * 2, "seeds": [1, 2, 3]}, "2 prompts or labels"),
        ({"prompt": "a cat", "seeds": []}, "at least one seed"),
        ({"prompt": "a cat", "class_labels": 3}, "labels"),
        ({"prompt": "a cat", "latents": torch.zeros(2, 4, 8, 8), "seeds": [1]}, "disagree"),
        ({}, "prompt"),
    ],
)
def test_bad_inputs(sd, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd(**arguments)


def test_non_finite_values_stop_the_run_and_name_the_step(sd):
    class Explode(Guidance):
        name = "explode"

        def shift(self, state, prediction):
            return torch.full_like(prediction.raw, float("nan")) if state.level.index == 1 else None

    with pytest.raises(FloatingPointError, match=r"Evaluation 2 of 5 .*'explode'.*2 of 2 samples"):
        sd(["a cat"] * 2, seeds=[0, 1], guidance=Explode(), num_inference_steps=4)


def test_offload_is_refused_with_guidance():
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="offload"):
        pipe("a cat", guidance=darker())


def test_unsupported_pipeline():
    class Odd:
        pass

    with pytest.raises(ValueError, match=r"Odd is not supported. Supported: .*StableDiffusionPipeline"):
        GuidedPipeline.from_pipe(Odd())
