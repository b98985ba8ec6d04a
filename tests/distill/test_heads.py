"""Heads: sizes, shapes, conditions, and what samples of one batch tell each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genkit.distill.heads import HEADS, ConvHead, MLPHead, StyleGANTHead


def size(head: nn.Module) -> int:
    return sum(p.numel() for p in head.parameters())


def build(kind: str, channels: int, cond_dim: int) -> nn.Module:
    torch.manual_seed(0)
    return HEADS[kind](channels, cond_dim)


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.randn(9, 16, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cond() -> torch.Tensor:
    return torch.randn(9, 5, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("channels", "cond_dim", "millions"), [(384, 768, 1.55), (2240, 0, 50.2), (1152, 0, 13.3)], ids=["ViT-S", "Sana-2240", "DiT-XL"]
)
def test_the_stylegan_t_head_has_the_published_number_of_parameters(channels, cond_dim, millions):
    with torch.device("meta"):
        head = StyleGANTHead(channels, cond_dim)
    assert size(head) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_the_bottleneck_keeps_the_default_head_small():
    with torch.device("meta"):
        assert size(ConvHead(2240, 0)) < 1.2e6
        assert size(ConvHead(2240, 768)) < 1.4e6
        assert size(ConvHead(3072, 768)) < 1.6e6, "of Flux; the StyleGAN-T head has 94 million"


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("cond_dim", [0, 5])
def test_a_logit_for_each_position(kind, cond_dim, maps, cond):
    """A batch of 9 is no multiple of the 8 samples that share statistics."""
    head = build(kind, 16, cond_dim)
    logits = head(maps, cond[:, :cond_dim])
    assert logits.shape == (9, 24)
    logits.square().mean().backward()
    assert all(float(p.grad.abs().sum()) > 0 for name, p in head.named_parameters() if "bias" not in name)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (64, 2)])
def test_the_default_head_takes_maps_of_any_aspect(shape, cond):
    assert build("conv2d", 8, 5)(torch.randn(1, 8, *shape), cond[:1]).shape == (1, shape[0] * shape[1])


def test_the_stylegan_t_head_refuses_maps_that_it_cannot_pad(cond):
    head = build("stylegan-t", 8, 5)
    assert head(torch.randn(2, 8, 2, 2), cond[:2]).shape == (2, 4)
    with pytest.raises(ValueError, match=r"needs 4 positions or more, not \(1, 3\). Use the conv2d head"):
        head(torch.randn(2, 8, 1, 3), cond[:2])


@pytest.mark.parametrize("kind", HEADS)
def test_the_condition_matters(kind, maps, cond):
    head = build(kind, 16, 5).eval()
    assert not torch.allclose(head(maps, cond), head(maps, cond.roll(1, 0)), atol=1e-3)


def test_the_mlp_head_sees_a_position_on_its_own(maps, cond):
    head = build("mlp", 16, 5).eval()
    everywhere = head(maps, cond)
    torch.testing.assert_close(everywhere[:, 2 * 6 + 3], head(maps[:, :, 2:3, 3:4], cond)[:, 0])


def test_the_default_head_sees_where_things_are(maps, cond):
    """Position i of the logits looks at the 3 x 3 positions around it, not along the raster."""
    head = build("conv2d", 16, 5).eval()
    x = maps.clone().requires_grad_()
    # Without the normalisation, which sees the whole map.
    for block in head.blocks:
        block.norm = nn.Identity()
    head.norm_out = nn.Identity()
    head(x, cond)[0, 2 * 6 + 3].backward()
    seen = x.grad[0].abs().sum(0) > 0
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(seen, expected)


# One batch for real and generated samples


def apart_and_together(kind: str, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 4 generated samples alone, and in a batch with 4 real ones of another mean."""
    head = build(kind, 16, 5).eval()
    real, fake = 2 + torch.randn(4, 16, 4, 4), torch.randn(4, 16, 4, 4)
    with torch.no_grad():
        return head(fake, cond[4:8]), head(torch.cat([real, fake]), cond[:8])[4:]


def test_group_normalisation_leaves_samples_alone(cond):
    apart, together = apart_and_together("conv2d", cond)
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)


def test_local_batch_normalisation_leaks(cond):
    """Which is why real and generated samples are split before the heads."""
    apart, together = apart_and_together("stylegan-t", cond)
    assert float((apart - together).abs().mean() / apart.abs().mean()) > 0.2


def test_local_batch_normalisation_goes_by_groups_of_at_most_eight(maps, cond):
    """12 samples are two groups of 6, and 9 a group of 5 and one of 4; evaluation does as training does."""
    head = build("stylegan-t", 16, 5).eval()
    twelve, conds = torch.cat([maps, maps[:3] + 1]), torch.cat([cond, cond[:3]])
    torch.testing.assert_close(head(twelve, conds)[:6], head(twelve[:6], conds[:6]))
    torch.testing.assert_close(head(maps, cond)[5:], head(maps[5:], cond[5:]))
    assert not torch.allclose(head(maps, cond)[:4], head(maps[:4], cond[:4]), atol=1e-3)


# Spectral normalisation


def steepest(weight: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.flatten(1), 2))


@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize(("kind", "count"), [(ConvHead, 5), (MLPHead, 3)])
def test_spectral_normalisation_bounds_every_layer(kind, count, spectral, maps, cond):
    torch.manual_seed(0)
    head = kind(16, 5, width=8, spectral=spectral)
    layers = [m for m in head.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == count
    with torch.no_grad():
        for layer in layers:
            original = layer.parametrizations.weight.original if spectral else layer.weight
            original.mul_(30)
        for _ in range(100):  # the power iteration goes one step each time
            head(maps, cond)
    norms = [steepest(layer.weight.detach()) for layer in layers]
    assert (max(norms) < 1.01) == spectral


def test_widths_and_depths_that_do_not_fit():
    for width in (0, 12):
        with pytest.raises(ValueError, match=rf"width={width} must be a positive multiple of 8"):
            ConvHead(16, 0, width=width)
    with pytest.raises(ValueError, match=r"depth=-1 not negative"):
        ConvHead(16, 0, depth=-1)
