"""A teacher of the ring: the smallest denoiser that a distillation can start from, trained in seconds.

    x_u = (1 - u) x0 + u eps,        L = E |v(x_u, u) - (eps - x0)|^2        (rectified flow: Liu et al. 2022, arXiv 2209.03003)

Four layers of 96 see a point of `genkit.data.ring` as a latent (2, 1, 1). It is an adapter as any other, so data, trainer and
samplers are those of the large models.

What a step costs in quality is plain here: the teacher's first step ends in the middle of the ring, where no data is.

    teacher = train_ring(folder)
    data = ring_data(points(16384, seed=1), teacher, folder / "data", "ring")
    trainer = DistillTrainer(teacher, data, ring_config(), folder / "run")
    trainer.fit()
    student = load_student(folder / "run")
    ring_metrics(student.few_steps(4096, (1.0,)), points(4096))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit.data.ring import points
from genkit.denoisers import Cond, Denoiser
from genkit.distill.config import DistillConfig
from genkit.distill.data import LatentDataset, latent_space
from genkit.distill.path import Path as Levels
from genkit.distill.path import renoise
from genkit.distill.shards import ENCODED, Part, fill
from genkit.distill.trained import TrainedRun
from genkit.levels import Level
from genkit.noise import mix
from genkit.ranks import Ranks
from genkit.sampling import sample
from genkit.training import TrainConfig, fit

FREQUENCIES = 8  # of the time's sines and cosines


class RingNetwork(ModelMixin, ConfigMixin):
    """A multilayer perceptron of a point and its time.

    Args:
        width, depth: of the hidden layers, `blocks.0` to `blocks.{depth - 1}`.
        in_channels, sample_size: of a latent: (2, 1, 1).
    """

    @register_to_config
    def __init__(self, width: int = 96, depth: int = 4, in_channels: int = 2, sample_size: int = 1) -> None:
        super().__init__()
        widths = [in_channels + 2 * FREQUENCIES, *[width] * depth]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in itertools.pairwise(widths))
        self.out = nn.Linear(width, in_channels)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Velocity (B, 2, 1, 1) of points x (B, 2, 1, 1) at times u (B,) in [0, 1]."""
        angle = u.to(x)[:, None] * torch.arange(1, FREQUENCIES + 1).to(x) * (torch.pi / 2)
        h = torch.cat([x.flatten(1), angle.sin(), angle.cos()], 1)
        for block in self.blocks:
            h = block(h)
        return self.out(h).reshape_as(x)


class RingDenoiser(Denoiser):
    """The network as a denoiser: unconditional, rectified flow.

    Example:
        >>> denoiser = train_ring(folder)
        >>> x = denoiser.sample(1000, steps=50)             # (1000, 2), as a teacher
        >>> x = denoiser.few_steps(1000, (1.0, 0.5))        # (1000, 2), as a student
    """

    family = "ring"
    classes = ()

    def __init__(self, network: RingNetwork) -> None:
        super().__init__(SimpleNamespace(transformer=network, scheduler=FlowMatchEulerDiscreteScheduler()))

    def condition(self, **extra: Any) -> Cond:
        """There is none."""
        self._refuse(extra)
        return Cond({})

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(z, self._time(z, level) / self.pipe.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def sample(self, count: int, steps: int, seed: int = 0) -> Tensor:
        """Points (count, 2) of Euler's method from u = 1 in equal steps."""
        scheduler = FlowMatchEulerDiscreteScheduler()
        self.set_timesteps(scheduler, steps, (2, 1, 1), sigmas=[1 - i / steps for i in range(steps)])
        x = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
        return sample(self, scheduler, x).flatten(1)

    @torch.no_grad()
    def few_steps(self, count: int, levels: Sequence[float], seed: int = 0) -> Tensor:
        """Points (count, 2) of a student that visits some levels, see `genkit.distill.path.renoise`."""

        def noise(step: int) -> Tensor:
            return torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(mix(seed, step)))

        return renoise(lambda x, level: self(x, level).x0, Levels(self.pipe.scheduler), levels, noise).flatten(1)


def train_ring(folder: Path, steps: int = 3000, seed: int = 0) -> RingDenoiser:
    """A teacher, trained on fresh points in every step; one that is in the folder already is loaded.

    Args:
        steps: of 512 points, AdamW with a peak learning rate of 2e-3 and cosine decay: 3,000 take about 15 s of one core.
    """
    if (folder / "teacher").is_dir():
        return RingDenoiser(RingNetwork.from_pretrained(folder / "teacher"))

    def loss(network: RingNetwork, generator: torch.Generator, step: int) -> Tensor:
        x0 = points(config.batch_size, seed=int(torch.randint(2**62, (), generator=generator)))[..., None, None]
        eps = torch.randn(x0.shape, generator=generator)
        u = torch.rand(len(x0), generator=generator)
        x = torch.lerp(x0, eps, u[:, None, None, None])
        return F.mse_loss(network(x, u), eps - x0)

    torch.manual_seed(seed)
    config = TrainConfig(steps=steps, batch_size=512, lr=2e-3, ema_decay=0.99, weight_decay=0.0, seed=seed, bf16=False)
    network = fit(RingNetwork(), loss, config, folder, name="ring")
    network.save_pretrained(folder / "teacher")
    return RingDenoiser(network)


def ring_data(x: Tensor, denoiser: RingDenoiser, folder: Path, name: str) -> LatentDataset:
    """Points (N, 2) as the data of a distillation, in a new folder; `name` says what they are."""
    latents = x[..., None, None]
    settings = {"space": latent_space(denoiser), "data": name, "storage": "float32"}
    part = Part(range(len(x)), tuple(latents.shape[1:]))
    fill(
        folder,
        ENCODED,
        settings,
        [part],
        lambda part: ({"latents": latents}, {}),
        resume=False,
        ranks=Ranks(),
        progress=lambda n: None,
    )
    return LatentDataset(folder)


def ring_config(**changes: Any) -> DistillConfig:
    """How the ring is distilled to one step in a minute or two; `changes` replace settings.

    The discriminator looks at less noise than it does at pictures (the mean of the logit is -1): the modes are narrow, 0.12.
    """
    settings: dict[str, Any] = {
        "teacher": "ring", "levels": (1.0,), "taps": tuple(f"blocks.{k}" for k in range(4)), "head": "mlp", "head_width": 96,
        "disc_noise": "logit-normal:-1,1", "r1": 0.0, "lr": 2e-4, "disc_lr": 1e-3, "grad_clip": 0.0, "ema": 0.99, "steps": 1200,
        "batch_size": 256, "log_every": 50, "checkpoint_every": 0, "preview_every": 0,
    }  # fmt: skip
    return DistillConfig(**settings | changes)


def load_student(folder: Path, which: str = "ema") -> RingDenoiser:
    """The student of the last checkpoint of a run."""
    return RingDenoiser(RingNetwork.from_pretrained(TrainedRun(folder).weights(which)))
