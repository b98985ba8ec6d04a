"""GLIGEN: Stable Diffusion whose blocks also attend to objects, a phrase and a box each.

Li et al., GLIGEN: Open-Set Grounded Text-to-Image Generation, 2023, arXiv 2301.07093. The fuser is on at every step; diffusers' own
pipeline switches it off after the first 30 % (`gligen_scheduled_sampling_beta`, section 3.3 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.denoisers.base import Cond
from genkit.denoisers.stable_diffusion import StableDiffusionDenoiser
from genkit.denoisers.text import Prompts
from genkit.layouts.grounding import Grounding
from genkit.layouts.layout import Layout
from genkit.levels import Level

SLOTS = 30  # objects, as diffusers' pipeline has it
_TENSORS = ("boxes", "phrase_embeds", "present")


class GligenDenoiser(StableDiffusionDenoiser):
    """Tensors: `prompt_embeds` (B, L, D), and of the objects `boxes` (B, 30, 4), `phrase_embeds` (B, 30, D), `present` (B, 30).

    Example:
        >>> layout = Layout(["a cat", "a dog"], [(0.1, 0.2, 0.5, 0.8), (0.5, 0.2, 0.9, 0.9)])
        >>> cond = denoiser.condition("two pets on a sofa", layouts=layout)
    """

    family = "GLIGEN"
    classes = ("StableDiffusionGLIGENPipeline",)
    cross_attended = ()  # objects reach the network elsewhere

    def condition(
        self,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
        *,
        grad: bool = False,
        layouts: Layout | Sequence[Layout] | None = None,
        **embeds_and_options: Any,
    ) -> Cond:
        """Conditioning from prompts, as Stable Diffusion's, and from layouts, whose labels are phrases: one for all, or B.

        Raises:
            ValueError: as Stable Diffusion; labels that are no texts, more objects than 30, another number of layouts.
        """
        text = super().condition(prompts, negative_prompts, grad=grad, **embeds_and_options)
        given = [Layout([], [])] if layouts is None else [layouts] if isinstance(layouts, Layout) else list(layouts)
        if len(given) not in (1, len(text)):
            raise ValueError(f"There are {len(given)} layouts for {len(text)} prompts. Give one for all, or one for each.")
        objects = self._objects(given)
        objects = {name: value.expand(len(text), *value.shape[1:]) for name, value in objects.items()}
        null = (
            None if text.null_tensors is None else text.null_tensors | objects | {"present": torch.zeros_like(objects["present"])}
        )
        return Cond(text.tensors | objects, null)

    def grounding(self, class_names: Sequence[str] | None = None, prompt: str = "") -> Grounding:
        """Layouts of some phrases, beside a prompt; differentiable in the boxes."""
        if not class_names:
            raise ValueError("GLIGEN can find anything: say what. Give the phrases to look for as labels.")
        table, text = self._phrases(list(class_names)), super().condition(prompt)

        def condition(packed: Tensor) -> Cond:
            present = (packed[..., 0] >= 0).to(packed)
            padded = [torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, SLOTS - packed.shape[1])) for value in (
                packed[..., 1:], table[packed[..., 0].long().clamp(min=0)] * present[..., None], present)]  # fmt: skip
            rows = {name: value.expand(len(packed), *value.shape[1:]) for name, value in text.tensors.items()}
            return Cond(rows | dict(zip(_TENSORS, padded, strict=True)))

        return Grounding(list(class_names), SLOTS, condition)

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        objects = dict(zip(("boxes", "positive_embeddings", "masks"), (tensors[name] for name in _TENSORS), strict=True))
        return self.network(
            z, self._time(z, level), encoder_hidden_states=tensors["prompt_embeds"], cross_attention_kwargs={"gligen": objects}
        ).sample

    def _objects(self, layouts: list[Layout]) -> dict[str, Tensor]:
        """The tensors of the objects of some layouts."""
        phrases = [label for layout in layouts for label in layout.labels]
        wrong = [phrase for phrase in phrases if not isinstance(phrase, str)]
        most = max(len(layout.labels) for layout in layouts)
        if wrong or most > SLOTS:
            problem = f"has the label {wrong[0]!r}" if wrong else f"has {most} objects"
            raise ValueError(f"A layout {problem}, but GLIGEN takes at most {SLOTS} objects with a phrase each.")
        known = list(dict.fromkeys(map(str, phrases)))
        table = self._phrases(known) if known else torch.zeros(1, self.network.config.cross_attention_dim, device=self.device)
        boxes, embeds = table.new_zeros(len(layouts), SLOTS, 4), table.new_zeros(len(layouts), SLOTS, table.shape[1])
        present = table.new_zeros(len(layouts), SLOTS)
        for i, layout in enumerate(layouts):
            for k, (label, box) in enumerate(zip(layout.labels, layout.boxes, strict=True)):
                boxes[i, k], embeds[i, k], present[i, k] = torch.tensor(box), table[known.index(str(label))], 1
        return dict(zip(_TENSORS, (boxes, embeds, present), strict=True))

    @torch.no_grad()
    def _phrases(self, phrases: list[str]) -> Tensor:
        """Pooled embeddings (K, D) of phrases."""
        tokens = self.pipe.tokenizer(phrases, padding=True, truncation=True, return_tensors="pt").to(self.device)
        return self.pipe.text_encoder(**tokens).pooler_output
