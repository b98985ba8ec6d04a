"""Losses of distillation by hand: values, reductions, where gradients go, and every bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from genkit.distill.losses import (
    GAN_KINDS,
    approximate_r1,
    distillation,
    distribution_matching,
    gan_d,
    gan_g,
    r1,
    reconstruction,
)
from genkit.levels import Level

HALF = Level(0.6, 0.8, 0)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Adversarial


@pytest.mark.parametrize(
    ("kind", "d", "g"),
    [
        ("hinge", (0.5 + 0) / 2 + (1.25 + 0) / 2, -(0.25 - 3) / 2),
        ("softplus", sum(math.log1p(math.exp(z)) for z in (-0.5, -2, 0.25, -3)) / 2,
         sum(math.log1p(math.exp(z)) for z in (-0.25, 3)) / 2),
        ("lsgan", (0.25 + 1) / 4 + (0.0625 + 9) / 4, (0.5625 + 16) / 4),
    ],
)  # fmt: skip
def test_values_by_hand(kind, d, g):
    real, fake = torch.tensor([[0.5], [2.0]]), torch.tensor([[0.25], [-3.0]])
    assert float(gan_d(real, fake, kind)) == pytest.approx(d)
    assert float(gan_g(fake, kind)) == pytest.approx(g)


@pytest.mark.parametrize("kind", GAN_KINDS)
def test_heads_count_alike_whatever_their_number_of_positions(kind):
    small, large = torch.randn(3, 2), torch.randn(3, 50)
    both = gan_d([small, large], [large, small], kind)
    each = (gan_d(small, large, kind) + gan_d(large, small, kind)) / 2
    torch.testing.assert_close(both, each)
    torch.testing.assert_close(gan_g([small, large], kind), (gan_g(small, kind) + gan_g(large, kind)) / 2)


def test_the_hinge_keeps_teaching_the_student_where_it_already_wins():
    fake = torch.full((2, 1), 5.0, requires_grad=True)
    gan_g(fake, "hinge").backward()
    assert fake.grad is not None
    assert fake.grad.tolist() == [[-0.5], [-0.5]]


def test_half_precision_logits_are_judged_in_float32():
    logits = torch.full((2, 1), 1.0, dtype=torch.bfloat16)
    assert gan_d(logits, logits).dtype == torch.float32
    assert gan_g(logits, "softplus").dtype == torch.float32


def test_unknown_kinds():
    d = torch.zeros(1)
    with pytest.raises(ValueError, match=r"Unknown adversarial loss 'bce'. Known: hinge, softplus, lsgan"):
        gan_d(d, d, "bce")
    with pytest.raises(ValueError, match=r"Unknown adversarial loss 'hinges'. Did you mean 'hinge'"):
        gan_g(d, "hinges")


# R1


def quadratic(f: torch.Tensor) -> torch.Tensor:
    """Logits (B, 2) whose sum is |f|^2 / 2: the gradient is f itself."""
    return torch.stack([f.flatten(1).square().sum(1) / 8, f.flatten(1).square().sum(1) * 3 / 8], 1)


def test_r1_is_the_squared_gradient_of_a_sample_and_can_be_minimised(x):
    features = [x.detach().requires_grad_()]
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    value = r1([weight * quadratic(features[0])], features)
    assert value.item() == pytest.approx(4 * float(x.flatten(1).square().sum(1).mean()))
    value.backward()
    assert float(weight.grad) == pytest.approx(value.item()), "d(w^2 c)/dw at w = 2"


def test_r1_of_several_heads_is_the_mean_of_theirs(x):
    features = [x.detach().requires_grad_(), (3 * x[:, :1]).detach().requires_grad_()]
    both = r1([quadratic(f) for f in features], features)
    each = [r1(quadratic(f), [f]) for f in features]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_r1_does_not_reach_the_backbone(x):
    backbone, head = nn.Conv2d(3, 2, 1).double(), nn.Conv2d(2, 1, 1).double()
    features = [backbone(x).detach().requires_grad_()]
    r1([head(features[0]).flatten(1)], features).backward()
    assert head.weight.grad is not None
    assert backbone.weight.grad is None


def test_r1_that_would_do_nothing_is_an_error(x):
    leaf = x.detach().requires_grad_()
    with pytest.raises(ValueError, match=r"features\[0\] does not require grad.*detach\(\).requires_grad_\(\)"):
        r1([quadratic(x)], [x])
    with pytest.raises(ValueError, match=r"do not depend on features\[1\]"):
        r1([quadratic(leaf)], [leaf, x.detach().requires_grad_()])
    with pytest.raises(ValueError, match=r"The logits have no graph"), torch.no_grad():
        r1([quadratic(leaf)], [leaf])


def test_approximate_r1_refuses_what_it_cannot_compare(x):
    with pytest.raises(ValueError, match=r"std=0 of the perturbation must be positive"):
        approximate_r1(quadratic(x), quadratic(x), 0)
    with pytest.raises(ValueError, match=r"Logits are \(4, 2\) but perturbed ones \(3, 2\)"):
        approximate_r1(quadratic(x), quadratic(x[1:]), 0.1)


# To the teacher


@pytest.mark.parametrize(("weight", "c"), [("alpha", 0.6), ("sds", 0.24), ("const", 1.0)])
def test_distillation_by_hand(x, weight, c):
    """A teacher that is 1/2 away in each value."""
    assert float(distillation(x, x + 0.5, HALF, weight)) == pytest.approx(c / 4)


def test_distillation_weights_each_sample_by_its_level(x):
    level = Level(torch.tensor([1.0, 0.6, 0.6, 0.0]), torch.tensor([0.0, 0.8, 0.8, 1.0]), torch.zeros(4))
    assert float(distillation(x, x + 1, level)) == pytest.approx((1 + 0.6 + 0.6) / 4)
    assert float(distillation(x, x + 1, level, "const")) == 1


def test_distillation_weights_depend_on_the_signal_to_noise_ratio_alone(x):
    """The level of HALF in the variable of EDM, where alpha is 1, and of flow matching."""
    for weight in ("alpha", "sds"):
        value = float(distillation(x, x + 1, HALF, weight))
        assert float(distillation(x, x + 1, Level(1.0, 0.8 / 0.6, 0), weight)) == pytest.approx(value)
        assert float(distillation(x, x + 1, Level(0.6 / 1.4, 0.8 / 1.4, 0), weight)) == pytest.approx(value)


def test_the_teacher_gets_no_gradient(x):
    student, teacher = x.clone().requires_grad_(), (x + 1).requires_grad_()
    distillation(student, teacher, HALF).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert float(student.grad.abs().sum()) > 0


def test_distillation_refuses_unknown_weights_and_other_shapes(x):
    with pytest.raises(ValueError, match=r"Unknown distillation weight 'nfsd'. Known: alpha, sds, const"):
        distillation(x, x, HALF, "nfsd")
    with pytest.raises(ValueError, match=r"student's x0 is \(4, 3, 2, 2\), but the teacher's is \(2, 3, 2, 2\)"):
        distillation(x, x[:2], HALF)


def test_reconstruction_is_quadratic_near_and_linear_far(x):
    assert float(reconstruction(x, x + 0.5)) == pytest.approx(0.125)
    assert float(reconstruction(x, x + 3)) == pytest.approx(2.5)


def test_distribution_matching_follows_the_difference_of_the_scores(x):
    student, fake, real = x.clone().requires_grad_(), x + 0.2, x - 0.4
    distribution_matching(student, fake, real).backward()
    # g = .6 / mean|.4| in every value
    torch.testing.assert_close(student.grad * x.numel(), torch.full_like(x, 1.5))
