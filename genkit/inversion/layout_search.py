"""The layout that explains a picture best: a search over sets of objects, by Bayes' rule

    argmin_y  L(y) = -log p(x0 | y) - beta log p(y)

DIVE (IEEE TMM 2025, arXiv 2504.17253) descends from random tokens, projected to the vocabulary; its code for layouts is not public.
This search asks the same L for moves that are made of objects:

    add       a box of `propose`, moved by the gradient of L, with the class that lowers L most
    class     of one object, all others as they are
    move      all boxes, by the gradient of L
    anew      an object is taken out and up to two others are added in its place: where one box held two objects, they part
    remove    an object without which L is lower

and takes those that lower L, on pairs that all layouts share. Every number comes from the diffusion model.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from genkit.inversion.layout_loss import LayoutLoss
from genkit.inversion.proposals import blobs, new, propose
from genkit.layouts.layout import EMPTY, inside

SMALLEST = 1 / 32  # side of a box


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutSearch:
    """How to search.

    Args:
        few, some: pairs that moves are tried on while the layout grows, and when it is whole.
        proposals: boxes of a look, at most.
        finalists: boxes of a look that all classes are tried in, and objects that all pairs judge.
        steps: of a descent of boxes; a third of it after each addition.
        lr: of that descent (Adam), in units of the picture's side.
        margin: nats by which an object must lower L.
        turns: of boxes and classes when the layout is whole, at most.
        patience: objects that are added in vain before the layout stops growing.
        anew: times that objects are taken out and looked for again.
        doubt: nats of surprise from which something is looked for: the sum over the places that are explained worse than by nothing
            known. On 16 scenes for validation the right layouts had at most 10 nats but for one, without an object 15 and more.
        budget: evaluations of the network after which no more looks begin; the layout is tidied, and scored, in any case.

    Raises:
        ValueError: numbers that are not positive.
    """

    few: int = 4
    some: int = 12
    proposals: int = 6
    finalists: int = 3
    steps: int = 8
    lr: float = 0.02
    margin: float = 0.0
    patience: int = 2
    turns: int = 3
    anew: int = 2
    doubt: float = 8.0
    budget: int = 8000

    def __post_init__(self) -> None:
        for name in ("few", "some", "proposals", "finalists", "lr", "doubt", "budget"):
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
        for again in range(self.anew + 1):
            if again:
                layout = self._anew(loss, layout, classes, again)
                trace.append(layout)
            layout = self._grown(loss, layout, classes, trace, again)
            layout = self._tidied(loss, layout, classes, trace)
            if not self._looks_on(loss, layout):
                break
        return layout, trace

    def _grown(self, loss: LayoutLoss, layout: Tensor, classes: int, trace: list[Tensor], again: int) -> Tensor:
        """With more objects, as long as that lowers L; two may be needed before it does, so that many more are tried."""
        best, in_vain = layout, 0
        while in_vain < self.patience and self._count(layout) < len(layout) and self._looks_on(loss, layout):
            longer = self._add(loss, layout, classes, attempt=again + in_vain)
            in_vain += 1
            if longer is None:
                continue
            layout = self._move(loss, longer, max(1, self.steps // 3), torch.arange(self.few))
            if self._lower(loss, layout, best):
                best, in_vain = layout, 0
                trace.append(best)
        return best

    def _tidied(self, loss: LayoutLoss, layout: Tensor, classes: int, trace: list[Tensor]) -> Tensor:
        """With the best classes and boxes, and without what is of no use: in turns, since a box is drawn to suit its class."""
        for _ in range(self.turns):
            before = layout
            layout = self._move(loss, layout, self.steps, torch.arange(self.some))
            layout = self._remove(loss, self._classes(loss, layout, classes))
            trace.append(layout)
            if torch.equal(layout[:, 0], before[:, 0]):
                break
        return layout

    def _lower(self, loss: LayoutLoss, layout: Tensor, than: Tensor) -> bool:
        """Whether a layout has a lower L than one with an object less."""
        ours, theirs = loss(torch.stack([layout, than]), self.some).tolist()
        return ours < theirs - self.margin

    def _count(self, layout: Tensor) -> int:
        return int((layout[:, 0] >= 0).sum())

    def _add(self, loss: LayoutLoss, layout: Tensor, classes: int, known: Tensor | None = None, attempt: int = 0) -> Tensor | None:
        """The layout with the one object more that has the lowest L; None if no box is proposed but its own and those `known`.

        Another attempt takes other pairs for the descent, and more proposals.
        """
        count = self._count(layout)
        known = layout[:count, 1:] if known is None else torch.cat([layout[:count, 1:], known])
        surprise = loss.surprise(layout, self.some)
        boxes = new(propose(surprise, most=self.proposals), known)
        if attempt:  # where objects touch, no threshold may part them
            more = new(blobs(surprise, most=self.proposals), known)
            boxes = torch.cat([boxes, new(more, boxes)])
        if not len(boxes):
            return None
        tried = each_class(layout, count, boxes, classes)
        first = tried[torch.arange(len(boxes)), loss(tried.flatten(0, 1), max(1, self.few // 2)).view(len(boxes), -1).argmin(1)]
        pairs = (attempt * self.few + torch.arange(self.few)) % self.some
        # A layout is told of tight boxes, and what is a place off explains nothing: each proposal is moved before it is judged.
        moved = self._descend(loss, first, slice(count, count + 1), self.steps, pairs)
        near = torch.cat([first, moved])
        near = near[loss(near, self.few).argsort()[: self.finalists]]
        tried = each_class(layout, count, near[:, count, 1:], classes).flatten(0, 1)
        last = tried[loss(tried, self.few).argsort()[: self.finalists]]
        return last[int(loss(last, self.some).argmin())]

    def _surprise(self, loss: LayoutLoss, layout: Tensor) -> Tensor:
        """The surprise at each place (h, w), where positive."""
        return loss.surprise(layout, self.some).clamp(min=0)

    def _looks_on(self, loss: LayoutLoss, layout: Tensor) -> bool:
        """Whether an object may be missing or wrong, and the budget lets it be looked for."""
        return loss.evaluations < self.budget and float(self._surprise(loss, layout).sum()) >= self.doubt

    def _anew(self, loss: LayoutLoss, layout: Tensor, classes: int, again: int) -> Tensor:
        """Objects taken out, the most surprising first, and one or two others added, if L is lower than before."""
        surprise = self._surprise(loss, layout)
        objects = layout[: self._count(layout)]
        within = (surprise * inside(objects[:, 1:], *surprise.shape)).sum((1, 2))
        suspects = objects[within.argsort(descending=True)][: int((within >= self.doubt / 4).sum())]
        for number in suspects:
            if not self._looks_on(loss, layout):
                break
            slot = int((layout == number).all(1).nonzero()[0])
            one = self._add(loss, without_slot(layout, slot), classes, known=number[None, 1:], attempt=again)
            two = self._add(loss, one, classes, attempt=again) if one is not None and self._count(one) < len(layout) else None
            others = torch.stack([other for other in (layout, one, two) if other is not None])
            layout = others[int(loss(others, self.some).argmin())]
        return layout

    def _classes(self, loss: LayoutLoss, layout: Tensor, classes: int) -> Tensor:
        """Each object with the class that lowers L most, on all pairs, which the scores need anyway."""
        for slot in range(self._count(layout)):
            tried = each_class(layout, slot, layout[slot : slot + 1, 1:], classes)[0]
            layout = tried[int(loss(tried).argmin())]
        return layout

    def _move(self, loss: LayoutLoss, layout: Tensor, steps: int, pairs: Tensor) -> Tensor:
        """The layout with all boxes from a descent, if L is lower there."""
        count = self._count(layout)
        if not count or not steps:
            return layout
        moved = self._descend(loss, layout[None], slice(count), steps, pairs)[0]
        both = loss(torch.stack([layout, moved]), self.some)
        return moved if both[1] < both[0] else layout

    def _descend(self, loss: LayoutLoss, layouts: Tensor, slots: slice, steps: int, pairs: Tensor) -> Tensor:
        """Layouts (B, N, 5) with the boxes of some slots moved along the gradient of L without the prior."""
        boxes, moved = layouts[:, slots, 1:].clone().requires_grad_(), layouts.clone()
        optimiser = torch.optim.Adam([boxes], lr=self.lr, betas=(0.8, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=self.lr / 10)
        for _ in range(steps):
            moved[:, slots, 1:] = boxes.detach()
            _, gradient = loss.gradient(moved, pairs)
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


def each_class(layout: Tensor, slot: int, boxes: Tensor, classes: int) -> Tensor:
    """A packed layout (N, 5) with an object of each class in each of some boxes (K, 4): (K, classes, N, 5)."""
    tried = layout.repeat(len(boxes), classes, 1, 1)
    tried[:, :, slot, 0] = torch.arange(classes).float()
    tried[:, :, slot, 1:] = boxes[:, None]
    return tried


def _whole(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) inside the picture, with sides of at least `SMALLEST`."""
    low, high = boxes[..., :2].clamp(0, 1 - SMALLEST), boxes[..., 2:].clamp(SMALLEST, 1)
    return torch.cat([low, torch.maximum(high, low + SMALLEST)], dim=-1)
