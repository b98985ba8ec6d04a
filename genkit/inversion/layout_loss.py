"""How badly layouts explain one picture: the loss of a layout-to-image model, place by place.

    L(y) = mean_i w_i sum_p || eps_i(p) - eps_theta(x_i, t_i, y)(p) ||^2 - beta log p(y)        x_i = alpha_i x0 + sigma_i eps_i

over the pairs i of a plan, which all layouts share, and the places p of the latents. With weights w = 1/2 |d lambda / d u| the
first part is -log p(x0 | y) in nats, up to a constant. The map of its places tells where a layout explains the picture, and where
not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.attention.proof import Proof, proving
from genkit.denoisers.base import Cond, Denoiser
from genkit.denoisers.modes import frozen
from genkit.layouts.grounding import Grounding
from genkit.levels import broadcast
from genkit.scoring.plan import PairPlan

UNKNOWN = b""  # what the losses with nothing known are remembered by; a layout has bytes


class LayoutLoss:
    """The loss of layouts of one picture; what was computed is remembered.

    Args:
        denoiser: of a layout-conditioned model.
        grounding: how it is told of layouts, `denoiser.grounding(class_names)`.
        x0: the clean latents (C, h, w) of the picture.
        plan: the pairs; "elbo" weights make nats.
        prior: has `nats(layouts)`, as `LayoutPriorPipeline` does; None has no prior.
        beta: its weight.
        batch_size: network evaluations at a time.

    Attributes:
        evaluations: of the network so far; a backward pass counts as one. The prior's, of a small network, are not counted.
    """

    def __init__(
        self, denoiser: Denoiser, grounding: Grounding, x0: Tensor, plan: PairPlan, *, prior: Any = None, beta: float = 1.0,
        batch_size: int = 64,
    ) -> None:  # fmt: skip
        self.denoiser, self.grounding, self.x0 = denoiser, grounding, x0
        self.prior, self.beta, self.batch_size = prior, beta, batch_size
        self.pairs = plan.pairs(denoiser.pipe.scheduler, x0.shape)
        eps = self.pairs.noise(range(len(self.pairs))).to(x0)
        self.noisy, self.eps = self.pairs.level.diffuse(x0.expand_as(eps), eps), eps
        # Sums over channels instead of means over all values.
        self.weight = (self.pairs.weight / x0.numel()).to(x0)
        self.proof = Proof(denoiser)
        self.evaluations = 0
        self._maps: dict[bytes, Tensor] = {}  # of each layout (n, h, w), the first n pairs
        self._priors: dict[bytes, float] = {}

    @torch.no_grad()
    def maps(self, layouts: Tensor, count: int | None = None) -> Tensor:
        """Losses (B, h, w) at each place, on the first `count` pairs, of packed layouts (B, N, 5); without the prior."""
        count = len(self.pairs) if count is None else count
        keys = [row.numpy().tobytes() for row in layouts.cpu().contiguous()]
        missing = {key: i for i, key in enumerate(keys) if len(self._maps.get(key, ())) < count}
        if missing:
            self._complete(list(missing), self.grounding.condition(layouts[list(missing.values())].to(self.x0)), count)
        return torch.stack([self._maps[key][:count].mean(0) for key in keys])

    @torch.no_grad()
    def surprise(self, layout: Tensor, count: int | None = None) -> Tensor:
        """How much worse a packed layout (N, 5) explains each place (h, w) than nothing known does, on the first `count` pairs.

        What is hard to denoise whatever is said of it, as an edge is, cancels: a place is positive where something is left out or
        made up. For a model to which an empty layout and nothing known are one, the loss itself.
        """
        count = len(self.pairs) if count is None else count
        found = self.maps(layout[None], count)[0]
        if self.grounding.unknown is None:
            return found
        if len(self._maps.get(UNKNOWN, ())) < count:
            self._complete([UNKNOWN], self.grounding.unknown, count)
        return found - self._maps[UNKNOWN][:count].mean(0)

    def __call__(self, layouts: Tensor, count: int | None = None) -> Tensor:
        """L (B,) in float64 of packed layouts (B, N, 5), on the first `count` pairs."""
        return self.maps(layouts, count).double().sum((1, 2)).cpu() + self.beta * self.prior_nats(layouts)

    def prior_nats(self, layouts: Tensor) -> Tensor:
        """-log p(y) (B,) in float64; zeros without a prior."""
        if self.prior is None or not self.beta:
            return torch.zeros(len(layouts), dtype=torch.float64)
        keys = [row.numpy().tobytes() for row in layouts.cpu().contiguous()]
        missing = {key: i for i, key in enumerate(keys) if key not in self._priors}
        if missing:
            found = self.prior.nats(layouts[list(missing.values())].cpu())
            self._priors |= dict(zip(missing, found.tolist(), strict=True))
        return torch.tensor([self._priors[key] for key in keys], dtype=torch.float64)

    def gradient(self, layouts: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (B,) on some pairs (m,), without the prior, and their gradients (B, N, 4) by the boxes."""
        boxes = layouts[..., 1:].to(self.x0).detach().requires_grad_()
        rows = torch.arange(len(layouts)).repeat_interleave(len(pairs))
        with torch.enable_grad(), frozen(self.denoiser.network), proving(self.proof) as proof, proof.step("gradients"):
            packed = torch.cat([layouts[..., :1].to(boxes), boxes], dim=-1)
            losses = self._rows(self.grounding.condition(packed)[rows.tolist()], pairs.repeat(len(layouts))).sum((1, 2))
            losses = losses.view(len(layouts), -1).mean(1)
            (gradient,) = torch.autograd.grad(losses.sum(), boxes)
        self.evaluations += len(rows)
        return losses.detach(), gradient

    def _complete(self, keys: list[bytes], cond: Cond, count: int) -> None:
        """Remember the losses of some conditions on the first `count` pairs; evaluates the pairs that are not known yet."""
        known = [len(self._maps.get(key, ())) for key in keys]
        items = [(row, pair) for row, first in enumerate(known) for pair in range(first, count)]
        which = torch.tensor(items)
        with proving(self.proof) as proof, proof.step("losses"):
            found = torch.cat([self._rows(cond[part[:, 0].tolist()], part[:, 1]) for part in which.split(self.batch_size)])
        for key, more in zip(keys, found.split([count - first for first in known]), strict=True):
            self._maps[key] = torch.cat([self._maps[key], more]) if key in self._maps else more

    def _rows(self, cond: Cond, pairs: Tensor) -> Tensor:
        """Weighted losses (B, h, w) of conditions and the pairs (B,) that they are seen on."""
        self.evaluations += len(pairs)
        prediction = self.denoiser(self.noisy[pairs], self.pairs.level[pairs], cond)
        errors = (prediction.eps - self.eps[pairs].to(prediction.eps)).square().sum(1)
        return errors * broadcast(self.weight[pairs], errors)
