"""Discriminator guidance: T2 and T3 of the guidance spec with the real class, the networks, and every refusal."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm, qmc
from torch import nn

from genkit.denoisers import Cond
from genkit.denoisers.analytic import GaussianDenoiser
from genkit.guidance import DiscriminatorGuidance, NoisyClassifier, NoisyClassifierGuidance, State, load_noisy_classifier
from genkit.guidance.discriminator import ADM, Boosting, Discriminator, bce, load_discriminator, matching_loss
from genkit.guidance.networks import SIGMA_MAX, SIGMA_MIN, random_levels
from genkit.guidance.origin import origin, require_same
from genkit.levels import Level
from genkit.pipelines import GuidedPipeline
from genkit.sampling import sample
from tests import oracles, tiny
from tests.genkit.test_closed_form import PRINTED, edm_heun

HEAD = {"block_out_channels": (8,), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 4}


class ExactRatio(nn.Module):
    """The optimal discriminator of setting G."""

    calls = 0

    def forward(self, x, level, cond=None):
        self.calls += 1
        real, model = (oracles.gaussian_log_density(x, level.alpha, level.sigma, *g) for g in (oracles.REAL, oracles.MODEL))
        return (real - model).flatten(1).sum(1)


def guided(n, **arguments):
    guidance = DiscriminatorGuidance(ExactRatio(), **{"window": (0.0, math.inf), **arguments})
    denoiser = GaussianDenoiser(*oracles.MODEL)
    return oracles.affine(lambda x: sample(denoiser, edm_heun(n), x, guidance=guidance), 80.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"reuse": False}, {18: (0.993405, 0.527625), 36: (0.993674, 0.506097)}),
        ({"weights": (2.0, 0.0), "reuse": False}, {18: (0.905708, 0.588050), 36: (0.958386, 0.533793)}),
        ({"weights": (1.0, 0.0), "reuse": False}, {18: (0.764829, 0.704667), 36: (0.799340, 0.658415)}),
        ({}, {18: (0.971028, 0.557675), 36: (0.985599, 0.519091)}),
        ({"reuse": False, "window": (oracles.sigma_of_tau(0.01), math.inf)}, {18: (0.992963, 0.528508), 36: (0.993049, 0.507299)}),
    ],
    ids=["1-1", "2-0", "1-0", "reuse", "window"],
)
def test_t2_heun(arguments, expected):
    for n, numbers in expected.items():
        assert guided(n, **arguments) == pytest.approx(numbers, abs=PRINTED)


def test_paper_preset_is_2_0_and_reuse_costs_one_evaluation_a_step():
    exact, paper = ExactRatio(), ExactRatio()
    x = torch.zeros(1, 1, dtype=torch.float64)
    sample(GaussianDenoiser(*oracles.MODEL), edm_heun(18), x, guidance=DiscriminatorGuidance(exact, window=(0.0, math.inf)))
    guidance = DiscriminatorGuidance.from_preset("paper", paper)
    assert guidance.weights == (2.0, 0.0)
    sample(GaussianDenoiser(*oracles.MODEL), edm_heun(18), x, guidance=guidance)
    assert exact.calls == 18
    assert paper.calls == 15  # indices 0 to 14 of 17 lie in the paper's window


def test_clipped_sigmoid_has_no_gradient_where_it_saturates():
    state = State(torch.tensor([[0.5], [40.0]], dtype=torch.float64), Level(1.0, 0.1, 0.0), [Level(1.0, 0.1, 0.0)])
    raw, clipped = (
        DiscriminatorGuidance(ExactRatio(), clip=clip).shift(state, GaussianDenoiser(*oracles.MODEL)(state.x, state.level))
        for clip in (None, 1e-5)
    )
    torch.testing.assert_close(raw[0], clipped[0])
    assert clipped[1] == 0
    assert raw[1] != 0


def test_boosting_doubles_the_weight_of_samples_taken_for_generated():
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # log-ratio above and below 0
    levels = [Level(1.0, 0.5, 0.0, index) for index in range(2)]
    prediction = GaussianDenoiser(*oracles.MODEL)(x, levels[0])
    for level, factor in zip(levels, (2, 1), strict=True):  # of two steps the first is boosted
        state = State(x, level, levels)
        plain, boosted = (
            DiscriminatorGuidance(ExactRatio(), boosting=boosting).shift(state, prediction) for boosting in (None, Boosting())
        )
        torch.testing.assert_close(boosted, plain * torch.tensor([[1.0], [factor]]), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="period 0"):
        Boosting(period=0)


# T3: training


def gaussians(count, sigma):
    """`count` noisy real and generated samples of setting G (count, 1), quasi-random."""
    u = qmc.Sobol(2, seed=0).random(count)
    z = torch.from_numpy(norm.ppf(u.clip(1e-9, 1 - 1e-9)))
    return [(mean + math.hypot(std, sigma) * z[:, i])[:, None] for i, (mean, std) in enumerate((oracles.REAL, oracles.MODEL))]


class Quadratic(nn.Module):
    """L = a x^2 + b x + c."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1).double()

    def forward(self, x, level, cond=None):
        return self.linear(torch.cat([x**2, x], 1))[:, 0]


@pytest.mark.parametrize(
    ("sigma", "coefficients", "bayes"),
    [
        (0.1, (-1.153846, 2.923077, -1.188008), 0.611960),
        (0.5, (-0.438202, 1.325843, -0.509446), 0.647992),
        (1.0, (-0.095122, 0.434146, -0.154468), 0.675282),
    ],
)
def test_t3_training_recovers_the_log_density_ratio(sigma, coefficients, bayes):
    torch.manual_seed(0)
    model, (real, fake) = Quadratic(), gaussians(2**16, sigma)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = bce(model, real, fake, Level(1.0, sigma, 0.0))
        loss.backward()
        return loss

    optimizer.step(closure)
    a, b, c = *model.linear.weight[0].tolist(), model.linear.bias.item()
    assert (a, b, c) == pytest.approx(coefficients, rel=0.05)
    assert bce(model, real, fake, Level(1.0, sigma, 0.0)).item() == pytest.approx(bayes, abs=0.005)


def test_t3_the_network_reaches_the_bayes_loss(tmp_path):
    """The real network, the real loss and loop, at every noise level."""
    from genkit.training import TrainConfig, fit

    torch.manual_seed(0)
    head = {"block_out_channels": (16,), "layers_per_block": 1, "attention_head_dim": 16, "norm_num_groups": 1}
    model = Discriminator((1, 1, 1), head)

    def loss(model, generator, step):
        level = random_levels(256, generator, 0.05, 5.0)
        x0 = [mean + std * torch.randn(256, 1, 1, 1, generator=generator) for mean, std in (oracles.REAL, oracles.MODEL)]
        real, fake = (level.diffuse(x, torch.randn(x.shape, generator=generator)) for x in x0)
        return bce(model, real, fake, level)

    config = TrainConfig(steps=500, batch_size=256, lr=3e-3, warmup=20, ema_decay=0.99, bf16=False)
    trained = fit(model, loss, config, tmp_path, name="test")
    for sigma, bayes in ((0.1, 0.611960), (0.5, 0.647992), (1.0, 0.675282)):
        real, fake = (x[:, :, None, None].float() for x in gaussians(2**12, sigma))
        with torch.no_grad():
            assert bce(trained, real, fake, Level(1.0, sigma, 0.0)).item() == pytest.approx(bayes, abs=0.005)


def test_levels_are_log_uniform():
    ratio = random_levels(200_000, torch.Generator().manual_seed(0)).sigma
    expected = {0.1: 0.0032993, 0.25: 0.019758, 0.5: 0.390183, 0.75: 7.70538, 0.9: 46.1434}
    for u, sigma in expected.items():
        assert ratio.quantile(u).item() == pytest.approx(sigma, rel=0.05)
    assert ratio.min() >= SIGMA_MIN
    assert ratio.max() <= SIGMA_MAX


# Networks


@pytest.mark.parametrize(
    ("name", "extractor", "head"), [("pixels 32", 46.4, 2.88), ("pixels 64", 64.1, 2.88), ("latents 32", 20.0, 3.25)]
)
def test_adm_sizes(name, extractor, head):
    """Millions of parameters, as the spec counts the released networks."""
    with torch.device("meta"):
        model = Discriminator(**ADM[name])
    assert sum(p.numel() for p in model.extractor.parameters()) / 1e6 == pytest.approx(extractor, rel=0.01)
    assert sum(p.numel() for p in [*model.head.parameters(), *model.pool.parameters()]) / 1e6 == pytest.approx(head, rel=0.01)
    assert not any(p.requires_grad for p in model.extractor.parameters())


def test_the_same_sample_in_any_schedulers_variable_gets_the_same_logit():
    torch.manual_seed(0)
    model = Discriminator((2, 8, 8), HEAD, extractor_config=HEAD).eval()
    x0, eps = torch.randn(2, 3, 2, 8, 8)
    levels = [Level(1.0, 0.5, 0), Level(2 / 5**0.5, 1 / 5**0.5, 0), Level(2 / 3, 1 / 3, 0)]
    logits = [model(level.diffuse(x0, eps), level) for level in levels]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("condition", "values"),
    [
        ({"name": "class_labels", "num_classes": 5}, torch.tensor([1, 4])),
        ({"name": "prompt_embeds", "channels": 6}, torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))),
    ],
)
def test_conditional_discriminators(condition, values):
    torch.manual_seed(0)
    model = Discriminator((2, 8, 8), HEAD, condition=condition).eval()
    x, level = torch.randn(1, 2, 8, 8).repeat(2, 1, 1, 1), Level(0.8, 0.6, 0)
    logits = model(x, level, Cond({condition["name"]: values}))
    assert (logits[0] - logits[1]).abs() > 1e-6
    if values.is_floating_point():  # training keeps means of tokens only
        torch.testing.assert_close(model(x, level, Cond({condition["name"]: values.mean(1)})), logits)
        with pytest.raises(ValueError, match="width 6, but here they have 7"):
            model(x, level, Cond({"prompt_embeds": torch.zeros(2, 3, 7)}))
    with pytest.raises(ValueError, match=f"conditional on '{condition['name']}', but the condition of this run has nothing"):
        model(x, level)


def test_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    record = origin(tiny.pipeline("stable_diffusion"))
    model = Discriminator((4, 8, 8), HEAD, extractor_config=HEAD, trained_on=record).eval()
    model.save_pretrained(tmp_path / "d")
    loaded = load_discriminator(tmp_path / "d")
    x, level = torch.randn(2, 4, 8, 8), Level(1.0, 0.5, 0)
    torch.testing.assert_close(loaded(x, level), model(x, level))
    assert loaded.config.trained_on["network"] == record["network"]
    classifier = NoisyClassifier({"digit": ["a", "b"]}, (4, 8, 8), HEAD)
    classifier.save_pretrained(tmp_path / "c")
    with pytest.raises(ValueError, match="NoisyClassifier, which is no discriminator"):
        load_discriminator(tmp_path / "c")


# In pipelines


def test_is_refused_in_another_model_schedule_or_latent_space():
    pipe = tiny.pipeline("stable_diffusion")
    record = origin(pipe)
    require_same(record, pipe, "discriminator")
    require_same(None, pipe, "discriminator")
    other = tiny.pipeline("stable_diffusion", seed=1)
    with pytest.raises(ValueError, match=r"trained on '.*', but this pipeline is '.*', which has another model"):
        require_same(record, other, "discriminator")
    other.unet = pipe.unet
    with pytest.raises(ValueError, match="another latent space"):
        require_same(record, other, "discriminator")
    other.vae = pipe.vae
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.02)
    with pytest.raises(ValueError, match="another noise schedule"):
        require_same(record, other, "discriminator")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_record_does_not_depend_on_precision(dtype):
    pipe = tiny.pipeline("stable_diffusion")
    record = origin(pipe)
    require_same(record, pipe.to(dtype), "discriminator")


def test_pipeline_checks_before_it_runs():
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    shape = pipe.denoiser.latent_shape(None, None)
    stranger = Discriminator(shape, HEAD, trained_on=origin(tiny.pipeline("stable_diffusion", seed=1)))
    for guidance in (DiscriminatorGuidance(stranger), 0.5 * DiscriminatorGuidance(stranger).between(0, 0.5)):
        with pytest.raises(ValueError, match="another model"):
            pipe("a", guidance=guidance, num_inference_steps=2)
    small = Discriminator((3, 8, 8), HEAD)
    with pytest.raises(ValueError, match=r"trained on samples \(3, 8, 8\), but these are"):
        pipe("a", guidance=DiscriminatorGuidance(small), num_inference_steps=2)


def test_weight_0_is_free_and_bit_identical():
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    model = Discriminator(pipe.denoiser.latent_shape(None, None), HEAD)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    arguments = {"seeds": [1, 2], "num_inference_steps": 3, "output_type": "latent"}
    plain = pipe("a", **arguments).images
    for guidance in (DiscriminatorGuidance(model, 0.0), DiscriminatorGuidance(model, weights=(0.0, 0.0))):
        assert torch.equal(pipe("a", guidance=guidance, **arguments).images, plain)
    assert not calls
    assert not torch.equal(pipe("a", guidance=DiscriminatorGuidance(model), **arguments).images, plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": (1.0,)}, "two finite numbers"),
        ({"weights": (0.0, 1.0)}, "nothing to reuse"),
        ({"window": (2.0, 1.0)}, "no interval"),
        ({"clip": 0.7}, "clip=0.7"),
        ({"scale": math.nan}, "not finite"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorGuidance(ExactRatio(), **arguments)
    with pytest.raises(ValueError, match="Unknown preset 'papre'"):
        DiscriminatorGuidance.from_preset("papre", ExactRatio())


# The noisy classifier


class ExactClassifier(nn.Module):
    """p(+ | x) of the mixture N(+-1, .5^2) at a level."""

    def forward(self, x, level):
        densities = [oracles.gaussian_log_density(x, level.alpha, level.sigma, mean, 0.5).flatten(1).sum(1) for mean in (-1.0, 1.0)]
        return torch.stack(densities, 1)


@pytest.mark.parametrize(("sigma", "x", "expected"), [(1.0, 0.0, 0.8), (1.0, 0.7, 0.393618), (2.0, -1.3, 0.305103)])
def test_t6_exact_gradient(sigma, x, expected):
    level = Level(1.0, sigma, 0)
    state = State(torch.tensor([[x]], dtype=torch.float64), level, [level])
    shift = NoisyClassifierGuidance(ExactClassifier(), 1).shift(state, GaussianDenoiser(0.0, 1.0)(state.x, level))
    assert shift.item() == pytest.approx(expected, abs=PRINTED)


def test_noisy_classifier_refuses():
    model = NoisyClassifier({"digit": ["zero", "one"]}, (4, 8, 8), HEAD)
    with pytest.raises(ValueError, match="no class named 'two'"):
        NoisyClassifierGuidance(model, "two")
    level = Level(1.0, 1.0, 0)
    state = State(torch.zeros(1, 3, 8, 8), level, [level])
    with pytest.raises(ValueError, match=r"trained on samples \(4, 8, 8\), but these are \(3, 8, 8\)"):
        NoisyClassifierGuidance(model, "one").shift(state, GaussianDenoiser(0.0, 1.0)(state.x, level))
    state = State(torch.zeros(3, 4, 8, 8), level, [level])
    with pytest.raises(ValueError, match="2 targets for 3 samples"):
        NoisyClassifierGuidance(model, ["one", "zero"]).shift(state, GaussianDenoiser(0.0, 1.0)(state.x, level))


def test_energies_on_one_trunk_evaluate_it_once(tmp_path):
    """A discriminator and a noisy classifier that were saved apart, with the same trunk in them."""
    torch.manual_seed(0)
    pipe = GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion"))
    shape = pipe.denoiser.latent_shape(None, None)
    classifier = NoisyClassifier({"digit": ["zero", "one"]}, shape, HEAD)
    discriminator = Discriminator(shape, HEAD, extractor_config=HEAD)
    discriminator.extractor.load_state_dict(classifier.trunk.state_dict())
    for name, model in (("c", classifier), ("d", discriminator)):
        model.save_pretrained(tmp_path / name)
    classifier, discriminator = load_noisy_classifier(tmp_path / "c"), load_discriminator(tmp_path / "d")
    assert classifier.trunk is discriminator.extractor
    calls = []
    hook = classifier.trunk.register_forward_hook(lambda *_: calls.append(1))
    parts = NoisyClassifierGuidance(classifier, "one"), DiscriminatorGuidance(discriminator, window=(0.0, math.inf))
    arguments = {"seeds": [1, 2], "num_inference_steps": 3, "output_type": "latent"}
    both = pipe("a", guidance=parts[0] + parts[1], **arguments).images
    assert len(calls) == len(pipe.scheduler.timesteps)
    hook.remove()
    apart = pipe("a", guidance=parts[1] + parts[0], **arguments).images
    torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-5)


# Matching: what goes with which condition


def test_matching_loss_finds_the_pointwise_mutual_information():
    joint = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.20, 0.05], [0.02, 0.08, 0.20]])
    expected = (joint / (joint.sum(1, keepdim=True) * joint.sum(0))).log()
    table = torch.zeros(3, 3, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        pairs = torch.multinomial(joint.flatten(), 256, replacement=True, generator=generator)
        x, c = pairs // 3, pairs % 3
        optimizer.zero_grad()
        matching_loss(table[x][:, c]).backward()
        optimizer.step()
    torch.testing.assert_close(table.detach(), expected, rtol=0, atol=0.12)


def test_matching_holds_samples_to_their_condition():
    torch.manual_seed(0)
    condition = {"name": "class_labels", "num_classes": 3}
    model = Discriminator((2, 8, 8), HEAD, extractor_config=HEAD, condition=condition, classes=[3]).eval()
    x, level, cond = torch.randn(2, 2, 8, 8), Level(1.0, 0.5, 0.0), Cond({"class_labels": torch.tensor([0, 2])})
    pairs = model.matching_pairs(x, level, cond)
    assert pairs.shape == (2, 2)
    torch.testing.assert_close(model.matching(x, level, cond), pairs.diagonal())
    state = State(x, level, [level], cond)
    prediction = GaussianDenoiser(0.0, 1.0)(x, level)
    plain, held, more = (DiscriminatorGuidance(model, matching=kappa).shift(state, prediction) for kappa in (0.0, 1.0, 2.0))
    torch.testing.assert_close(more - held, held - plain, rtol=1e-4, atol=1e-6)  # U = L + kappa m
    assert (held - plain).abs().max() > 1e-6
    assert DiscriminatorGuidance(model).matching == 0.5
    assert DiscriminatorGuidance.from_preset("paper", model).matching == 0
    ignorant = Discriminator((2, 8, 8), HEAD, condition=condition)
    with pytest.raises(ValueError, match="knows nothing of conditions"):
        ignorant.matching(x, level, cond)
    with pytest.raises(ValueError, match=r"matching=1\.0 must be finite, and 0 for a discriminator that knows no conditions"):
        DiscriminatorGuidance(ignorant, matching=1.0)
