"""The layout that explains a picture best: a search over sets of objects, by Bayes' rule

    argmin_y  L(y) = -log p(x0 | y) - beta log p(y)

DIVE (IEEE TMM 2025, arXiv 2504.17253) descends from random tokens, projected to the vocabulary; its code for layouts is not public.
This search asks the same L for moves that are made of objects:

    add       a box of `propose`, moved by the gradient of L, with the class that lowers L most
    class     of one object, all others as they are
    move      all boxes, by the gradient of L
    anew      an object is taken out and another one added in its place
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
        finalists: objects of a look whose boxes are moved before one is chosen.
        steps: of the boxes' descent at the end; a third of it after each addition.
        lr: of that descent (Adam), in units of the picture's side.
        margin: nats by which an object must lower L.
        anew: times that each object is taken out and looked for again.

    Raises:
        ValueError: numbers that are not positive.
    """

    few: int = 6
    some: int = 16
    kept: int = 2
    proposals: int = 10
    finalists: int = 4
    steps: int = 12
    lr: float = 0.01
    margin: float = 0.0
    anew: int = 1

    def __post_init__(self) -> None:
        for name in ("few", "some", "kept", "proposals", "finalists", "lr"):
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
            if longer is None or not self._lower(loss, longer, layout):
                break
            layout = self._move(loss, longer, max(1, self.steps // 3), self.few)
            trace.append(layout)
        for _ in range(self.anew):
            layout = self._anew(loss, layout, classes)
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

    def _lower(self, loss: LayoutLoss, layout: Tensor, than: Tensor) -> bool:
        """Whether a layout has a lower L than one with an object less."""
        ours, theirs = loss(torch.stack([layout, than]), self.some).tolist()
        return ours < theirs - self.margin

    def _count(self, layout: Tensor) -> int:
        return int((layout[:, 0] >= 0).sum())

    def _add(self, loss: LayoutLoss, layout: Tensor, classes: int) -> Tensor | None:
        """The layout with the one object more that has the lowest L; None if nothing is proposed."""
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
        last = second[loss(second, self.few).argsort()[: self.finalists]]
        # A proposal is only about right, and an object that is not quite in its place explains too little to be worth its prior.
        moved = self._descend(loss, last, slice(count, count + 1), max(1, self.steps // 2), self.few)
        both = torch.cat([last, moved])
        return both[int(loss(both, self.some).argmin())]

    def _anew(self, loss: LayoutLoss, layout: Tensor, classes: int) -> Tensor:
        """Each object taken out, in turn, and the best one added there, if L is lower than before."""
        for slot in range(self._count(layout)):
            rest = without_slot(layout, slot)
            other = self._add(loss, rest, classes)
            if other is not None and self._lower(loss, other, layout):
                # The others keep their order, so that each has its turn.
                count = self._count(layout) - 1
                layout = torch.cat([other[:slot], other[count : count + 1], other[slot:count], other[count + 1 :]])
        return layout

    def _classes(self, loss: LayoutLoss, layout: Tensor, classes: int) -> Tensor:
        """Each object with the class that lowers L most."""
        for slot in range(self._count(layout)):
            tried = layout.repeat(classes, 1, 1)
            tried[:, slot, 0] = torch.arange(classes).float()
            near = loss(tried, self.few).topk(min(4, classes), largest=False).indices
            layout = tried[near][int(loss(tried[near], self.some).argmin())]
        return layout

    def _move(self, loss: LayoutLoss, layout: Tensor, steps: int, pairs: int) -> Tensor:
        """The layout with all boxes from a descent, if L is lower there."""
        count = self._count(layout)
        if not count or not steps:
            return layout
        moved = self._descend(loss, layout[None], slice(count), steps, pairs)[0]
        both = loss(torch.stack([layout, moved]), self.some)
        return moved if both[1] < both[0] else layout

    def _descend(self, loss: LayoutLoss, layouts: Tensor, slots: slice, steps: int, pairs: int) -> Tensor:
        """Layouts (B, N, 5) with the boxes of some slots moved along the gradient of L without the prior."""
        boxes, moved = layouts[:, slots, 1:].clone().requires_grad_(), layouts.clone()
        optimiser = torch.optim.Adam([boxes], lr=self.lr, betas=(0.8, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=self.lr / 10)
        for _ in range(steps):
            moved[:, slots, 1:] = boxes.detach()
            _, gradient = loss.gradient(moved, torch.arange(pairs))
            boxes.grad = gradient[:, slots].to(boxes)
            optimiser.step()
            schedule.step()
            boxes.data = _whole(boxes.data)
        moved[:, slots, 1:] = boxes.detach()
        return moved

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
    """Boxes (..., 4) inside the picture, with sides of at least `SMALLEST`."""
    low, high = boxes[..., :2].clamp(0, 1 - SMALLEST), boxes[..., 2:].clamp(SMALLEST, 1)
    return torch.cat([low, torch.maximum(high, low + SMALLEST)], dim=-1)
