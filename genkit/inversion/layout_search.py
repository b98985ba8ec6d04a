"""The layout that explains a picture best: a search over sets of objects, by Bayes' rule

    argmin_y  L(y) = -log p(x0 | y) - beta log p(y)

DIVE (IEEE TMM 2025, arXiv 2504.17253) descends from random tokens, projected to the vocabulary; its code for layouts is not public.
This search asks the same L for moves that are made of objects:

    add       a box of `propose`, with the class that lowers L most
    class     of one object, all others as they are
    move      all boxes, by the gradient of L
    remove    an object without which L is lower

and takes those that lower L, on pairs that all layouts share. Every number comes from the diffusion model.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from genkit.inversion.layout_loss import LayoutLoss
from genkit.inversion.proposals import new, propose
from genkit.layouts.layout import EMPTY

SMALLEST = 1 / 32  # side of a box


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutSearch:
    """How to search.

    Args:
        few, some: pairs that moves are tried on while the layout grows, and when it is whole.
        kept: classes of a proposal that go on after the first look.
        proposals: boxes of a look, at most.
        steps: of the boxes' descent at the end; a third of it after each addition.
        lr: of that descent (Adam), in units of the picture's side.
        margin: nats by which an object must lower L.

    Raises:
        ValueError: numbers that are not positive.
    """

    few: int = 6
    some: int = 16
    kept: int = 2
    proposals: int = 10
    steps: int = 12
    lr: float = 0.01
    margin: float = 0.0

    def __post_init__(self) -> None:
        for name in ("few", "some", "kept", "proposals", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")

    def __call__(self, loss: LayoutLoss, slots: int, classes: int) -> tuple[Tensor, list[Tensor]]:
        """The layout (slots, 5), packed, and those that were passed on the way.

        Args:
            loss: of the picture.
            slots, classes: of the model.
        """
        layout = torch.zeros(slots, 5)
        layout[:, 0] = EMPTY
        trace = [layout]
        while self._count(layout) < slots:
            longer = self._add(loss, layout, classes)
            if longer is None:
                break
            layout = self._move(loss, longer, max(1, self.steps // 3), self.few)
            trace.append(layout)
        for _ in range(2):
            layout = self._classes(loss, layout, classes)
            layout = self._move(loss, layout, self.steps, self.some)
            trace.append(layout)
            shorter = self._remove(loss, layout)
            if torch.equal(shorter, layout):
                break
            layout = shorter
        return layout, trace

    def _count(self, layout: Tensor) -> int:
        return int((layout[:, 0] >= 0).sum())

    def _add(self, loss: LayoutLoss, layout: Tensor, classes: int) -> Tensor | None:
        """The layout with the object that lowers L most; None if none does."""
        count = self._count(layout)
        boxes = new(propose(loss.maps(layout[None], self.some)[0], most=self.proposals), layout[:count, 1:])
        if not len(boxes):
            return None
        tried = layout.repeat(len(boxes) * classes, 1, 1)
        tried[:, count, 0] = torch.arange(classes).repeat(len(boxes)).float()
        tried[:, count, 1:] = boxes.repeat_interleave(classes, dim=0)
        values = loss(tried, max(1, self.few // 2)).view(len(boxes), classes)
        best = values.topk(min(self.kept, classes), dim=1, largest=False).indices
        second = tried.view(len(boxes), classes, *layout.shape)[torch.arange(len(boxes))[:, None], best].flatten(0, 1)
        values = loss(second, self.few)
        first = values.argsort()[: 2 * self.kept]
        values, second = loss(second[first], self.some), second[first]
        winner = int(values.argmin())
        if float(values[winner]) >= float(loss(layout[None], self.some)) - self.margin:
            return None
        return second[winner]

    def _classes(self, loss: LayoutLoss, layout: Tensor, classes: int) -> Tensor:
        """Each object with the class that lowers L most."""
        for slot in range(self._count(layout)):
            tried = layout.repeat(classes, 1, 1)
            tried[:, slot, 0] = torch.arange(classes).float()
            near = loss(tried, self.few).topk(min(4, classes), largest=False).indices
            layout = tried[near][int(loss(tried[near], self.some).argmin())]
        return layout

    def _move(self, loss: LayoutLoss, layout: Tensor, steps: int, pairs: int) -> Tensor:
        """The layout with boxes from a descent, if L is lower there."""
        count = self._count(layout)
        if not count or not steps:
            return layout
        boxes = layout[:count, 1:].clone().requires_grad_()
        optimiser = torch.optim.Adam([boxes], lr=self.lr, betas=(0.8, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=self.lr / 10)
        moved = layout.clone()
        for _ in range(steps):
            moved[:count, 1:] = boxes.detach()
            _, gradient = loss.gradient(moved[None], torch.arange(pairs))
            boxes.grad = gradient[0, :count].cpu()
            optimiser.step()
            schedule.step()
            boxes.data = _whole(boxes.data)
        moved[:count, 1:] = boxes.detach()
        both = loss(torch.stack([layout, moved]), self.some)
        return moved if both[1] < both[0] else layout

    def _remove(self, loss: LayoutLoss, layout: Tensor) -> Tensor:
        """Without the objects that do not lower L, one after the other."""
        while (count := self._count(layout)) > 0:
            without = torch.stack([without_slot(layout, slot) for slot in range(count)])
            values = loss(without, self.some)
            if float(values.min()) > float(loss(layout[None], self.some)) - self.margin:
                return layout
            layout = without[int(values.argmin())]
        return layout


def without_slot(layout: Tensor, slot: int) -> Tensor:
    """A packed layout (N, 5) without an object; the others keep their order."""
    rest = torch.cat([layout[:slot], layout[slot + 1 :]])
    return torch.cat([rest, layout.new_tensor([[EMPTY, 0, 0, 0, 0]])])


def _whole(boxes: Tensor) -> Tensor:
    """Boxes (K, 4) inside the picture, with sides of at least `SMALLEST`."""
    low, high = boxes[:, :2].clamp(0, 1 - SMALLEST), boxes[:, 2:].clamp(SMALLEST, 1)
    return torch.cat([low, torch.maximum(high, low + SMALLEST)], dim=1)
