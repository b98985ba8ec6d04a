"""Levels of students and noise of discriminators: text forms, frequencies, and every bad input."""

from __future__ import annotations

import pytest
import torch

from genkit.distill.samplers import AtanLogNormal, LevelSampler, LogitNormal, NoiseSampler, Shifted, Uniform

LEVELS = "1,.75,.5,.25"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Levels


def test_levels_in_words():
    sampler = LevelSampler.parse(LEVELS, "warmup:500:0,0,.5,.5;.7,.1,.1,.1")
    assert sampler.levels == (1.0, 0.75, 0.5, 0.25)
    assert sampler.probabilities(0) == (0, 0, 0.5, 0.5)
    assert sampler.probabilities(499) == (0, 0, 0.5, 0.5)
    assert sampler.probabilities(500) == pytest.approx((0.7, 0.1, 0.1, 0.1))
    assert LevelSampler.parse(LEVELS).probabilities(0) == (0.25,) * 4
    assert LevelSampler.parse("1,.5", "3,1").probabilities(7) == (0.75, 0.25)


def test_draws_are_levels_in_the_numbers_that_probabilities_say():
    sampler = LevelSampler.parse(LEVELS, "warmup:10:0,0,.5,.5;.7,.1,.1,.1")
    drawn = sampler.draw(40, 10, generator())
    assert drawn.dtype == torch.float64
    assert [int((drawn == u).sum()) for u in sampler.levels] == [28, 4, 4, 4]
    assert sorted(set(sampler.draw(40, 9, generator()).tolist())) == [0.25, 0.5]
    assert not torch.equal(drawn, drawn.sort(descending=True).values), "in random order"


def test_a_level_without_probability_is_never_drawn():
    last, first = LevelSampler((1.0, 0.5), (1, 0)), LevelSampler((1.0, 0.5), (0, 1))
    assert last.draw(10_000, 0, generator()).unique().tolist() == [1.0]
    assert first.draw(10_000, 0, generator()).unique().tolist() == [0.5]


def test_draws_depend_on_the_generator_alone():
    sampler = LevelSampler.parse(LEVELS)
    assert torch.equal(sampler.draw(64, 3, generator(1)), sampler.draw(64, 3, generator(1)))
    assert not torch.equal(sampler.draw(64, 3, generator(1)), sampler.draw(64, 3, generator(2)))


@pytest.mark.parametrize(
    ("levels", "probs", "message"),
    [
        ("1,0", None, r"Levels 1,0: each must be above 0 and at most 1"),
        ("1.5,1", None, r"Levels 1.5,1: each must be above 0 and at most 1"),
        ("nan", None, r"Levels nan: each must be above 0"),
        ("1,.5,.75", None, r"Levels 1,0.5,0.75 are not descending"),
        ("1,1", None, r"Levels 1,1 are not descending"),
        (".75,.5", None, r"Levels 0.75,0.5 do not start at 1. Sampling starts at pure noise"),
        ("1,half", None, r"The levels '1,half' are no numbers with commas"),
        ("1,.5", "1,1,1", r"Probabilities 1,1,1: there are 3 for 2 levels"),
        ("1,.5", "-1,2", r"Probabilities -1,2: none may be negative"),
        ("1,.5", "0,0", r"Probabilities 0,0: none may be negative, and their sum must be positive"),
        ("1,.5", "nan,1", r"Probabilities nan,1: none may be negative"),
        ("1,.5", "warmup:5:0,0;1,1", r"Warm-up probabilities 0,0"),
        ("1,.5", "warmup:5:1,1", r"'warmup:5:1,1' are not of the form warmup:STEPS"),
        ("1,.5", "warmup:x:1,1;1,1", r"are not of the form warmup:STEPS"),
        ("1,.5", "warmup:0:1,1;1,1", r"warmup_steps=0 with warmup_probs=\(1.0, 1.0\): give a positive length"),
        ("1,.5", "a,b", r"The level probabilities 'a,b' are no numbers"),
    ],
)
def test_bad_levels(levels, probs, message):
    with pytest.raises(ValueError, match=message):
        LevelSampler.parse(levels, probs)


def test_no_levels_and_a_warmup_without_probabilities():
    with pytest.raises(ValueError, match=r"Levels \(none\): .* there must be at least one"):
        LevelSampler(())
    with pytest.raises(ValueError, match=r"warmup_steps=3 with warmup_probs=None"):
        LevelSampler((1.0,), warmup_steps=3)


# Noise


@pytest.mark.parametrize(
    ("text", "sampler"),
    [
        ("logit-normal", LogitNormal(1, 1)), ("logit-normal:0", LogitNormal(0, 1)), ("logit-normal:-1,.5", LogitNormal(-1, 0.5)),
        ("uniform", Uniform(0, 1)), ("uniform:0,.75", Uniform(0, 0.75)), ("shifted:2", Shifted(2)), ("shifted", Shifted(3)),
        ("atan-lognormal", AtanLogNormal(-0.6, 1)), ("atan-lognormal:.2,1.6", AtanLogNormal(0.2, 1.6)),
    ],
)  # fmt: skip
def test_noise_in_words(text, sampler):
    assert NoiseSampler.parse(text) == sampler


@pytest.mark.parametrize("sampler", [LogitNormal(), Uniform(0.1, 0.75), Shifted(), AtanLogNormal()], ids=lambda s: type(s).__name__)
def test_quantiles_invert_the_distribution_function(sampler):
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    torch.testing.assert_close(sampler.cdf(sampler.quantile(p)), p, rtol=0, atol=1e-12)


def test_known_medians():
    """LADD's is at sigma(1) = .73, SANA-Sprint's at .52, a shift of 3 takes one half to three quarters."""
    half = torch.tensor(0.5, dtype=torch.float64)
    assert float(LogitNormal().quantile(half)) == pytest.approx(0.731, abs=5e-4)
    assert float(AtanLogNormal().quantile(half)) == pytest.approx(0.523, abs=5e-4)
    assert float(Shifted().quantile(half)) == pytest.approx(0.75)


def test_draws_stay_inside():
    for text in ("logit-normal:30,9", "uniform", "shifted:1e6", "atan-lognormal:20,9"):
        u = NoiseSampler.parse(text).draw(20_000, generator())
        assert u.dtype == torch.float64
        assert float(u.min()) > 0
        assert float(u.max()) < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logitnormal:1,1", r"Unknown noise distribution 'logitnormal'. Did you mean 'logit-normal'\?"),
        ("logit-normal:1,0", r"logit-normal:1,0: .* standard deviation positive"),
        ("logit-normal:nan,1", r"logit-normal:nan,1: the mean must be finite"),
        ("atan-lognormal:0,-1", r"atan-lognormal:0,-1"),
        ("uniform:.5,.5", r"uniform:0.5,0.5 is no interval between 0 and 1"),
        ("uniform:0,2", r"uniform:0,2 is no interval"),
        ("shifted:0", r"shifted:0: the shift must be positive"),
        ("shifted:1,2", r"'shifted:1,2' has 2 numbers, but shifted takes shift"),
        ("uniform:a", r"The uniform 'a' are no numbers"),
    ],
)
def test_bad_noise(text, message):
    with pytest.raises(ValueError, match=message):
        NoiseSampler.parse(text)
