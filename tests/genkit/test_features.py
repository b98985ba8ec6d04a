"""Features of frozen networks: taps of every family, early exit, noise, heads, and the block table of ADM-256."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from genkit.denoisers import Denoiser
from genkit.features import AttentionHead, FeatureExtractor, FeedbackHead, LinearHead
from genkit.features.linear import fit_linear_probe
from genkit.features.taps import as_map, blocks_of, mirrors_of, resolve_taps, tapped, taps_of
from tests import tiny

SMALL = [family for family in tiny.FAMILIES if family not in ("flux", "pixart_alpha")]  # those two are 128 x 128
UNETS = {"ddpm", "ddim", "stable_diffusion", "sdxl"}


def denoiser_of(family: str, **config) -> Denoiser:
    return Denoiser.of(tiny.pipeline(family, **config))


@pytest.fixture(scope="module")
def unet() -> Denoiser:
    return denoiser_of("stable_diffusion")


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def adm_256() -> Denoiser:
    """The unconditional ImageNet network of Dhariwal & Nichol 2021, without memory."""
    with torch.device("meta"):
        network = diffusers.UNet2DModel(
            sample_size=256, out_channels=6, block_out_channels=(256, 256, 512, 512, 1024, 1024), layers_per_block=2,
            attention_head_dim=64, downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
            down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
            up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",) * 3,
        )  # fmt: skip
    return Denoiser.of(diffusers.DDPMPipeline(network.eval(), diffusers.DDPMScheduler()))


# Taps


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_taps_in_the_order_in_which_they_run(family):
    """One full pass with a hook on each named module; the meta device tells the same shapes."""
    denoiser = denoiser_of(family)
    size = 16 if family in ("flux", "pixart_alpha") else None
    extractor = FeatureExtractor(denoiser, denoiser.taps, t=100, early_exit=False)
    order = []
    handles = [
        denoiser.network.get_submodule(tap.module).register_forward_hook(lambda *_, name=tap.name: order.append(name))
        for tap in extractor.taps
    ]
    features = extractor(latents=torch.randn(2, *denoiser.latent_shape(size, size)))
    for handle in handles:
        handle.remove()
    assert order == denoiser.taps
    assert list(features) == denoiser.taps
    assert len(blocks_of(denoiser.network)) == (9 if family in UNETS else 1 if family == "sana" else 2)
    infos = extractor.info(size, size)
    assert [info.shape for info in infos] == [tuple(value.shape[1:]) for value in features.values()]
    for info in infos:
        assert len(info.shape) == 3, "a map"
        assert info.channels == info.shape[0]
        assert info.reduction == denoiser.latent_shape(size, size)[1] * denoiser.factor / info.shape[1]


@pytest.mark.parametrize("family", SMALL)
def test_early_exit_gives_the_same_bits_and_skips_the_rest(family):
    denoiser = denoiser_of(family)
    x0 = torch.randn(2, *denoiser.latent_shape(None, None))
    everything = FeatureExtractor(denoiser, denoiser.taps, t=100, early_exit=False)(latents=x0)
    ran = []
    last = denoiser.network.get_submodule(resolve_taps(denoiser.network, -1)[0].module)
    handle = last.register_forward_hook(lambda *_: ran.append(1))
    for name in denoiser.taps[:-1]:
        assert torch.equal(FeatureExtractor(denoiser, name, t=100)(latents=x0)[name], everything[name])
    handle.remove()
    assert not ran
    assert not any(module._forward_hooks for module in denoiser.network.modules())


def test_joint_transformers_give_image_tokens_in_raster_order():
    """Of Stable Diffusion 3's first block: the second output, whose token (row, column) is that place of the map."""
    denoiser = denoiser_of("sd3")
    outputs = []
    handle = denoiser.network.transformer_blocks[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    x0 = torch.randn(1, *denoiser.latent_shape(None, None))
    found = FeatureExtractor(denoiser, "block.1")(latents=x0)["block.1"]
    handle.remove()
    image = outputs[0][1]
    assert image.shape == (1, 16, 16)
    assert torch.equal(found[0, :, 2, 1], image[0, 2 * 4 + 1])


def test_other_names_and_positions(unet, latents):
    network = unet.network
    same = {
        "mid": "block.5",
        "up.0": "block.7",
        "up.0.pre": "block.7.pre",
        "down.0": "block.3",
        "down_blocks.0.downsamplers.0": "block.3",
    }
    for alias, name in same.items():
        assert resolve_taps(network, alias)[0].module == taps_of(network)[name].module
    assert [tap.name for tap in resolve_taps(network, [0, -1, 4])] == ["block.1", "block.9", "block.5"]
    both = FeatureExtractor(unet, ["mid", "block.5"])(latents=latents)
    assert torch.equal(both["mid"], both["block.5"])


def test_any_module_is_a_tap(unet, latents):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    extractor = FeatureExtractor(unet, [path, "time_embedding"])
    found = extractor(latents=latents)
    assert found[path].shape == (3, 8, 8, 8), "tokens of the picture as a map"
    assert found["time_embedding"].shape[1] == 32
    info = extractor.feature_info[1]
    assert (info.shape, info.channels, info.reduction) == ((32,), 32, None)
    text = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert FeatureExtractor(unet, text)(latents=latents)[text].shape == (3, 8, 8)
    assert FeatureExtractor(unet, text, pool="mean")(latents=latents)[text].shape == (3, 8)


def test_blocks_that_are_no_chain_of_residual_units_count_as_one():
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, attention_head_dim=32,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )  # fmt: skip
    modules = [tap.module for tap in taps_of(network).values()]
    assert modules == ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ([], r"No taps were named"),
        ("middle", r"UNet2DConditionModel has no tap 'middle'. Close names: mid.*Its blocks are block.1 to block.9"),
        ("block.10", r"has no tap 'block.10'. Close names: block.1"),
        (9, r"There is no block 9: UNet2DConditionModel has 9"),
        (-10, r"There is no block -10"),
        (["mid", "mid"], r"The tap 'mid' was named twice"),
    ],
)
def test_wrong_taps(unet, taps, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(unet, taps)


def test_a_tap_that_does_not_run_or_gives_no_tensor(unet, latents):
    with pytest.raises(ValueError, match=r"The module of the tap 'mid_block.resnets' did not run"):
        FeatureExtractor(unet, ["mid_block.resnets", "conv_in"])(latents=latents)
    handle = unet.network.mid_block.register_forward_hook(lambda module, args, output: {"sample": output})
    with pytest.raises(ValueError, match=r"The tap 'mid' gives a dict, no tensor"):
        FeatureExtractor(unet, "mid")(latents=latents)
    handle.remove()


# What the network sees


def test_noise_is_that_of_the_level(unet, latents):
    """The input convolution's activation is its output at sqrt(abar) x0 + sqrt(1 - abar) eps; noise 0 levels differ."""
    t = 300
    extractor = FeatureExtractor(unet, "conv_in", t=t, seed=5)
    found = extractor(latents=latents)["conv_in"]
    abar = unet.pipe.scheduler.alphas_cumprod[t].double()
    (eps,) = {tuple(row.flatten().tolist()) for row in extractor._noise(latents, 0, None)}
    x = abar.sqrt() * latents + (1 - abar).sqrt() * torch.tensor(eps).view(4, 8, 8)
    assert torch.allclose(found, unet.network.conv_in(x.float()), atol=1e-5)


def test_fixed_noise_makes_features_of_the_image_alone(unet, latents):
    extractor = FeatureExtractor(unet, ["block.2", "mid"], t=200)
    whole, single = extractor(latents=latents), extractor(latents=latents[1:2])
    for name in whole:
        assert torch.allclose(whole[name][1:2], single[name], atol=1e-5)
    assert not torch.equal(FeatureExtractor(unet, "mid", t=200, seed=1)(latents=latents)["mid"], whole["mid"])


def test_draws_are_averaged_and_belong_to_the_image(unet, latents):
    extractor = FeatureExtractor(unet, "mid", t=400, noise=3)
    whole = extractor(latents=latents, indices=[7, 8, 9])["mid"]
    assert torch.allclose(extractor(latents=latents[2:], indices=[9])["mid"], whole[2:], atol=1e-5)
    assert not torch.allclose(extractor(latents=latents[2:], indices=[7])["mid"], whole[2:], atol=1e-3)
    draws = [extractor.draw(latents, k, indices=[7, 8, 9])["mid"] for k in range(3)]
    assert torch.allclose(torch.stack(draws).mean(0), whole, atol=1e-6)
    assert not torch.allclose(draws[0], draws[1], atol=1e-3)


def test_several_times_and_pooling(unet, latents):
    whole = FeatureExtractor(unet, "mid", t=[50, 500])(latents=latents)["mid"]
    assert whole.shape == (3, 2, 16, 4, 4)
    assert torch.equal(whole[:, 1], FeatureExtractor(unet, "mid", t=500)(latents=latents)["mid"])
    pooled = {pool: FeatureExtractor(unet, "mid", t=500, pool=pool)(latents=latents)["mid"] for pool in (2, 16, "mean")}
    assert torch.allclose(pooled[2], nn.functional.adaptive_avg_pool2d(whole[:, 1], 2))
    assert torch.equal(pooled[16], whole[:, 1]), "never enlarged"
    assert torch.allclose(pooled["mean"], whole[:, 1].mean((2, 3)))
    assert FeatureExtractor(unet, "mid", t=[500])(latents=latents)["mid"].shape == (3, 1, 16, 4, 4)


def test_images_are_encoded_and_the_null_condition_is_the_default(unet):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    extractor = FeatureExtractor(unet, "mid")
    found = extractor(images)["mid"]
    cond = unet.condition(["a cat", "a red seven"])
    assert torch.equal(found, extractor(latents=unet.encode(images))["mid"])
    assert torch.equal(found, extractor(images, cond.null())["mid"])
    assert not torch.equal(found, extractor(images, cond)["mid"])


def test_gradients_only_if_asked(unet, latents):
    extractor = FeatureExtractor(unet, "mid", t=100)
    leaf = latents.clone().requires_grad_(True)
    assert not extractor(latents=leaf)["mid"].requires_grad
    (gradient,) = torch.autograd.grad(extractor(latents=leaf, grad=True)["mid"].square().sum(), leaf)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(extractor(latents=leaf)["mid"], extractor(latents=latents)["mid"])


def test_inject_adds_at_a_tap_and_is_resized(unet, latents):
    extractor = FeatureExtractor(unet, ["block.2", "mid"], t=100)
    plain = extractor(latents=latents)
    fed = extractor(latents=latents, inject={"block.2": torch.ones(3, 8, 2, 2)})
    assert torch.allclose(fed["block.2"], plain["block.2"] + 1, atol=1e-6)
    assert not torch.allclose(fed["mid"], plain["mid"], atol=1e-4)
    assert torch.equal(extractor(latents=latents)["mid"], plain["mid"])


def test_the_network_is_left_as_it_was_after_an_error(unet, latents):
    unet.network.train()
    try:
        with pytest.raises(ValueError, match="The condition is for 2 samples"):
            FeatureExtractor(unet, "mid")(latents=latents, cond=unet.condition(["a", "red"]))
        with pytest.raises(RuntimeError):
            FeatureExtractor(unet, "mid")(latents=torch.zeros(1, 5, 8, 8))
        assert all(module.training for module in unet.network.modules())
    finally:
        unet.network.eval()
    assert not any(module._forward_hooks for module in unet.network.modules())


def test_the_exit_of_another_pass_is_not_taken(unet, latents):
    """An extractor that runs inside of another's pass ends its own alone."""
    network = unet.network
    taps = resolve_taps(network, "mid")
    reached = []
    with tapped(network, taps, early_exit=False) as outer:
        inner = FeatureExtractor(unet, "block.1")(latents=latents)
        unet(latents, FeatureExtractor(unet, "mid").levels[0], unet.condition([""] * 3))
        reached.append(1)
    assert reached
    assert set(outer) == {"mid"}
    assert set(inner) == {"block.1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t": 1000}, r"t=1000 is out of range. Give a timestep from 0 up to 999"),
        ({"t": -1}, r"t=-1 is out of range"),
        ({"t": []}, r"No times were given"),
        ({"noise": 0}, r"noise=0 must be 'fixed' or a number of draws"),
        ({"noise": "fresh"}, r"noise='fresh' must be"),
        ({"pool": 0}, r"pool=0 must be"),
        ({"pool": "max"}, r"pool='max' must be"),
    ],
)
def test_wrong_settings(unet, arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(unet, "mid", **arguments)


def test_wrong_inputs(unet, latents):
    extractor = FeatureExtractor(unet, "mid", noise=1)
    with pytest.raises(ValueError, match=r"Give either images or latents"):
        extractor()
    with pytest.raises(ValueError, match=r"images have shape \(3, 16, 16\)"):
        extractor(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"latents have shape \(4, 8, 8\)"):
        extractor(latents=latents[0])
    with pytest.raises(ValueError, match=r"There are 2 indices for 3 images"):
        extractor(latents=latents, indices=[0, 1])
    with pytest.raises(ValueError, match=r"pool=2 is for maps"):
        FeatureExtractor(unet, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", pool=2)(latents=latents)
    labelled = denoiser_of("ddpm", num_class_embeds=3)
    with pytest.raises(ValueError, match=r"has no null condition. Pass the condition"):
        FeatureExtractor(labelled, "mid")(torch.zeros(1, 3, 8, 8))
    assert FeatureExtractor(labelled, "mid")(torch.zeros(1, 3, 8, 8), labelled.condition(1))["mid"].shape == (1, 8, 4, 4)


def test_tokens_that_no_patch_explains_stay_tokens():
    assert as_map(torch.zeros(1, 12, 5), (8, 8)).shape == (1, 12, 5)
    assert as_map(torch.zeros(1, 8, 5), (4, 8)).shape == (1, 5, 2, 4)


# ADM-256: the paper's numbers


def test_block_table_of_adm_256():
    denoiser = adm_256()
    infos = FeatureExtractor(denoiser, blocks_of(denoiser.network)).feature_info
    channels = [256] * 7 + [512] * 6 + [1024] * 12 + [512] * 6 + [256] * 6
    sides = (
        [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3 + [8] * 6 + [16] * 3 + [32] * 3 + [64] * 3 + [128] * 3 + [256] * 4
    )
    assert [info.name for info in infos] == [f"block.{b}" for b in range(1, 38)]
    assert [info.channels for info in infos] == channels
    assert [info.shape[1] for info in infos] == sides
    assert infos[23].shape == (1024, 16, 16)
    assert infos[23].reduction == 16
    (before,) = FeatureExtractor(denoiser, "block.22.pre").feature_info
    assert before.shape == (1024, 8, 8)
    assert resolve_taps(denoiser.network, "mid")[0].module == taps_of(denoiser.network)["block.19"].module


def test_parameter_counts_of_the_heads_on_adm_256():
    def parameters(module):
        return sum(p.numel() for p in module.parameters())

    denoiser = adm_256()
    pairs = mirrors_of(denoiser.network)
    assert pairs == {f"block.{b}": f"block.{38 - b}" for b in (21, 24, 27, 30, 33, 36)}
    names = ["block.19", "block.24", "block.30", *pairs, *pairs.values()]
    infos = {info.name: info for info in FeatureExtractor(denoiser, list(dict.fromkeys(names))).feature_info}
    shapes = {name: infos[name].shape for name in ("block.19", "block.24", "block.30")}
    one = {"block.24": shapes["block.24"]}
    channels = {a: (infos[a].channels, infos[b].channels) for a, b in pairs.items()}
    with torch.device("meta"):
        assert parameters(LinearHead(one, 1000)) == 4_097_000
        assert parameters(AttentionHead(one, 1000)) == 27_786_216
        assert parameters(AttentionHead(shapes, 1000, levels=3)) == 31_802_344
        assert parameters(FeedbackHead(pairs, channels, one, 1000).convs) == 2_759_680
        assert parameters(FeedbackHead(pairs, channels, one, 1000)) == 2_759_680 + 27_786_216


def test_feedback_needs_a_unet():
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel has no such mirrored blocks"):
        mirrors_of(denoiser_of("dit").network)


# Heads


def test_linear_head_pools_and_takes_what_is_pooled():
    head = LinearHead({"a": (6, 4, 4), "b": (5,)}, 3, levels=2, pool=2)
    maps, vectors = torch.randn(7, 2, 6, 4, 4), torch.randn(7, 2, 5)
    assert head.fc.in_features == 2 * (6 * 4 + 5)
    assert head({"a": maps, "b": vectors}).shape == (7, 3)
    single = LinearHead({"a": (6, 2, 2)}, 3)
    pooled = nn.functional.adaptive_avg_pool2d(maps[:, 0], 2)
    assert torch.equal(single({"a": pooled}), single.fc(pooled.flatten(1)))


def test_fusion_head_sees_every_block_and_level():
    torch.manual_seed(0)
    head = AttentionHead({"a": (4, 3, 3), "b": (6, 2, 2)}, 3, levels=2, width=8, num_heads=2).eval()
    assert not head.cls.any()
    features = {"a": torch.randn(2, 2, 4, 3, 3), "b": torch.randn(2, 2, 6, 2, 2)}
    plain = head(features)
    for name in features:
        for level in range(2):
            changed = {key: value.clone() for key, value in features.items()}
            changed[name][:, level] += torch.randn_like(changed[name][:, level])
            assert not torch.allclose(head(changed), plain, atol=1e-5)


def test_heads_refuse_other_features():
    head = AttentionHead({"a": (4, 3, 3)}, 3, width=8, num_heads=2)
    with pytest.raises(ValueError, match=r"needs features of the tap 'a', but got those of b"):
        head({"b": torch.zeros(1, 4, 3, 3)})
    with pytest.raises(ValueError, match=r"have shape \(1, 5, 3, 3\), but the head needs \('B', 4, 3, 3\)"):
        head({"a": torch.zeros(1, 5, 3, 3)})
    with pytest.raises(ValueError, match=r"needs maps \(C, h, w\), but the features are a \(4,\)"):
        AttentionHead({"a": (4,)}, 3)
    with pytest.raises(ValueError, match=r"width=10 is no multiple of num_heads=4"):
        AttentionHead({"a": (4, 3, 3)}, 3, width=10, num_heads=4)


def test_feedback_reaches_the_second_pass_and_trains_only_the_head(unet, latents):
    pairs = mirrors_of(unet.network)
    assert pairs == {"block.6": "block.4", "block.8": "block.2"}
    first, second = FeatureExtractor(unet, list(pairs)), FeatureExtractor(unet, "block.7")
    head = FeedbackHead(pairs, {"block.6": (16, 16), "block.8": (8, 8)}, {"block.7": (16, 8, 8)}, 3, width=8, num_heads=2)
    logits = head(first(latents=latents), lambda fed: second(latents=latents, inject=fed, grad=True))
    assert logits.shape == (3, 3)
    logits.square().sum().backward()
    for conv in head.convs:
        assert conv[0].weight.grad.abs().max() > 0
    assert not any(p.requires_grad for p in unet.network.parameters())


# The linear probe's solver


@pytest.mark.parametrize("width", [4, 120])
def test_linear_probe_is_ridge_regression(width):
    """Primal (4 features) and dual (120): numpy's least squares on rows extended by sqrt(N lambda) I, up to the temperature."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 30)
    f = rng.normal(size=(90, width)) * rng.uniform(0.1, 5, width) + y[:, None] * rng.normal(size=width) + 3
    weight, bias, figures = fit_linear_probe(torch.tensor(f), torch.tensor(y), 3, penalties=[0.05])
    z, target = (f - f.mean(0)) / f.std(0), np.eye(3)[y] - 1 / 3
    rows = np.concatenate([z, np.sqrt(90 * 0.05) * np.eye(width)])
    best = np.linalg.lstsq(rows, np.concatenate([target, np.zeros((width, 3))]), rcond=None)[0]
    ours, theirs = f @ weight.numpy().T + bias.numpy(), z @ best + 1 / 3
    temperature = (theirs - 1 / 3).std() / (ours - ours.mean()).std()
    assert ours * temperature == pytest.approx(theirs, abs=2e-4)
    assert 1e-3 < temperature < 10
    assert figures["penalty"] == 0.05
    assert 0.5 < figures["accuracy"] <= 1
    assert 0 < figures["loss"] < np.log(3)


def test_linear_probe_chooses_the_penalty_and_keeps_pictures_together():
    """Labels of noise alone cannot be predicted; copies of a picture on both sides of a split would hide that."""
    g = torch.Generator().manual_seed(0)
    f, y = torch.randn(64, 60, generator=g), torch.arange(64) % 2
    groups = torch.arange(64).repeat(3)
    *_, honest = fit_linear_probe(f.repeat(3, 1), y.repeat(3), 2, groups=groups)
    *_, leaked = fit_linear_probe(f.repeat(3, 1), y.repeat(3), 2, penalties=[30.0, 1e-3])
    assert honest["accuracy"] < 0.7
    assert leaked["accuracy"] > 0.9
    assert leaked["penalty"] == 1e-3
    with pytest.raises(ValueError, match=r"needs two folds and two pictures, but there are 5 and 1"):
        fit_linear_probe(f, y, 2, groups=torch.zeros(64, dtype=torch.long))


def test_linear_probe_ignores_a_strong_nuisance():
    """What varies within the classes is modelled: two classes 1 apart under a common disturbance of standard deviation 10."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(2000) % 2
    disturbance = 10 * torch.randn(2000, 1, generator=g)
    f = disturbance + torch.stack([y.float(), torch.zeros(2000)], dim=1) + 0.1 * torch.randn(2000, 2, generator=g)
    weight, bias, _ = fit_linear_probe(f[:1000], y[:1000], 2, penalties=[1e-6])
    assert ((f[1000:] @ weight.T + bias).argmax(1) == y[1000:]).float().mean() > 0.99
