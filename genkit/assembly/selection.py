"""Chooses one candidate of each part so that together they make the template: a discrete problem, by coordinate descent.

    E(k_1, ..., k_P) = mean_m min_p c_{p, k_p, m}  +  lambda sum_p a_p r_{p, k_p}  +  mu mean_m (rho_m - sum_p rho_{p, k_p, m})^2

c_{p,k,m} is the squared distance of template point m to part p in candidate pose k, cut off at tau^2; r the part's own residual,
a_p its share of the surface; rho the density of surface (`genkit.assembly.density`) of the template and of the part. The first
two are what nearest neighbours see. The third lets no two parts explain the same place while another place is bare. From many
orders of the parts; then pairs of parts are chosen anew together until none gets better.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

SWEEPS = 8
SHORTLIST = 16  # candidates of each part of a pair that are tried together


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
    """What the choice is made by.

    Args:
        cover: of each shape, squared distances (K, M) of template points, cut off.
        density: of each shape (K, M), at the template's points.
        residual: of each shape (K,).
        shape_of: the shape of each part.
        shares: of the surface (P,), their sum 1.
        target: density of the template (M,).
        limit: tau^2.
        residual_weight, density_weight: lambda and mu.
    """

    cover: list[Tensor]
    density: list[Tensor]
    residual: list[Tensor]
    shape_of: list[int]
    shares: Tensor
    target: Tensor
    limit: float
    residual_weight: float = 1.0
    density_weight: float = 1e-3

    def part(self, p: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cover (K, M), density (K, M) and weighted residual (K,) of a part."""
        shape = self.shape_of[p]
        return self.cover[shape], self.density[shape], self.residual_weight * self.shares[p] * self.residual[shape]

    def together(self, cover: Tensor, density: Tensor) -> Tensor:
        """The first and third term (...) of covers and summed densities (..., M)."""
        return cover.mean(-1) + self.density_weight * (self.target - density).square().mean(-1)

    def energy(self, choice: list[int]) -> float:
        """E of a choice."""
        rows = [tuple(value[k] for value in self.part(p)) for p, k in enumerate(choice)]
        cover, density, residual = (torch.stack(values) for values in zip(*rows, strict=True))
        return float(self.together(cover.amin(0), density.sum(0)) + residual.sum())


def choose(costs: Costs, starts: int, generator: torch.Generator) -> list[tuple[float, list[int]]]:
    """Choices with their energies, best first, without repeats.

    Args:
        starts: orders of the parts that are tried; the first one goes from the largest part to the smallest.
    """
    count = len(costs.shape_of)
    orders = [costs.shares.argsort(descending=True, stable=True).tolist()]
    orders += [torch.randperm(count, generator=generator).tolist() for _ in range(starts - 1)]
    return rank(costs, [descend(costs, order) for order in orders])


def rank(costs: Costs, choices: list[list[int]]) -> list[tuple[float, list[int]]]:
    """The choices with their energies, best first; of those that differ by exchanging equal parts, one."""
    found: dict[tuple[int, ...], list[int]] = {}
    for choice in choices:
        places = {s: iter(sorted(k for p, k in enumerate(choice) if costs.shape_of[p] == s)) for s in set(costs.shape_of)}
        found.setdefault(tuple(next(places[s]) for s in costs.shape_of), choice)
    return sorted(((costs.energy(choice), choice) for choice in found.values()), key=lambda pair: pair[0])


class _State:
    """A choice, and what its parts have on the template."""

    def __init__(self, costs: Costs, choice: list[int]) -> None:
        self.costs, self.choice = costs, list(choice)
        self.cover = torch.full((len(choice), len(costs.target)), costs.limit, dtype=costs.target.dtype, device=costs.target.device)
        self.density = torch.zeros_like(self.cover)
        for p, k in enumerate(choice):
            if k >= 0:
                self.put(p, k)

    def put(self, p: int, k: int) -> None:
        cover, density, _ = self.costs.part(p)
        self.choice[p], self.cover[p], self.density[p] = k, cover[k], density[k]

    def without(self, *parts: int) -> tuple[Tensor, Tensor]:
        """Cover and density (M,) of the other parts."""
        kept = [q for q in range(len(self.choice)) if q not in parts]
        if not kept:
            return torch.full_like(self.costs.target, self.costs.limit), torch.zeros_like(self.costs.target)
        return self.cover[kept].amin(0), self.density[kept].sum(0)


def descend(costs: Costs, order: list[int], choice: list[int] | None = None) -> list[int]:
    """Part after part takes its best candidate given the others, until none changes; parts that have none yet cover nothing."""
    state = _State(costs, [-1] * len(order) if choice is None else choice)
    for _ in range(SWEEPS):
        before = list(state.choice)
        for p in order:
            state.put(p, int(_alone(costs, p, *state.without(p)).argmin()))
        if state.choice == before:
            break
    return state.choice


def improve_pairs(costs: Costs, choice: list[int], rounds: int = 2) -> list[int]:
    """Choose each pair of parts anew together, among the candidates that are best alone while the pair is away."""
    state = _State(costs, choice)
    for _ in range(rounds):
        before = list(state.choice)
        for p, q in itertools.combinations(range(len(choice)), 2):
            base_cover, base_density = state.without(p, q)
            short = [_shortlist(costs, r, base_cover, base_density, state.choice[r]) for r in (p, q)]
            (cp, dp, rp), (cq, dq, rq) = (tuple(v[s] for v in costs.part(r)) for r, s in zip((p, q), short, strict=True))
            cover = cp.minimum(base_cover)[:, None].minimum(cq[None])
            both = costs.together(cover, (base_density + dp)[:, None] + dq[None]) + rp[:, None] + rq[None]
            i, j = divmod(int(both.argmin()), both.shape[1])
            if both[i, j] < both[0, 0] - 1e-9:
                state.put(p, int(short[0][i]))
                state.put(q, int(short[1][j]))
        if state.choice == before:
            break
    return state.choice


def _alone(costs: Costs, p: int, base_cover: Tensor, base_density: Tensor) -> Tensor:
    """E (K,) of a part's candidates while the others have a cover and a density (M,), but for a constant."""
    cover, density, residual = costs.part(p)
    return costs.together(cover.minimum(base_cover), base_density + density) + residual


def _shortlist(costs: Costs, p: int, base_cover: Tensor, base_density: Tensor, now: int) -> Tensor:
    """Candidates of a part: the one that it has first, then the best ones."""
    energy = _alone(costs, p, base_cover, base_density)
    best = energy.topk(min(SHORTLIST, len(energy)), largest=False).indices
    return torch.cat([torch.tensor([now], device=best.device), best[best != now]])
