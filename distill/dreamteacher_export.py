"""A distilled backbone as a checkpoint that plain timm loads, with its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from safetensors.torch import save

from genkit.distill.card import HERE, licence_of
from genkit.distill.dreamteacher_config import DreamTeacherConfig
from genkit.distill.dreamteacher_student import DreamStudent
from genkit.files import prepare_folder, write_atomic

WEIGHTS = "model.safetensors"


def export_backbone(
    student: DreamStudent, config: DreamTeacherConfig, folder: str | Path, *, figures: Mapping[str, Any] | None = None
) -> None:
    """Write model.safetensors, config.json (as timm has them on the Hub) and README.md.

    Args:
        config: of its distillation.
        figures: what was measured, by its name, which says how; for the card.

    Example:
        >>> export_backbone(student, config, "backbone")
        >>> timm.create_model("local-dir:backbone", pretrained=True, num_classes=10)
    """
    folder = Path(folder)
    prepare_folder(folder)
    network: Any = student.backbone.network
    height, width = student.backbone.size
    record = {
        "architecture": config.backbone,
        "num_classes": 0,
        "num_features": network.num_features,
        "global_pool": "avg",
        "pretrained_cfg": {
            # Pictures in [0, 1] that timm's transforms make are thereby in [-1, 1], as they were in the distillation.
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "input_size": [3, height, width],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
            "first_conv": network.pretrained_cfg.get("first_conv"),
            "classifier": network.pretrained_cfg.get("classifier"),
        },
    }
    if network.pretrained_cfg.get("fixed_input_size"):
        record["pretrained_cfg"]["fixed_input_size"] = True
        record["model_args"] = {"img_size": [height, width]}
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    write_atomic(folder / WEIGHTS, save(weights, {"format": "pt"}))
    write_atomic(folder / "config.json", (json.dumps(record, indent=2) + "\n").encode())
    write_atomic(folder / "README.md", backbone_card(student, config, figures or {}).encode())


def backbone_card(student: DreamStudent, config: DreamTeacherConfig, figures: Mapping[str, Any]) -> str:
    """README.md of an exported backbone."""
    teacher = config.teacher or "its teacher"
    height, width = student.backbone.size
    named = teacher.count("/") == 1 and not Path(teacher).exists()
    data = ModelCardData(
        library_name="timm", pipeline_tag="image-feature-extraction", tags=["dreamteacher", "distillation"],
        base_model=teacher if named else None,
    )  # fmt: skip
    network: Any = student.backbone.network
    sizes = f", img_size=({height}, {width})" if network.pretrained_cfg.get("fixed_input_size") else ""
    code = f"""import timm

features = timm.create_model("local-dir:{HERE}", pretrained=True)                        # pooled features
classifier = timm.create_model("local-dir:{HERE}", pretrained=True, num_classes=10)      # to fine-tune
pyramid = timm.create_model("local-dir:{HERE}", pretrained=True, features_only=True)     # levels
backbone = timm.create_model("{config.backbone}", num_classes=0, checkpoint_path="{HERE}/{WEIGHTS}"{sizes})"""
    learnt = f"features of its blocks {', '.join(student.regressor.places)} at t = {', '.join(map(str, config.t))}"
    if config.label:
        learnt += f", and soft labels ({config.task}) of an interpreter that was trained on {config.labelled} labelled pictures"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {config.backbone}, pretrained by DreamTeacher from {Path(teacher).name}",
        f"A backbone that learned from the diffusion model `{teacher}`: {learnt}. Method: Li et al., ICCV 2023, arXiv 2307.07487; "
        f"{config.train.steps:,} steps of {config.train.batch_size} pictures of {height} x {width} pixels, scaled to [-1, 1].",
        f"```python\n{code}\n```",
    ]
    if figures:
        rows = "\n".join(f"| {name} | {f'{v:.4g}' if isinstance(v, float) else v} |" for name, v in figures.items())
        parts += ["## Measured", f"| what and how | value |\n|---|---|\n{rows}"]
    parts += ["## Licence", f"It is derived from its teacher, whose licence may hold for it too: {licence_of(config.teacher)}."]
    return "\n\n".join(parts) + "\n"
