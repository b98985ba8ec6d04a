"""The two algorithms of EluCD (Ma et al., ICLR 2024, arXiv 2310.11311) as their code has them, and presets by name.

Both move the sample rather than the score, so they only make sense on the sampler that they were made for: `EluCDDDPM` after
the steps of ancestral DDPM, `EluCDEDM` before the denoiser of an EDM sampler. `ClassifierGuidance` is the sampler-independent form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from genkit.guidance.base import Guidance, State, differentiate
from genkit.guidance.classifier import ClassifierEnergy, ClassifierGuidance, Target
from genkit.prediction import Prediction


class EluCDDDPM(Guidance):
    """EluCD on ancestral DDPM: after the step, x += scale (Sigma + a_t) grad U at the clamped, detached x0.

    a_t = gamma Sigma_max sin(pi t / T), T the number of steps and t counted from the data; Sigma is the variance of the step
    (learned where the model has one), Sigma_max its largest value. Defaults are the paper's for ImageNet-128: scale 1, softplus
    beta 3, tau2 = 0.5, gamma 0.3.

    Raises:
        ValueError: at the first step, if the scheduler is no ancestral DDPM.
    """

    name = "classifier-ddpm"

    def __init__(self, energy: ClassifierEnergy, scale: float = 1.0, gamma: float = 0.3) -> None:
        self.energy, self.scale, self.gamma = energy, scale, gamma

    def active(self, state: State) -> bool:
        return self.scale != 0

    def shift(self, state: State, prediction: Prediction) -> None:
        # The clamp of pixels comes before the graph: inside it, saturated pixels would get no gradient.
        x0 = prediction.x0.clamp(-1, 1) if state.codec is None else prediction.x0
        value, gradient = differentiate(lambda z: self.energy(state.decode(z)), x0)
        state.log[self.name] = value
        state.cache[self, "gradient"] = gradient
        state.cache[self, "variance"] = prediction.variance

    def after(self, state: State, x_next: Tensor) -> Tensor:
        if not self.active(state):
            return x_next
        gradient, learned = state.cache.pop((self, "gradient")), state.cache.pop((self, "variance"))
        sigma = _step_variance(state, learned)
        steps = len(state.levels)
        # The largest variance of a run is that of its first (noisiest) step.
        largest = state.cache.setdefault((self, "largest"), sigma if isinstance(sigma, float) else float(sigma.max()))
        a = max(0.0, self.gamma * largest * math.sin(math.pi * (steps - 1 - state.level.index) / steps))
        return x_next + self.scale * (sigma + a) * gradient


def _step_variance(state: State, learned: Tensor | None) -> float | Tensor:
    """Variance of the ancestral step from `state.level` to the next: beta~ or the learned interpolation."""
    scheduler = state.scheduler
    if "variance_type" not in scheduler.config:
        raise ValueError(
            f"Preset 'ddpm' displaces ancestral steps, but the sampler is {type(scheduler).__name__}. "
            "Use the ddpm sampler, or the default preset."
        )
    following = state.levels[state.level.index + 1 :]
    abar, abar_next = state.level.alpha**2, following[0].alpha ** 2 if following else 1.0
    beta = 1 - abar / abar_next
    posterior = (1 - abar_next) / (1 - abar) * beta
    if learned is None:
        return posterior
    fraction = (learned + 1) / 2
    return torch.exp(fraction * math.log(max(beta, 1e-20)) + (1 - fraction) * math.log(max(posterior, 1e-20)))


class EluCDEDM(Guidance):
    """EluCD on EDM samplers: before the denoiser, x += r_i rms(x) g / rms(g), per sample.

    g is the gradient of the energy at the noisy sample divided by its RMS where that is above 1;
    r_i = max(m (N + 1 - i) / (N + 1), 1e-5) + m gamma sin(pi i / N) for step i = 0 ... N - 1 of N, first-order evaluations only.
    Defaults are the paper's for ImageNet-64 in 10 steps: m = 0.004, gamma = 0.3, softplus beta 5, tau2 = 0.

    The total push grows with N: scale m by 10 / N to keep it.
    """

    name = "classifier-edm"

    def __init__(self, energy: ClassifierEnergy, m: float = 0.004, gamma: float = 0.3) -> None:
        self.energy, self.m, self.gamma = energy, m, gamma

    def active(self, state: State) -> bool:
        return self.m != 0 and state.level.order == 1

    def strength(self, step: int, steps: int) -> float:
        """r_i."""
        decay = max(self.m * (steps + 1 - step) / (steps + 1), 1e-5)
        return decay + self.m * self.gamma * math.sin(math.pi * step / steps)

    def before(self, state: State) -> Tensor:
        if not self.active(state):
            return state.x
        if state.codec is not None:
            raise ValueError(
                "Preset 'edm' shows the noisy sample to the classifier, which needs a pixel-space model. Use the default preset."
            )
        x = state.x
        value, gradient = differentiate(self.energy, x / _rms(x).clamp_min(1.0))
        state.log[self.name] = value
        first = [level.index for level in state.levels if level.order == 1]
        r = self.strength(first.index(state.level.index), len(first))
        return x + r * _rms(x) * gradient / _rms(gradient).clamp_min(1e-12)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, (B, 1, ...)."""
    return x.square().flatten(1).mean(1).sqrt().view(-1, *[1] * (x.ndim - 1))


PRESETS = ("default", "ddpm", "edm")


def from_preset(
    preset: str,
    classifier: nn.Module,
    target: Target,
    *,
    scale: float | None = None,
    tau2: float | None = None,
    softplus_beta: float | None = None,
    gamma: float | None = None,
    m: float = 0.004,
    route: str = "x0_detached",
    **energy: Any,
) -> Guidance:
    """A preset with its defaults for what is None.

    | preset  | site          | scale | tau2 | softplus beta | gamma | source                          |
    |---------|---------------|-------|------|---------------|-------|---------------------------------|
    | default | score         | 8     | 1    | none          | 0.3   | measured on `digits`            |
    | ddpm    | after step    | 1     | 0.5  | 3             | 0.3   | EluCD, ImageNet-128, 250 steps  |
    | edm     | before denoise| (m)   | 0    | 5             | 0.3   | EluCD, ImageNet-64, 10 steps    |
    """
    defaults = {"default": (1.0, None), "ddpm": (0.5, 3.0), "edm": (0.0, 5.0)}
    if preset not in defaults:
        raise ValueError(f"Unknown preset {preset!r}. Use one of: {', '.join(PRESETS)}.")
    default_tau2, default_beta = defaults[preset]
    arguments: dict[str, Any] = {
        "tau2": default_tau2 if tau2 is None else tau2,
        "softplus_beta": default_beta if softplus_beta is None else softplus_beta,
        **energy,
    }
    gamma = 0.3 if gamma is None else gamma
    if preset == "default":
        scale = 8.0 if scale is None else scale
        return ClassifierGuidance(classifier, target, scale, gamma=gamma, route=route, **arguments)
    scale = 1.0 if scale is None else scale
    potential = ClassifierEnergy(classifier, target, **arguments)
    return EluCDDDPM(potential, scale, gamma) if preset == "ddpm" else EluCDEDM(potential, m * scale, gamma)
