"""Discriminators on frozen features: taps of every family, early exit, image encoders, augmentation, conditions, gradients."""

from __future__ import annotations

import diffusers
import pytest
import timm
import torch
from torch import Tensor, nn

from genkit import zoo
from genkit.classifiers import load_classifier
from genkit.denoisers import Cond, Denoiser
from genkit.distill.augment import DRAWS, coloured, cutout, diff_augment, translated
from genkit.distill.discriminator import FeatureDiscriminator
from genkit.distill.losses import approximate_r1, gan_d, gan_g, r1
from genkit.distill.sources import PixelEncoder, TeacherTaps
from genkit.features.extractor import null_condition
from genkit.features.taps import blocks_of, resolve_taps
from genkit.latents import LatentCodec
from tests import tiny

FAMILIES = ["ddpm", "stable_diffusion", "dit", "sd3", "flux", "sana"]
U = torch.tensor([0.3, 0.8], dtype=torch.float64)
TINY_VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2, "img_size": 28, "num_classes": 0}


def teacher_of(family: str, **config) -> tuple[Denoiser, Tensor, Tensor, Cond]:
    """A tiny denoiser, two clean samples, noise and conditions."""
    denoiser = Denoiser.of(tiny.pipeline(family, **config))
    size = 16 if family == "flux" else None
    shape = denoiser.latent_shape(size, size)
    x0, eps = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    return denoiser, x0, eps, null_condition(denoiser).repeat(2)


@pytest.fixture(scope="module")
def sd() -> tuple[Denoiser, Tensor, Tensor, Cond]:
    return teacher_of("stable_diffusion")


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return Denoiser.of(tiny.pipeline("stable_diffusion")).codec


def vit(name: str = "vit_small_patch14_dinov2", **config) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **TINY_VIT | config)


# The teacher's activations


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_the_teacher_to_the_samples_and_leave_it_alone(family):
    denoiser, x0, eps, cond = teacher_of(family)
    shape = tuple(x0.shape[1:])
    source = TeacherTaps(denoiser, "all", shape=shape)
    assert source.names == blocks_of(denoiser.network)
    x0.requires_grad_()
    features = source(x0, cond, U, eps)
    assert [f.shape[1] for f in features] == source.channels
    assert all(f.ndim == 4 for f in features)
    assert all(f.dtype == torch.float32 for f in features)
    for feature in features:
        (gradient,) = torch.autograd.grad(feature.square().sum(), x0, retain_graph=True)
        assert float(gradient.flatten(1).abs().sum(1).min()) > 0
    features[-1].square().sum().backward()
    assert all(p.grad is None for p in denoiser.network.parameters())
    assert not denoiser.network.training


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_a_whole_pass_at_each_samples_level(family):
    """A hook on the last block but one, in a pass of each sample alone."""
    denoiser, x0, eps, cond = teacher_of(family)
    name = blocks_of(denoiser.network)[-2 if family != "sana" else -1]
    source = TeacherTaps(denoiser, [name], shape=tuple(x0.shape[1:]))
    both = source(x0, cond, U, eps)[0]
    (tap,) = resolve_taps(denoiser.network, name)
    seen = []
    handle = denoiser.network.get_submodule(tap.module).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for i in range(2):
            x, level = source.path.add_noise(x0[i : i + 1], eps[i : i + 1], U[i : i + 1])
            denoiser(x, level, cond[i] if cond.tensors else cond)
    handle.remove()
    for i in range(2):
        value = seen[i] if isinstance(seen[i], Tensor) else seen[i][tap.item]
        tokens = value if value.ndim == 3 else value.flatten(2).transpose(1, 2)
        torch.testing.assert_close(both[i].flatten(1).T, tokens[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["stable_diffusion", "sd3"])
def test_the_pass_ends_at_the_deepest_tap(family):
    """Counted in blocks that start, those that were left among them."""
    denoiser, x0, eps, cond = teacher_of(family, **({"num_layers": 4} if family == "sd3" else {}))
    names = blocks_of(denoiser.network)
    started = []
    handles = [
        denoiser.network.get_submodule(tap.module).register_forward_pre_hook(lambda *_, name=tap.name: started.append(name))
        for tap in resolve_taps(denoiser.network, names)
    ]
    last = len(names) // 2
    TeacherTaps(denoiser, [names[last - 1], names[0]])(x0, cond, U, eps)
    assert started == names[:last]
    started.clear()
    TeacherTaps(denoiser, "quarter")(x0, cond, U, eps)
    assert started == names
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("depth", "expected"), [(1, [1]), (2, [1, 2]), (9, [2, 4, 6, 8, 9]), (20, [3, 8, 13, 18, 20]), (28, [4, 11, 18, 25, 28])]
)
def test_quarter_taps(depth, expected):
    """The middle of each quarter of the depth, and the last block."""
    denoiser = Denoiser.of(tiny.pipeline("dit", num_layers=depth))
    assert TeacherTaps(denoiser).names == [f"block.{n}" for n in expected]


@pytest.mark.parametrize(("depth", "expected"), [(1, [1]), (2, [1]), (9, [2, 3, 4, 5]), (20, [3, 5, 8, 10]), (28, [4, 7, 11, 14])])
def test_half_taps(depth, expected):
    """Four blocks, evenly from the first to the middle one."""
    denoiser = Denoiser.of(tiny.pipeline("dit", num_layers=depth))
    assert TeacherTaps(denoiser, "half").names == [f"block.{n}" for n in expected]


def test_half_of_a_unet_is_its_encoder(sd):
    assert [tap.module for tap in TeacherTaps(sd[0], "half").taps][-1] == "mid_block"
    assert all(tap.module.startswith("down_blocks.") for tap in TeacherTaps(sd[0], "half").taps[:-1])


def test_taps_by_name_keep_their_order(sd):
    denoiser, x0, eps, cond = sd
    source = TeacherTaps(denoiser, ["mid", "block.2", "down_blocks.0.resnets.0.conv1", -1])
    assert source.names == ["mid", "block.2", "down_blocks.0.resnets.0.conv1", "block.9"]
    features = source(x0, cond, U, eps)
    assert [f.shape[1] for f in features] == source.channels
    assert torch.equal(features[0], TeacherTaps(denoiser, "mid")(x0, cond, U, eps)[0])


def test_tokens_of_no_grid_and_vectors_are_maps_too(sd):
    denoiser, x0, eps, cond = sd
    text = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    source = TeacherTaps(denoiser, [text, "time_embedding"])
    assert [tuple(f.shape) for f in source(x0, cond, U, eps)] == [(2, 8, 8, 1), (2, 32, 1, 1)]
    assert source.channels == [8, 32]


def test_heads_that_match_no_tap(sd):
    with pytest.raises(ValueError, match=r"UNet2DConditionModel has no tap 'block.99'. Close names: block.9"):
        TeacherTaps(sd[0], ["block.1", "block.99"])
    with pytest.raises(ValueError, match=r"no tap 'third'"):
        TeacherTaps(sd[0], "third")
    with pytest.raises(ValueError, match=r"No taps were named"):
        TeacherTaps(sd[0], [])


def test_a_network_without_known_blocks_needs_module_paths(sd):
    from genkit.denoisers.base import with_network

    plain = with_network(sd[0], nn.Sequential(nn.Conv2d(4, 8, 1), nn.SiLU()))
    for taps in ("quarter", "half", "all"):
        with pytest.raises(
            ValueError, match=rf"Sequential has no blocks that genkit knows. Give taps as module paths, not '{taps}'"
        ):
            TeacherTaps(plain, taps)
    assert TeacherTaps(plain, ["0"]).names == ["0"]


def test_the_teacher_needs_levels_and_noise(sd):
    denoiser, x0, eps, cond = sd
    with pytest.raises(ValueError, match=r"Give levels u \(B,\) and noise eps"):
        TeacherTaps(denoiser)(x0, cond, U)
    with pytest.raises(ValueError, match=r"Give levels u \(B,\) and noise eps"):
        TeacherTaps(denoiser)(x0, cond, None, eps)


def test_the_teacher_is_evaluated_in_eval_mode_whatever_others_did():
    """DiT drops labels in train mode."""
    denoiser, x0, eps, _ = teacher_of("dit")
    cond = denoiser.condition(labels=[3, 7])
    source = TeacherTaps(denoiser)
    expected = source(x0, cond, U, eps)
    denoiser.network.train()
    modes = []
    handle = denoiser.network.transformer_blocks[0].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    torch.manual_seed(0)
    found = source(x0, cond, U, eps)
    handle.remove()
    assert modes == [False]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradient_checkpointing_of_the_teacher_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        denoiser, x0, eps, cond = teacher_of("stable_diffusion")
        if checkpointing:
            denoiser.network.enable_gradient_checkpointing()
        x0.requires_grad_()
        source = TeacherTaps(denoiser, ["block.3", "block.8"])
        torch.stack([f.square().mean() for f in source(x0, cond, U, eps)]).sum().backward()
        gradients.append(x0.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


# Image encoders


def test_a_vision_transformer_reads_decoded_latents(codec):
    source = PixelEncoder.timm(vit(), codec, taps=("pos_drop", 0, 3))
    discriminator = FeatureDiscriminator(source, 0)
    assert (source.names, source.channels, source.size) == (["pos_drop", "blocks.0", "blocks.3"], [16] * 3, 28)
    x0 = torch.randn(2, 4, 8, 8, requires_grad=True)
    features = discriminator.extract(x0, None, U, torch.randn(2, 4, 8, 8))
    assert [tuple(f.shape) for f in features] == [(2, 16, 2, 2)] * 3
    gan_g(discriminator.score(features, x0.new_zeros(2, 0))).backward()
    assert float(x0.grad.flatten(1).abs().sum(1).min()) > 0
    frozen = [*source.encoder.parameters(), *codec.vae.parameters()]
    assert all(p.grad is None for p in frozen)
    assert not source.encoder.training
    assert not codec.vae.training


@pytest.mark.parametrize(("name", "prefix"), [("vit_small_patch14_dinov2", 1), ("vit_small_patch14_reg4_dinov2", 5)])
def test_the_class_token_is_added_to_each_patch(name, prefix):
    """Registers are left out."""
    source = PixelEncoder.timm(vit(name), None, taps=[3], augment=False)
    outputs = []
    handle = source.encoder.blocks[3].register_forward_hook(lambda module, args, output: outputs.append(output))
    (found,) = source(torch.randn(2, 3, 28, 28), eps=torch.randn(2, 3, 28, 28))
    handle.remove()
    tokens = outputs[0]
    assert tokens.shape == (2, prefix + 4, 16)
    expected = tokens[:, prefix:] + tokens[:, :1]
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)


def test_an_encoder_by_name_gets_the_size_and_the_statistics_it_expects():
    options = {k: v for k, v in TINY_VIT.items() if k not in ("img_size", "num_classes")}
    source = PixelEncoder.timm("vit_small_patch14_dinov2", None, taps=[1], size=42, pretrained=False, **options)
    seen = []
    source.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    source(torch.ones(1, 3, 42, 42), eps=torch.zeros(1, 3, 42, 42))
    source.augment = False
    source(torch.ones(1, 3, 42, 42), eps=torch.zeros(1, 3, 42, 42))
    assert seen[1].shape == (1, 3, 42, 42)
    # White, normalised with ImageNet's statistics.
    assert seen[1][0, :, 0, 0].tolist() == pytest.approx([(1 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))])
    assert not torch.equal(seen[0], seen[1]), "augmented by default"


def test_the_classifier_of_digits_reads_decoded_digits():
    """The embedded encoder for ADD on digits; its own VAE decodes."""
    vae = diffusers.AutoencoderKL.from_pretrained(zoo.path("digits"), subfolder="vae")
    classifier = load_classifier("digits-classifier")
    source = PixelEncoder(classifier, LatentCodec.from_vae(vae), ["blocks.1", "blocks.2", "blocks.3"], size=32)
    x0 = torch.randn(2, 4, 8, 8, requires_grad=True)
    features = source(x0, eps=torch.randn(2, 4, 8, 8))
    assert [f.shape[1] for f in features] == source.channels
    features[-1].mean().backward()
    assert float(x0.grad.flatten(1).abs().sum(1).min()) > 0
    assert not classifier.training
    assert all(not p.requires_grad for p in vae.parameters())


def test_the_encoder_and_the_vae_are_evaluated_in_eval_mode(codec):
    source = PixelEncoder.timm(vit(), codec, taps=[1])
    modes = []
    handles = [m.register_forward_pre_hook(lambda module, args: modes.append(module.training)) for m in
               (source.encoder.blocks[0], codec.vae.decoder)]  # fmt: skip
    source.encoder.train()
    codec.vae.train()
    source(torch.randn(1, 4, 8, 8), eps=torch.randn(1, 4, 8, 8))
    source.embed(torch.randn(1, 4, 8, 8))
    for handle in handles:
        handle.remove()
    codec.vae.eval()
    assert modes == [False] * 4


def test_encoders_stop_at_the_deepest_tap():
    source = PixelEncoder.timm(vit(), None, taps=[0, 1])
    ran = []
    source.encoder.blocks[2].register_forward_pre_hook(lambda *_: ran.append(2))
    source(torch.randn(1, 3, 28, 28), eps=torch.randn(1, 3, 28, 28))
    assert not ran


def test_augmentation_and_cuts_depend_on_the_noise_of_the_sample_alone():
    source = PixelEncoder(nn.Sequential(nn.Conv2d(3, 4, 3)), None, ["0"], size=12)
    pictures, eps = torch.randn(2, 5, 3, 20, 16, generator=torch.Generator().manual_seed(0)).unbind()
    (together,) = source(pictures, eps=eps)
    (alone,) = source(pictures[3:4], eps=eps[3:4])
    torch.testing.assert_close(together[3:4], alone)
    (other,) = source(pictures[3:4], eps=eps[:1])
    assert not torch.allclose(other, alone, atol=1e-3)


def test_cuts_and_sizes():
    source = PixelEncoder(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3)), None, ["0"], size=8, augment=False)
    x = torch.arange(16.0 * 24).reshape(1, 1, 16, 24).expand(1, 3, -1, -1)
    cut = source._fitted(x, 0.5, 0.0, 1.0)
    assert torch.equal(cut, x[..., :8, 16:])
    # Shrunk to 8 x 12 by averaging 2 x 2, then cut.
    shrunk = source._fitted(x, 0.4, 0.0, 0.0)
    assert torch.equal(shrunk[0, 0, 0, :2], torch.stack([x[0, 0, :2, :2].mean(), x[0, 0, :2, 2:4].mean()]))
    assert shrunk.shape == (1, 3, 8, 8)
    for way in (0.0, 0.9):
        assert source._fitted(x[..., :4, :6], way, 0.5, 0.5).shape == (1, 3, 8, 8), "enlarged"
        assert torch.equal(source._fitted(x[..., :8, :8], way, 0.3, 0.7), x[..., :8, :8]), "as it is"


def test_image_encoders_need_noise_and_taps_that_exist():
    with pytest.raises(ValueError, match=r"Augmentations and cuts are drawn from the noise. Give eps like x0"):
        PixelEncoder.timm(vit(), None, taps=[1])(torch.randn(1, 3, 28, 28))
    with pytest.raises(ValueError, match=r"VisionTransformer has no tap 'blocks.9'"):
        PixelEncoder.timm(vit(), None, taps=[9])
    with pytest.raises(ValueError, match=r"Sequential has no tap '7'"):
        PixelEncoder(nn.Sequential(nn.Conv2d(3, 4, 3)), None, ["7"], size=8)


def test_embeddings_of_pictures():
    """The class token of the last tap, or the mean of a map; without augmentation, so twice the same."""
    source = PixelEncoder.timm(vit(), None, taps=[1, 3])
    outputs = []
    source.encoder.blocks[3].register_forward_hook(lambda module, args, output: outputs.append(output))
    pictures = torch.randn(2, 3, 28, 28, requires_grad=True)
    embedded = source.embed(pictures)
    assert torch.equal(embedded, outputs[0][:, 0])
    assert not embedded.requires_grad
    assert torch.equal(embedded, source.embed(pictures))
    convolution = PixelEncoder(nn.Sequential(nn.Conv2d(3, 4, 3)), None, ["0"], size=28)
    torch.testing.assert_close(convolution.embed(pictures), convolution.encoder(pictures).mean((2, 3)))


# Augmentation


def test_augmentation_in_the_middle_of_its_range_only_cuts_out():
    """A fifth of each side around the middle, set to 0."""
    x = 1 + torch.rand(2, 3, 40, 40)
    found = diff_augment(x, torch.full((DRAWS, 2), 0.5))
    expected = x.clone()
    expected[..., 16:24, 16:24] = 0
    torch.testing.assert_close(found, expected)


def test_translation_moves_by_up_to_an_eighth():
    x = torch.rand(2, 3, 16, 24)
    found = translated(x, torch.tensor([[0.999, 0.0], [0.0, 0.999]]))
    assert torch.equal(found[0, :, 2:, :21], x[0, :, :-2, 3:])
    assert torch.equal(found[1, :, :14, 3:], x[1, :, 2:, :-3])
    assert float(found[0, :, :2].abs().max()) == 0
    assert float(found[0, :, :, 21:].abs().max()) == 0


def test_colours_change_by_brightness_saturation_and_contrast():
    x = torch.rand(1, 3, 4, 4)
    half, one, zero = 0.5, 1.0, 0.0
    torch.testing.assert_close(coloured(x, torch.tensor([[one], [half], [half]])), x + 0.5)
    grey = coloured(x, torch.tensor([[half], [zero], [half]]))
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x))
    strong = coloured(x, torch.tensor([[half], [half], [one]]))
    torch.testing.assert_close(strong - strong.mean(), 1.5 * (x - x.mean()))


def test_cutouts_at_the_border_are_smaller():
    x = torch.ones(2, 3, 20, 20)
    zeros = (cutout(x, torch.tensor([[0.5, 0.0], [0.5, 0.0]])) == 0).sum((1, 2, 3)) // 3
    assert zeros.tolist() == [16, 4]


def test_augmentation_has_gradients():
    x = torch.rand(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    draws = torch.rand(DRAWS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: diff_augment(v, draws), (x,), fast_mode=True)


# The discriminator


def test_only_the_heads_are_trained_and_saved(sd):
    denoiser, x0, eps, cond = sd
    discriminator = FeatureDiscriminator(TeacherTaps(denoiser, ["mid", -1]), 6)
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    assert {name.split(".")[1] for name, _ in discriminator.named_parameters()} == {"0", "1"}
    discriminator.train()
    assert not denoiser.network.training
    other = FeatureDiscriminator(TeacherTaps(denoiser, ["mid", -1]), 6)
    other.load_state_dict(discriminator.state_dict())
    vector = torch.randn(2, 6)
    features = discriminator.extract(x0, cond, U, eps)
    logits = [d.eval().score(features, vector, U) for d in (discriminator, other)]
    assert [tuple(d.shape) for d in logits[0]] == [(2, 16), (2, 64)]
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


@pytest.mark.parametrize("head", ["conv2d", "mlp", "stylegan-t"])
def test_heads_are_told_prompt_level_and_picture(sd, head):
    denoiser, x0, eps, cond = sd
    discriminator = FeatureDiscriminator(TeacherTaps(denoiser, ["mid"]), 6, head=head, image_dim=4).eval()
    features, vector, image = discriminator.extract(x0, cond, U, eps), torch.randn(2, 6), torch.randn(2, 4)
    (usual,) = discriminator(features, vector, U, image)
    for changed in ((vector.flip(0), U, image), (vector, U.flip(0), image), (vector, U, image.flip(0))):
        assert not torch.allclose(discriminator(features, *changed)[0], usual, atol=1e-4)
    # Encoders differ in scale.
    torch.testing.assert_close(discriminator(features, 1000 * vector, U, image)[0], usual, rtol=1e-3, atol=1e-4)


def test_heads_without_any_condition(codec):
    """An image encoder's features have no noise level."""
    discriminator = FeatureDiscriminator(PixelEncoder.timm(vit(), None, taps=[1]), 0)
    assert not discriminator.time
    features = discriminator.extract(torch.randn(3, 3, 28, 28), None, U, torch.randn(3, 3, 28, 28))
    assert discriminator.score(features, torch.zeros(3, 0))[0].shape == (3, 4)


def test_real_and_generated_samples_may_share_a_batch(sd):
    denoiser, x0, eps, cond = sd
    discriminator = FeatureDiscriminator(TeacherTaps(denoiser, ["mid", -1]), 6).eval()
    features, vector = discriminator.extract(x0, cond, U, eps), torch.randn(2, 6)
    together = discriminator.score(features, vector, U)
    for i in range(2):
        apart = discriminator.score([f[i : i + 1] for f in features], vector[i : i + 1], U[i : i + 1])
        for a, b in zip(apart, together, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-4, atol=1e-5)


def test_heads_stay_in_float32_under_autocast(sd):
    denoiser, x0, eps, cond = sd
    discriminator = FeatureDiscriminator(TeacherTaps(denoiser, ["mid"]), 6)
    features, vector = discriminator.extract(x0, cond, U, eps), torch.randn(2, 6)
    discriminator.eval()
    usual = discriminator.score(features, vector, U)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = discriminator.score(features, vector, U)[0]
    assert cast.dtype == torch.float32
    assert torch.equal(cast, usual)


def test_r1_of_a_discriminator_reaches_every_head(sd):
    denoiser, x0, eps, cond = sd
    discriminator = FeatureDiscriminator(TeacherTaps(denoiser, ["mid", -1]), 6)
    features = [f.detach().requires_grad_() for f in discriminator.extract(x0, cond, U, eps)]
    r1(discriminator.score(features, torch.randn(2, 6), U), features).backward()
    for head in discriminator.heads:
        assert float(head.conv_in.parametrizations.weight.original.grad.abs().sum()) > 0


def test_a_perturbation_is_of_what_the_discriminator_looks_at(sd):
    """The same noised input, a little beside: the finite difference agrees with the gradient along the perturbation."""
    denoiser, x0, eps, cond = sd
    source = TeacherTaps(denoiser, ["mid"])
    discriminator = FeatureDiscriminator(source, 0).eval()
    vector, n, std = torch.zeros(2, 0), torch.randn_like(x0), 1e-2
    x, _ = source.path.add_noise(x0, eps, U)
    leaf = torch.zeros_like(x, requires_grad=True)
    logits = discriminator.score(discriminator.extract(x0, cond, U, eps, leaf), vector, U)
    (gradient,) = torch.autograd.grad(logits[0].sum(), leaf)
    perturbed = discriminator.score(discriminator.extract(x0, cond, U, eps, std * n), vector, U)
    along = (gradient * n).flatten(1).sum(1).square().mean()
    assert approximate_r1(logits, perturbed, std).item() == pytest.approx(along.item(), rel=0.05)


def test_a_perturbed_picture_is_augmented_in_the_same_way():
    source = PixelEncoder(nn.Sequential(nn.Conv2d(3, 4, 3)), None, ["0"], size=12)
    pictures, eps, n = torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    moved = (source(pictures, eps=eps, perturbation=1e-3 * n)[0] - source(pictures, eps=eps)[0]).abs().max()
    assert 0 < float(moved) < 0.05


def test_training_the_heads_tells_samples_apart_and_shows_the_student_the_way(sd):
    """Real samples have another mean; after 25 updates the heads know, and the student's gradient points to it."""
    denoiser, _, _, cond = sd
    torch.manual_seed(0)
    discriminator = FeatureDiscriminator(TeacherTaps(denoiser, ["block.2", "mid"]), 0, width=32)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    conds, vector, shift = cond[0].repeat(8), torch.zeros(8, 0), 0.7

    def logits(x0: Tensor) -> list[Tensor]:
        u = 0.3 * torch.rand(8, dtype=torch.float64) + 0.01
        return discriminator.score(discriminator.extract(x0, conds, u, torch.randn_like(x0)), vector, u)

    for _ in range(25):
        real, fake = torch.randn(8, 4, 8, 8) + shift, torch.randn(8, 4, 8, 8)
        optimizer.zero_grad()
        gan_d(logits(real), logits(fake)).backward()
        optimizer.step()
    fake = torch.randn(8, 4, 8, 8, requires_grad=True)
    with torch.no_grad():
        judged = torch.stack([torch.stack([d.mean(1) for d in logits(x)]).mean(0) for x in (fake + shift, fake)])
    assert float((judged[0] > 0).float().mean() + (judged[1] < 0).float().mean()) / 2 > 0.9
    gan_g(logits(fake)).backward()
    assert float(-fake.grad.mean()) > 0


def test_what_does_not_fit(sd):
    denoiser, x0, eps, cond = sd
    source = TeacherTaps(denoiser, ["mid"])
    with pytest.raises(ValueError, match=r"Unknown head 'conv'. Did you mean 'conv2d'\?"):
        FeatureDiscriminator(source, 6, head="conv")
    discriminator = FeatureDiscriminator(source, 6, image_dim=4)
    features, vector, image = discriminator.extract(x0, cond, U, eps), torch.randn(2, 6), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"There are 2 features for 1 heads"):
        discriminator.score(features * 2, vector, U, image)
    with pytest.raises(ValueError, match=r"vector is \(2, 5\), but \(2, 6\) is needed"):
        discriminator.score(features, vector[:, :5], U, image)
    with pytest.raises(ValueError, match=r"image is None, but \(2, 4\) is needed"):
        discriminator.score(features, vector, U)
    with pytest.raises(ValueError, match=r"The heads know the noise level: give u \(2,\)"):
        discriminator.score(features, vector, None, image)
