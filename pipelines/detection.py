"""LayoutInversionPipeline: a layout-to-image diffusion model as an object detector."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence, Sized
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from genkit.attention.proof import Proof
from genkit.denoisers.modes import evaluating
from genkit.inversion.layout_loss import LayoutLoss
from genkit.inversion.layout_search import LayoutSearch, each_class, without_slot
from genkit.layouts.grounding import Grounding
from genkit.layouts.layout import Layout, unpack
from genkit.pipelines.base import HostedPipeline
from genkit.pipelines.layout import LayoutPriorPipeline
from genkit.pipelines.pictures import Images, is_single, pictures
from genkit.scoring import PairPlan

PLAN = PairPlan(count=24, weighting="elbo", span=(0.15, 0.75))


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in one picture, the surest first.

    Args:
        layout: class names and boxes x0, y0, x1, y1 from 0 to 1, in units of the picture that the model saw.
        scores: of each object, its probability against no object and against every other class in its place, all others as they
            are, from 0 to 1.
        gains: by how many nats each object lowers L: the log of the leave-one-out likelihood ratio, with the prior's part.
        nats: L of the layout against that of the empty one; negative is better.
        evaluations: of the network; a backward pass counts as one.
        trace: layouts that were passed on the way.
    """

    layout: Layout
    scores: list[float]
    gains: list[float]
    nats: float
    evaluations: int
    trace: list[Layout]


@dataclasses.dataclass
class LayoutInversionOutput(BaseOutput):
    """What `LayoutInversionPipeline` returns: `detections`, one for each picture; None where the call was interrupted before."""

    detections: list[Detections | None]


class LayoutInversionPipeline(HostedPipeline):
    """Detects objects by inverting a layout-to-image model: the layout that explains the picture best (DIVE, arXiv 2504.17253).

    No network was trained to detect. See `HostedPipeline` for `from_pipe`, `from_pretrained`, and what else the wrapper has, and
    `genkit.inversion.layout_search` for the search.

    Example:
        >>> pipe = LayoutInversionPipeline.from_pretrained("scenes")
        >>> out = pipe(images, prior=LayoutPriorPipeline.from_pretrained(genkit.zoo.path("scenes-prior")))
        >>> out.detections[0].layout, out.detections[0].scores
    """

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of what the model sees, in pixels."""
        _, height, width = self.denoiser.latent_shape(None, None)
        return width * self.denoiser.factor, height * self.denoiser.factor

    @torch.no_grad()
    def __call__(
        self,
        images: Images,
        labels: Sequence[str] | None = None,
        prior: LayoutPriorPipeline | None = None,
        beta: float = 1.0,
        search: LayoutSearch | None = None,
        plan: PairPlan | None = None,
        nms: float = 0.5,
        temperature: float = 1.0,
        batch_size: int = 64,
        return_dict: bool = True,
        callback: Callable[[LayoutInversionPipeline, int, Detections], None] | None = None,
    ) -> LayoutInversionOutput | tuple[Any, ...]:
        """Detect objects.

        Results depend on neither the batch size nor the order of images (to rounding).

        Args:
            images: a picture or an iterable of them; PIL images and arrays of uint8 are scaled to cover the model's size and cut to
                its centre, what comes as floats must have it.
            labels: classes to find, by default all that the model knows; of an open-vocabulary model (GLIGEN) phrases.
            prior: of layouts of these classes; None has none.
            beta: weight of the prior's nats.
            search: how layouts are searched.
            plan: which pairs of noise level and noise are scored; `PLAN` by default.
            nms: IoU from which the less sure of two objects of one class is left out.
            temperature: of the scores; does not change which layout is found.
            batch_size: network evaluations at a time.
            callback: called as `callback(pipe, index, detections)` after each picture.

        Returns:
            `LayoutInversionOutput`, or a tuple of its values with `return_dict=False`.

        Raises:
            ValueError: a model without a layout condition, a class that it lacks, images that do not fit, a prior of other classes
                or with fewer slots, numbers out of range.
        """
        search, plan = search or LayoutSearch(), plan or PLAN
        grounding = self.denoiser.grounding(labels)
        self._check(grounding, prior, beta, search, plan, nms, temperature)
        self._interrupt = False
        found: list[Detections | None] = []
        total = len(images) if isinstance(images, Sized) and not is_single(images) else math.inf
        proof = Proof(self.host, known=self._audited)
        with proof, evaluating(self.denoiser.network), self.host.progress_bar(total=total) as bar:
            for index, picture in enumerate(pictures(images, (3, *self.picture_size[::-1]))):
                if self._interrupt:
                    found.append(None)
                    continue
                x0 = self.denoiser.encode(picture[None].to(self.denoiser.device))[0]
                loss = LayoutLoss(self.denoiser, grounding, x0, plan, prior=prior, beta=beta, batch_size=batch_size)
                detections = self._detect(loss, search, nms, temperature)
                found.append(detections)
                bar.update()
                if callback is not None:
                    callback(self, index, detections)
        if not found:
            raise ValueError("There are no images. Give at least one.")
        self.attention = proof.to_dict()
        self.host.maybe_free_model_hooks()
        output = LayoutInversionOutput(detections=found)
        return output if return_dict else output.to_tuple()

    def _detect(self, loss: LayoutLoss, search: LayoutSearch, nms: float, temperature: float) -> Detections:
        names = loss.grounding.class_names
        layout, trace = search(loss, loss.grounding.slots, len(names))
        scores, gains = _scored(loss, layout, len(names), temperature)
        kept = _suppressed(layout, scores, nms)
        empty = layout.clone()
        empty[:, 0] = -1
        nats = loss(torch.stack([layout, empty]))
        return Detections(
            layout=unpack(layout[kept][None], names)[0],
            scores=scores[kept].tolist(),
            gains=gains[kept].tolist(),
            nats=float(nats[0] - nats[1]),
            evaluations=loss.evaluations,
            trace=unpack(torch.stack(trace), names),
        )

    def _check(
        self, grounding: Grounding, prior: LayoutPriorPipeline | None, beta: float, search: LayoutSearch, plan: PairPlan,
        nms: float, temperature: float,
    ) -> None:  # fmt: skip
        if not 0 <= beta < math.inf or not 0 < temperature < math.inf or not 0 < nms <= 1:
            raise ValueError(f"beta={beta} must not be negative, temperature={temperature} positive, and nms={nms} from 0 to 1.")
        if max(search.few, search.some) > plan.count:
            wanted = max(search.few, search.some)
            raise ValueError(f"The search wants {wanted} pairs, but the plan has {plan.count}. Give PairPlan a larger count.")
        if prior is None:
            return
        if plan.weighting != "elbo":
            raise ValueError('The prior is in nats, which these weights do not make. Give PairPlan(weighting="elbo").')
        config = prior.transformer.config
        if list(config.class_names) != grounding.class_names:
            raise ValueError(
                f"The prior knows {', '.join(config.class_names)}, the labels are {', '.join(grounding.class_names)}. Train a "
                "prior on these, in their order: genkit train layout-prior."
            )
        if config.slots < grounding.slots:
            raise ValueError(f"The prior has {config.slots} slots, the model {grounding.slots}. Train one with as many.")


def _scored(loss: LayoutLoss, layout: Tensor, classes: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Scores and gains (K,) of the objects of a layout."""
    count = int((layout[:, 0] >= 0).sum())
    scores, gains = torch.zeros(count), torch.zeros(count)
    for slot in range(count):
        tried = each_class(layout, slot, layout[slot : slot + 1, 1:], classes)[0]
        values = loss(torch.cat([tried, without_slot(layout, slot)[None]]))
        own = int(layout[slot, 0])
        scores[slot] = torch.softmax(-values / temperature, 0)[own]
        gains[slot] = values[-1] - values[own]
    return scores, gains


def _suppressed(layout: Tensor, scores: Tensor, nms: float) -> Tensor:
    """Slots that are kept, the surest first."""
    from torchvision.ops import batched_nms

    count = len(scores)
    return batched_nms(layout[:count, 1:], scores, layout[:count, 0].long(), nms)
