"""Classifier guidance: any classifier, targets, restoration, the paper's presets, bad input."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genkit.classifiers import AttributeClassifier
from genkit.denoisers.analytic import GaussianDenoiser
from genkit.guidance import ClassifierEnergy, ClassifierGuidance, EluCDDDPM, EluCDEDM, from_preset
from genkit.guidance.classifier import resolve_target
from genkit.sampling import sample


def tiny_classifier(classes=4):
    torch.manual_seed(0)
    relu = nn.ReLU()
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), relu, nn.Conv2d(4, 4, 3), relu)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.LazyLinear(classes))


@pytest.fixture
def classifier():
    network = tiny_classifier()
    network(torch.randn(2, 3, 8, 8))
    return network.train()


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def test_classifier_is_left_as_it_was(classifier, images):
    state = {k: v.clone() for k, v in classifier.state_dict().items()}
    modules = list(classifier.modules())
    ClassifierEnergy(classifier, 2, softplus_beta=3.0).gradient(images)
    assert all(torch.equal(v, state[k]) for k, v in classifier.state_dict().items()), "batch statistics moved"
    assert classifier.training
    assert all(p.requires_grad and p.grad is None for p in classifier.parameters())
    assert list(classifier.modules()) == modules


def test_state_is_restored_after_an_exception(classifier, images):
    with pytest.raises(ValueError, match="out of range"):
        ClassifierEnergy(classifier, 9, softplus_beta=3.0)(images)
    assert classifier.training
    assert isinstance(classifier[2], nn.ReLU)


def test_softplus_changes_the_gradient_and_matches_an_explicit_network(classifier, images):
    smooth = nn.Sequential(*[nn.Softplus(3.0) if isinstance(m, nn.ReLU) else m for m in classifier])
    ours = ClassifierEnergy(classifier, 1, softplus_beta=3.0).gradient(images)
    torch.testing.assert_close(ours, ClassifierEnergy(smooth, 1).gradient(images))
    assert not torch.allclose(ours, ClassifierEnergy(classifier, 1).gradient(images))


def test_targets_per_sample_and_batch_split(classifier, images):
    together = ClassifierEnergy(classifier, [0, 1, 2]).gradient(images)
    alone = torch.cat([ClassifierEnergy(classifier, i).gradient(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="2 targets for 3 samples"):
        ClassifierEnergy(classifier, [0, 1])(images)


def test_every_common_kind_of_classifier(images):
    import timm
    import torchvision
    from transformers import ResNetConfig, ResNetForImageClassification

    x = torch.nn.functional.interpolate(images, (32, 32))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5, layer_type="basic")
    networks = [
        (torchvision.models.resnet18(weights=None, num_classes=5), {"preprocess": "imagenet"}),
        (timm.create_model("resnet10t", pretrained=False, num_classes=5), {"size": 64}),
        (ResNetForImageClassification(config), {"preprocess": lambda v: v * 0.5}),
        (AttributeClassifier({"digit": ["a", "b", "c", "d"], "ink": ["x", "y"]}, (8, 16), 1), {"attribute": "ink"}),
    ]
    for network, options in networks:
        gradient = ClassifierEnergy(network, 1, **options).gradient(x)
        assert gradient.shape == x.shape
        assert gradient.abs().sum() > 0


def test_resolve_target():
    embedded = AttributeClassifier({"digit": ["zero", "one"], "ink": ["red", "blue", "green"]}, (8,), 1)
    assert resolve_target(embedded, "one").tolist() == [1]
    assert resolve_target(embedded, "green", "ink").tolist() == [2]
    assert resolve_target(embedded, ["one", "zero"]).tolist() == [1, 0]
    assert resolve_target(embedded, "1").tolist() == [1]
    assert resolve_target(nn.Identity(), torch.tensor([5, 7])).tolist() == [5, 7]
    with pytest.raises(ValueError, match="'two'"):
        resolve_target(embedded, "two")
    with pytest.raises(ValueError, match=r"class 2 is out of range. Use 0 to 1"):
        resolve_target(embedded, 2)
    with pytest.raises(ValueError, match="-1"):
        resolve_target(embedded, -1)
    with pytest.raises(ValueError, match="attribute 'font'"):
        resolve_target(embedded, "one", "font")
    with pytest.raises(ValueError, match="no target"):
        resolve_target(embedded, [])


def test_bad_classifiers(images):
    with pytest.raises(FloatingPointError, match="NaN"):
        ClassifierEnergy(_Returns(torch.full((3, 4), float("nan"))), 0)(images)
    with pytest.raises(ValueError, match=r"got \(3, 4, 2\)"):
        ClassifierEnergy(_Returns(torch.zeros(3, 4, 2)), 0)(images)
    with pytest.raises(ValueError, match="4 classes, 0 to 3"):
        ClassifierEnergy(_Returns(torch.zeros(3, 4)), 4)(images)
    with pytest.raises(ValueError, match="preprocess 'resize'"):
        ClassifierEnergy(nn.Identity(), 0, preprocess="resize")
    with pytest.raises(ValueError, match="softplus_beta=-1"):
        ClassifierEnergy(nn.Identity(), 0, softplus_beta=-1)
    with pytest.raises(ValueError, match="preset 'adm'"):
        from_preset("adm", nn.Identity(), 0)


class _Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def test_sine_schedule(classifier):
    guidance = ClassifierGuidance(classifier, 0, gamma=0.5)
    weights = [guidance.weight(SimpleNamespace(progress=p)) for p in (0.0, 0.5, 1.0)]
    assert weights == pytest.approx([1.0, 1.5, 1.0])


def test_ddpm_preset_displaces_after_the_step(classifier):
    """x_guided - x_plain after the first step is (Sigma + a_t) grad U, with Sigma the posterior variance."""
    from diffusers import DDPMScheduler

    classifier.eval()
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    denoiser = GaussianDenoiser(torch.zeros(3, 8, 8), 0.5)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    energy = ClassifierEnergy(classifier, 1, tau2=0.5)
    steps = {}

    def run(guidance):
        states = []

        def on_step(state, prediction, x_next):
            states.append((state.x, prediction, x_next, state.level, state.levels))

        sample(denoiser, scheduler, x, guidance=guidance, generator=torch.Generator().manual_seed(3), on_step=on_step)
        steps["states"] = states
        return states[0][2]

    moved = run(EluCDDDPM(energy, scale=2.0, gamma=0.3)) - run(None)
    _, prediction, _, level, levels = steps["states"][0]
    abar, abar_next = level.alpha**2, levels[1].alpha ** 2
    variance = (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    a = 0.3 * variance * math.sin(math.pi * 9 / 10)
    expected = 2.0 * (variance + a) * energy.gradient(prediction.x0.clamp(-1, 1).float())
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_ddpm_preset_refuses_other_samplers(classifier):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="DDIMScheduler"):
        sample(
            GaussianDenoiser(torch.zeros(3, 8, 8), 0.5), scheduler, torch.randn(1, 3, 8, 8),
            guidance=EluCDDDPM(ClassifierEnergy(classifier, 0)),
        )  # fmt: skip


def test_edm_preset_strengths():
    """The list of spec values for N = 10, m = 0.004, gamma = 0.3, and the sums that grow with N."""
    preset = EluCDEDM(energy=None, m=0.004, gamma=0.3)
    expected = [4.000, 4.007, 3.978, 3.880, 3.687, 3.382, 2.959, 2.425, 1.796, 1.098]
    assert [1e3 * preset.strength(i, 10) for i in range(10)] == pytest.approx(expected, abs=5e-4)
    sums = {n: sum(preset.strength(i, n) for i in range(n)) for n in (10, 18, 36)}
    assert sums == pytest.approx({10: 0.031213, 18: 0.053506, 36: 0.103376}, abs=5e-7)
