"""The model card of an exported student: what it is, where it came from, and the exact call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from genkit import zoo
from genkit.denoisers import Denoiser
from genkit.distill import gate
from genkit.distill.spec import FewStepSpec

HERE = "path/to/this/folder"  # how the card's code names the folder that the card is in


def model_card(student: Denoiser, spec: FewStepSpec, *, lora: bool, found: Mapping[str, float], figures: Mapping[str, Any]) -> str:
    """README.md of an exported student.

    Args:
        student: of the exported pipeline; its scheduler's timesteps are set.
        lora: whether the folder holds a LoRA for the teacher.
        found: what the release gate found.
        figures: what was measured, by its name, which says how.
    """
    teacher, count = spec.teacher or "its teacher", len(spec.levels)
    data = ModelCardData(
        library_name="diffusers",
        base_model=teacher if teacher.count("/") == 1 and not Path(teacher).exists() else None,
        tags=["few-step", "distillation", spec.method, *(["lora"] if lora else [])],
    )
    guidance = "without classifier-free guidance" if spec.guidance_scale == 1 else f"with guidance_scale={spec.guidance_scale:g}"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {'An inpainting' if spec.task == 'inpaint' else 'A'} student of {Path(teacher).name} in "
        + ("1 step" if count == 1 else f"1 to {count} steps"),
        f"Distilled from `{teacher}` by {spec.method}, to be sampled {guidance}."
        + (" A LoRA: it needs its teacher's weights." if lora else ""),
        "## How to call it",
        "With diffusers. Other calls visit other levels than those it was trained at, and show it.",
        _fenced(stock_code(student, spec, lora=lora)),
        *_other_ways(student, spec),
        "## Levels",
        f"Fractions of the training time, 1 is pure noise: {', '.join(f'{u:g}' for u in spec.levels)}. "
        f"From one to the next: {spec.sampler}. `genkit_distill.json` says the same to programs.",
        "Before its release the folder was loaded again, and its samples compared with those of the trainer's sampler from the "
        f"same noise: the largest difference is {max(found.values()):.1g} of their root mean square.",
    ]
    if figures:
        rows = "\n".join(f"| {name} | {_figure(value)} |" for name, value in figures.items())
        parts += ["## Measured", f"| what and how | value |\n|---|---|\n{rows}"]
    parts += ["## Licence", f"It is a derivative of its teacher, whose licence holds for it too: {licence_of(spec.teacher)}."]
    return "\n\n".join(parts) + "\n"


def stock_code(student: Denoiser, spec: FewStepSpec, *, lora: bool) -> str:
    """Python that samples an exported student with diffusers, in each number of steps that the release gate tried."""
    pipe, scheduler = type(student.pipe).__name__, type(student.pipe.scheduler).__name__
    lines = [f"from diffusers import {', '.join(sorted([pipe, scheduler] if lora else [pipe]))}"]
    if spec.task == "inpaint":
        lines += ["from PIL import Image"]
    if lora and spec.teacher in zoo.names():
        lines += ["import genkit.zoo"]
    if student.family == "DiT":
        lines += ["from genkit.denoisers.dit import use_original_time_embedding"]
    source = f'"{HERE}"'
    if lora:
        source = f'genkit.zoo.path("{spec.teacher}")' if spec.teacher in zoo.names() else f'"{spec.teacher}"'
    lines += ["", f"pipe = {pipe}.from_pretrained({source})"]
    if lora:
        lines += [f'pipe.load_lora_weights("{HERE}")']
        lines += [f'pipe.scheduler = {scheduler}.from_pretrained("{HERE}", subfolder="scheduler")']
    if student.family == "DiT":
        lines += ["use_original_time_embedding(pipe.transformer)  # the frequencies that it was trained with"]
    if spec.task == "inpaint":
        lines += [
            'picture, mask = Image.open("picture.png").convert("RGB"), Image.open("mask.png").convert("L")  # white: to paint'
        ]
    for count in gate.counts(spec):
        steps = f"{count} step{'s' if count > 1 else ''}"
        call = gate.stock_call(student, spec, count)
        if call is None:
            lines += [f"# {pipe} cannot do it in {steps}: use genkit."]
            continue
        what = _arguments(student, call, ["image=picture", "mask_image=mask"] if spec.task == "inpaint" else [])
        lines += [f"image = pipe({what}).images[0]  # {steps}"]
    if spec.task == "inpaint":
        lines += ["image = pipe.image_processor.apply_overlay(mask, picture, image)  # what is not masked, to the pixel"]
    return "\n".join(lines)


def _other_ways(student: Denoiser, spec: FewStepSpec) -> list[str]:
    """What else can sample it; for inpainting there are the pipelines of diffusers."""
    if spec.task == "inpaint":
        return [f"The mask's edges should be at multiples of {student.factor} pixels, where latents begin."]
    return ["With genkit, which finds the levels by itself:", _fenced(_genkit_code(student, spec))]


def _genkit_code(student: Denoiser, spec: FewStepSpec) -> str:
    call = _arguments(student, {"num_inference_steps": spec.default_steps})
    load = f'from genkit.distill import load_distilled\n\npipe = load_distilled("{HERE}")'
    return f"{load}\nimage = pipe({call}).images[0]"


def _arguments(student: Denoiser, call: Mapping[str, Any], more: Sequence[str] = ()) -> str:
    """A call's arguments as code, with something to draw, and `more` of them."""
    first = {name: values[:1] for name, values in gate.subject(student).items()}
    subject = [f'"{value[0]}"' if name == "prompt" else f"{name}={value}" for name, value in first.items()]
    return ", ".join([*subject, *more] + [f"{name}={_literal(value)}" for name, value in call.items()])


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _literal(value: Any) -> str:
    return repr([round(item, 6) if isinstance(item, float) else item for item in value] if isinstance(value, list) else value)


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def licence_of(teacher: str) -> str:
    """The licence that a teacher's own card names, or that it is not known."""
    says = None
    if teacher in zoo.names() or Path(teacher).is_dir():
        card = zoo.card(teacher)
        says = card.get("licence") or card.get("license")
        readme = Path(teacher) / "README.md"
        if says is None and teacher not in zoo.names() and readme.is_file():
            says = ModelCard.load(readme, ignore_metadata_errors=True).data.license
    return str(says) if says else "it is not known here, see the teacher's page"
