"""A trained student as an ordinary diffusers pipeline, or as a LoRA for its teacher, that samples as it was trained.

What is written passes the release gate (`genkit.distill.gate`) or does not appear at all.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoPipelineForInpainting, DDIMPipeline, DDPMPipeline, DiffusionPipeline
from safetensors import SafetensorError

from genkit.denoisers import Denoiser
from genkit.denoisers.base import network_name
from genkit.denoisers.registry import find
from genkit.distill import gate
from genkit.distill.card import model_card
from genkit.distill.schedule import scheduler_for
from genkit.distill.spec import FewStepSpec
from genkit.distill.trained import LORA_FILE
from genkit.errors import unknown
from genkit.files import prepare_folder
from genkit.pipelines import GuidedPipeline

FORMATS = ("pipeline", "lora")
# Whose inpainting pipelines take mask and masked latents as channels behind the sample.
PAINTERS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")


def export_pipeline(
    teacher: DiffusionPipeline | GuidedPipeline,
    network: Any,
    spec: FewStepSpec,
    out: str | Path,
    *,
    format: str = "pipeline",
    dtype: torch.dtype = torch.float32,
    figures: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Write a student to a folder: weights, scheduler, `genkit_distill.json`, model card.

    Args:
        teacher: the pipeline that it was distilled from, in float32; its text encoders and VAE are written too. Left as it is.
        network: the student's network, with LoRA adapters or without. Adapters are merged in a "pipeline", and all there is in a
            "lora".
        spec: its levels and sampler.
        out: the folder; it must not exist, or be empty.
        format: "pipeline", for `DiffusionPipeline.from_pretrained` and `GuidedPipeline.from_pretrained`; or "lora", for
            `load_lora_weights` on the teacher and for `load_distilled`.
        dtype: of the weights that are written. The gate runs in float32 with weights rounded to it.
        figures: what was measured, for the model card: {"what and how": value}.

    Returns:
        The largest differences that the gate found, by "stock, 1 step", "genkit, 1 step", ...

    Raises:
        ValueError: what was written does not sample as the trainer does, and by how much; `out` has something in it; a network
            without adapters for a "lora"; a family whose stock pipeline loads no LoRA, or for which diffusers has no few-step
            scheduler, or no pipeline for an inpainting student. Nothing is left behind.
        OSError: it cannot be written.

    Example:
        >>> export_pipeline(teacher, student.network, spec, "turbo")
        >>> StableDiffusionPipeline.from_pretrained("turbo")("a red seven", num_inference_steps=1, guidance_scale=1)
    """
    host = teacher.host if isinstance(teacher, GuidedPipeline) else teacher
    out = Path(out)
    _check(host, network, spec, out, format)
    scheduler = scheduler_for(host.scheduler, spec.levels, spec.sampler)
    network = copy.deepcopy(network).float().eval().requires_grad_(False)
    with _appearing(out) as folder:
        if format == "lora":
            _write_lora(host, network, folder, dtype)
            scheduler.save_pretrained(folder / "scheduler")
            student = find(host)(_with(host, network, host.scheduler))
            exported = _with_lora(_with(host, copy.deepcopy(Denoiser.of(host).network), host.scheduler), folder)
        else:
            if _has_adapters(network):
                network.fuse_lora()
                network.unload_lora()
            pipe = _with(host, network, scheduler)
            if spec.task == "inpaint":
                pipe = AutoPipelineForInpainting.from_pipe(pipe)
            pipe = _write_pipeline(pipe, folder, dtype)
            student = find(host)(_with(pipe, network, host.scheduler))
            exported = type(pipe).from_pretrained(folder, dtype=torch.float32).to(host.device)
        spec.save(folder)
        found = _pass_gate(student, exported, spec)
        card = model_card(type(student)(exported), spec, lora=format == "lora", found=found, figures=figures or {})
        (folder / "README.md").write_text(card, encoding="utf-8")
    return found


def load_distilled(folder: str | Path, teacher: str | Path | None = None, **arguments: Any) -> GuidedPipeline:
    """A student that `export_pipeline` wrote, in either format, ready to sample.

    Args:
        teacher: where the teacher of a LoRA is, by default what the student says.
        **arguments: for `GuidedPipeline.from_pretrained`.

    Raises:
        FileNotFoundError: the folder holds no exported student.
        ValueError, OSError: the student or its teacher cannot be loaded.

    Example:
        >>> load_distilled("turbo")("a red seven", num_inference_steps=1).images
    """
    folder = Path(folder)
    spec = FewStepSpec.load(folder)
    if spec is None:
        raise FileNotFoundError(f"{str(folder)!r} holds no exported student: there is no genkit_distill.json.")
    if (folder / "model_index.json").is_file():
        return GuidedPipeline.from_pretrained(folder, **arguments)
    pipe = GuidedPipeline.from_pretrained(teacher or spec.teacher, **arguments)
    pipe = GuidedPipeline.from_pipe(_with_lora(pipe.host, folder))
    pipe.student = spec
    return pipe


def _check(host: DiffusionPipeline, network: Any, spec: FewStepSpec, out: Path, format: str) -> None:
    """What can be refused before anything is copied."""
    name = type(host).__name__
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if format == "lora" and not _has_adapters(network):
        raise ValueError("The student has no LoRA adapters: all its weights were trained. Use --format pipeline.")
    if format == "lora" and not hasattr(host, "save_lora_weights"):
        raise ValueError(f"{name} of diffusers loads no LoRA. Use --format pipeline, which merges it.")
    if spec.task == "inpaint" and name not in PAINTERS:
        raise ValueError(
            f"diffusers has no pipeline for an inpainting student of {name}, only for those of {', '.join(PAINTERS)}. "
            "Its network is in the run's checkpoint, in student_ema."
        )
    if out.is_file():
        raise NotADirectoryError(f"The output path {str(out)!r} is a file. Name a folder.")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"The output folder {str(out)!r} has something in it, and an export replaces nothing. Name another.")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name `out` at the end of the block, or vanishes with an exception."""
    prepare_folder(out.parent)
    # Beside it, since a rename is atomic within one file system only.
    folder = out.parent / f".{out.name[:100]}.{os.getpid()}.tmp"
    try:
        folder.mkdir()
        yield folder
        if out.is_dir():
            out.rmdir()  # empty, as was checked
        os.replace(folder, out)
    except SafetensorError as error:
        raise OSError(f"The weights could not be written to {str(out.parent)!r} ({error}). Is the disk full?") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with(host: DiffusionPipeline, network: Any, scheduler: Any) -> DiffusionPipeline:
    """The same pipeline with another network and scheduler; everything else is shared."""
    if isinstance(host, DDIMPipeline):  # it turns any scheduler into DDIM
        return DDPMPipeline(network, scheduler)
    pipe = copy.copy(host)
    pipe.register_modules(**{network_name(host): network, "scheduler": scheduler})
    return pipe


def _with_lora(pipe: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    """A teacher's pipeline turned into the student whose LoRA lies in a folder, in place: weights, and scheduler."""
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} of diffusers loads no LoRA, so it is not the teacher of {str(folder)!r}.")
    pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    pipe.register_modules(scheduler=getattr(diffusers, config["_class_name"]).from_config(config))
    return pipe


def _write_pipeline(pipe: DiffusionPipeline, folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Save a pipeline in a dtype; returns it in float32, with weights rounded as they were saved."""
    network = getattr(pipe, network_name(pipe))
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if dtype != torch.float32:
        # The teacher's own must not be rounded. The network is a copy already.
        modules = {name: part if part is network else copy.deepcopy(part) for name, part in modules.items()}
        pipe.register_modules(**modules)
    for module in modules.values():
        _cast(module, dtype)
    pipe.save_pretrained(folder)
    for file in folder.rglob("config.json"):
        _tidy(file)
    _tidy(folder / "model_index.json")
    for module in modules.values():
        _cast(module, torch.float32)
    return pipe


def _tidy(file: Path) -> None:
    """A configuration that names no folder of this machine, and loads in float32 unless it is told otherwise.

    diffusers notes where a component came from. transformers loads in the dtype of the file where diffusers takes float32, so a
    stock pipeline of half-precision files would mix the two.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if Path(content.get("_name_or_path") or ".").is_absolute():
        del content["_name_or_path"]
    for name in {"dtype", "torch_dtype"} & set(content):
        content[name] = "float32"
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast what is saved, in place. Not other buffers, such as position embeddings: loaded again, they are not rounded."""
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _write_lora(host: DiffusionPipeline, network: Any, folder: Path, dtype: torch.dtype) -> None:
    """Save a network's adapters in a dtype, with their rank and scale; the network's are then rounded to it."""
    from peft import get_peft_model_state_dict

    name, adapter = network_name(host), next(iter(network.peft_config))
    for key, parameter in network.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(dtype).float()
    layers = {key: value.to(dtype).contiguous() for key, value in get_peft_model_state_dict(network, adapter_name=adapter).items()}
    metadata = {f"{name}_lora_adapter_metadata": network.peft_config[adapter].to_dict()}
    host.save_lora_weights(folder, **{f"{name}_lora_layers": layers}, weight_name=LORA_FILE, **metadata)


def _pass_gate(student: Denoiser, exported: DiffusionPipeline, spec: FewStepSpec) -> dict[str, float]:
    found = {}
    for pipeline, count, difference in gate.differences(student, exported, spec):
        name = f"{pipeline}, {count} step{'s' if count > 1 else ''}"
        if not difference < gate.TOLERANCE:  # NaN fails too
            raise ValueError(
                f"The exported student differs from the trainer's sampler by {difference:.2g} ({name}), more than "
                f"{gate.TOLERANCE:g}, so it was not written. The teacher may not be the one that it was trained from."
            )
        found[name] = difference
    return found


def _has_adapters(network: Any) -> bool:
    return bool(getattr(network, "peft_config", None))
