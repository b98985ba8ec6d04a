"""LatentCodec against the formulas of the pipelines, on real diffusers autoencoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genkit.latents import LatentCodec
from tests import tiny


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def vae(kind: str = "kl", **config: Any) -> Any:
    build = {"kl": tiny.autoencoder, "dc": tiny.deep_autoencoder, "tiny": tiny.tiny_autoencoder}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(**config).eval().requires_grad_(False)


@torch.no_grad()
def test_scale_and_shift() -> None:
    model = vae(channels=16, scaling_factor=1.5305, shift_factor=0.0609)
    codec = LatentCodec.from_vae(model)
    x = codec.encode(images())
    assert x.shape == (2, 16, 8, 8)
    torch.testing.assert_close(x, (model.encode(images()).latent_dist.mode() - 0.0609) * 1.5305)
    torch.testing.assert_close(codec.decode(x), model.decode(x / 1.5305 + 0.0609).sample)


@torch.no_grad()
def test_mean_and_standard_deviation() -> None:
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    model = vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    codec = LatentCodec.from_vae(model)
    m, s = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, std))
    x = codec.encode(images())
    torch.testing.assert_close(x, (model.encode(images()).latent_dist.mode() - m) * 0.5 / s)
    torch.testing.assert_close(codec.decode(x), model.decode(x * s / 0.5 + m).sample)  # as in the SDXL pipeline


@torch.no_grad()
def test_a_generator_samples_the_posterior() -> None:
    model = vae()
    codec = LatentCodec.from_vae(model)
    x = codec.encode(images(), torch.Generator().manual_seed(7))
    expected = model.encode(images()).latent_dist.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(x, expected * model.config.scaling_factor)
    assert not torch.allclose(x, codec.encode(images()))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "factor"), [("dc", 4), ("tiny", 2)])
def test_deterministic_autoencoders(kind: str, factor: int) -> None:
    model = vae(kind)
    codec = LatentCodec.from_vae(model)
    assert codec.factor == factor
    x = codec.encode(images(), torch.Generator().manual_seed(7))  # no posterior, nothing to sample
    z = model.encode(images(), return_dict=False)[0]
    assert x.shape == (2, 4, 16 // factor, 16 // factor)
    torch.testing.assert_close(x, z * model.config.scaling_factor)
    torch.testing.assert_close(codec.decode(x), model.decode(z).sample)


@pytest.mark.parametrize("kind", ["kl", "dc", "tiny"])
def test_gradients_flow_both_ways(kind: str) -> None:
    codec = LatentCodec.from_vae(vae(kind))
    pixels = images().requires_grad_(True)
    x = codec.encode(pixels)
    (gradient,) = torch.autograd.grad(codec.decode(x)[0].square().sum(), pixels)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


@torch.no_grad()
def test_the_callers_precision_comes_back() -> None:
    exact, rough = LatentCodec.from_vae(vae(force_upcast=False)), LatentCodec.from_vae(vae(force_upcast=False).to(torch.bfloat16))
    x = rough.encode(images())
    assert x.dtype == rough.decode(x).dtype == torch.float32
    torch.testing.assert_close(x, exact.encode(images()), rtol=0.1, atol=0.05)


@torch.no_grad()
def test_a_half_precision_vae_that_overflows_decodes_in_float32() -> None:
    model = vae(force_upcast=True)
    x = LatentCodec.from_vae(model).encode(images())
    expected = LatentCodec.from_vae(vae(force_upcast=True).half().float()).decode(x)
    half = model.half()
    torch.testing.assert_close(LatentCodec.from_vae(half).decode(x), expected)
    assert half.dtype == torch.float16  # the pipeline's own stays as it was


def test_the_codec_of_a_pipeline() -> None:
    codec = LatentCodec.of(tiny.pipeline("flux"))
    assert (codec.scale, codec.shift, codec.factor) == (0.3611, 0.1159, 2)
    assert LatentCodec.of(tiny.pipeline("ddpm")) is None
