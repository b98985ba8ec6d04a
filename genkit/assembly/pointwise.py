"""PointwiseLatentDenoiser: the generator of Luo and Hu (2021, arXiv 2103.01458), which the published assembly method denoises with.

    eps(x, t, z): layers  h <- (W h + b) * sigmoid(G c + g) + B c,  leaky ReLU between,   c = (beta_t, sin beta_t, cos beta_t, z)

for each point alone, given the shape's latent z: points never see each other. Latents come from w ~ N(0, I) through couplings
(Dinh et al. 2017, arXiv 1605.08803), run backwards:  x_b <- (x_b - t(x_a)) / sigmoid(s(x_a) + 2).

Keys of the weights are those of the authors' checkpoints (`flow.chain.0.net_s_t.0.weight`, `diffusion.net.layers.0._layer.weight`),
which `load_luo_hu` reads. Their step t = k + 1 is index k of a diffusers scheduler with the same betas.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit import noise
from genkit.assembly.point_transformer import PointDenoiserOutput
from genkit.checkpoints import load_pt

WIDTHS = (128, 256, 512, 256, 128)


class PointwiseLatentDenoiser(ModelMixin, ConfigMixin):
    """Noise of noisy clouds of unit standard deviation.

    Args:
        categories: names of the classes that it was trained on; the latents decide, so the class is not told to the network.
        latent_dim: of z.
        num_steps, beta_1, beta_T: of the linear schedule.
        residual: the network's output is added to its input.
        flow_depth, flow_width: of the couplings.
        widths: of the layers.

    Example:
        >>> net = PointwiseLatentDenoiser(["chair"])
        >>> net(x, t, context=net.draw([0, 1])).sample       # x (2, N, 3), t (2,) from 0
    """

    @register_to_config
    def __init__(
        self,
        categories: Sequence[str] = (),
        latent_dim: int = 256,
        num_steps: int = 100,
        beta_1: float = 1e-4,
        beta_T: float = 0.02,
        residual: bool = True,
        flow_depth: int = 14,
        flow_width: int = 256,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        super().__init__()
        sizes = [3, *widths, 3]
        layers = nn.ModuleList(_SquashedLinear(a, b, latent_dim + 3) for a, b in itertools.pairwise(sizes))
        self.diffusion = nn.ModuleDict({"net": nn.ModuleDict({"layers": layers})})
        couplings = nn.ModuleList(_Coupling(latent_dim, flow_width, swap=i % 2 == 0) for i in range(flow_depth))
        self.flow = nn.ModuleDict({"chain": couplings})

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, context: Tensor | None = None
    ) -> PointDenoiserOutput:
        """Noise (B, N, 3) in clouds (B, N, 3) at timesteps (B,) from 0, of shapes z (B, latent_dim).

        Raises:
            ValueError: no context.
        """
        if context is None:
            raise ValueError("A pointwise denoiser knows the shape by its latent alone. Give `context`, as `draw` makes it.")
        beta = self.betas.to(sample)[timestep, None]
        c = torch.cat([beta, beta.sin(), beta.cos(), context.to(sample)], -1)[:, None]
        net: Any = self.diffusion["net"]
        hidden = sample
        for i, layer in enumerate(net["layers"]):
            hidden = layer(F.leaky_relu(hidden) if i else hidden, c)
        return PointDenoiserOutput(sample=sample + hidden if self.config.residual else hidden)

    @property
    def betas(self) -> Tensor:
        """Of the schedule (num_steps,)."""
        return torch.linspace(self.config.beta_1, self.config.beta_T, self.config.num_steps)

    def scheduler(self) -> DDPMScheduler:
        """The schedule as diffusers has it; nothing is clipped."""
        config = self.config
        return DDPMScheduler(
            num_train_timesteps=config.num_steps, beta_start=config.beta_1, beta_end=config.beta_T, clip_sample=False
        )

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Latents z (B, latent_dim) of the prior, one for each seed."""
        z = noise.normal(seeds, (self.config.latent_dim,)).to(next(self.parameters()))
        chain: Any = self.flow["chain"]
        for coupling in reversed(chain):
            z = coupling(z)
        return z


class _SquashedLinear(nn.Module):
    """A linear layer (B, N, in) -> (B, N, out), gated and shifted by a context (B, 1, C)."""

    def __init__(self, inputs: int, outputs: int, context: int) -> None:
        super().__init__()
        self._layer = nn.Linear(inputs, outputs)
        self._hyper_bias = nn.Linear(context, outputs, bias=False)
        self._hyper_gate = nn.Linear(context, outputs)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self._layer(x) * self._hyper_gate(c).sigmoid() + self._hyper_bias(c)


class _Coupling(nn.Module):
    """An affine coupling, from w to z: one half of the coordinates is moved and scaled by what the other half says."""

    def __init__(self, dim: int, width: int, swap: bool) -> None:
        super().__init__()
        self.kept, self.swap = dim - dim // 2, swap
        moved = dim - self.kept
        self.net_s_t = nn.Sequential(
            nn.Linear(self.kept, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2 * moved)
        )

    def forward(self, w: Tensor) -> Tensor:
        parts = w.split([w.shape[1] - self.kept, self.kept], 1) if self.swap else w.split([self.kept, w.shape[1] - self.kept], 1)
        moved, kept = parts if self.swap else parts[::-1]
        scale, shift = self.net_s_t(kept).chunk(2, 1)
        moved = (moved - shift) / torch.sigmoid(scale + 2)
        return torch.cat([moved, kept] if self.swap else [kept, moved], 1)


def load_luo_hu(file: str | Path, categories: Sequence[str], *, allow_pickle: bool = False) -> PointwiseLatentDenoiser:
    """A generator from a checkpoint that Luo and Hu released (`GEN_chair.pt`, `GEN_airplane.pt`).

    It is a pickle: read with `weights_only=True`, which knows tensors, plain values and the `argparse.Namespace` of its settings.

    Args:
        categories: what it was trained on, which the file does not say.
        allow_pickle: read it at all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: pickles are not allowed; not such a checkpoint, or one without a flow (an autoencoder).
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    if not allow_pickle:
        raise ValueError(f"{str(file)!r} is a pickle. Pass --allow-pickle to read it, restricted to tensors and plain values.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = load_pt(file)
        settings, weights = vars(content["args"]), content["state_dict"]
        if settings["latent_flow_depth"] > len(weights):
            raise ValueError(f"{len(weights)} weights of {settings['latent_flow_depth']} couplings")
        with torch.device("meta"):  # its sizes are the file's word, and take no memory before the weights are seen to fit
            net = PointwiseLatentDenoiser(
                list(categories), latent_dim=settings["latent_dim"], num_steps=settings["num_steps"], beta_1=settings["beta_1"],
                beta_T=settings["beta_T"], residual=settings["residual"], flow_depth=settings["latent_flow_depth"],
                flow_width=settings["latent_flow_hidden_dim"],
            )  # fmt: skip
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        raise ValueError(f"{str(file)!r} is no generator of Luo and Hu ({type(error).__name__}: {error!s:.120}).") from error
    known = net.state_dict()

    def fits(key: str) -> bool:
        # Contiguous, since else one number may stand for a whole matrix.
        return key in weights and weights[key].shape == known[key].shape and weights[key].is_contiguous()

    missing = sorted(key for key in known if not fits(key))
    if missing:
        raise ValueError(f"{str(file)!r} lacks {len(missing)} weights of a generator, such as {missing[0]!r}.")
    net.load_state_dict({key: weights[key].to(value.dtype) for key, value in known.items()}, assign=True)
    return net.eval()
