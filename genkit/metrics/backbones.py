"""Networks whose features metrics compare: the judge, Inception v3, DINOv2, or that of a folder. Nothing is downloaded.

A backbone gets pictures of its own size in [-1, 1] and gives a vector for each.

    judge       `digits-judge`, 128 features of 32 x 32: for `digits` and what resembles them
    inception   torchvision's Inception v3, 2,048 pooled features of 299 x 299. Its weights are not those of the published FID
                (a port of TensorFlow's), so compare its distances with each other only
    dinov2      ViT-L/14 of DINOv2 (Oquab et al. 2023), the class token, 1,024 features of 224 x 224, as Stein et al. 2023
                (arXiv 2306.04675) recommend it
    timm:NAME   any other network of timm, pooled
    FOLDER      an `AttributeClassifier`, a vision model of timm or transformers (pooled, or the class token; of CLIP the image
                features), or a diffusion pipeline, of which the middle block is read at timestep 100 (`genkit.features`)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.checkpoints import load_pt
from genkit.errors import unknown

NAMES = ("judge", "inception", "dinov2")
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_T = 100  # timestep at which a diffusion network is read


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network as features of pictures.

    Args:
        name: for people.
        network: frozen, in eval mode; its weights identify it.
        run: `pictures (B, 3, h, w) in [-1, 1] -> (B, D)`.
        size: (h, w) of the pictures.
        dimensions: D.

    Example:
        >>> backbone = load_backbone("judge")
        >>> backbone(images)                                # (B, 128), images (B, 3, 32, 32) in [-1, 1]
    """

    name: str
    network: nn.Module
    run: Callable[[Tensor], Tensor]
    size: tuple[int, int]
    dimensions: int

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D), float32 on the CPU.

        Raises:
            ValueError: pictures of another size.
        """
        if images.shape[-2:] != self.size:
            raise ValueError(f"{self.name} takes pictures of {self.size}, not {tuple(images.shape[-2:])}. Resize them.")
        with torch.no_grad():
            return self.run(images.to(next(self.network.parameters()).device)).float().cpu()

    def identity(self) -> str:
        """A hash of name, size and all weights."""
        digest = hashlib.sha256(json.dumps([self.name, self.size, self.dimensions]).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_backbone(name: str | Path, device: str = "cpu") -> Backbone:
    """A backbone by name or folder, see above.

    Raises:
        ValueError: unknown name, or a folder that holds no network of pictures.
        FileNotFoundError: weights that are not on this machine; the message says where they are looked for and how to get them.
        ImportError: timm is needed and not installed.
    """
    text = str(name)
    if text == "judge":
        from genkit import zoo

        found = _attributes(text, zoo.path("digits-judge"))
    elif text == "inception":
        found = _inception()
    elif text == "dinov2" or text.startswith("timm:"):
        found = _timm_by_name(text, DINOV2 if text == "dinov2" else text.removeprefix("timm:"))
    elif Path(text).is_dir():
        found = _folder(Path(text), device)
    else:
        raise unknown("features", text, [*NAMES, "timm:NAME", "a folder"])
    found.network.eval().requires_grad_(False).to(device)
    return found


def _attributes(name: str, folder: Path) -> Backbone:
    from genkit.classifiers import AttributeClassifier

    network = AttributeClassifier.from_pretrained(folder, dtype=torch.float32)
    side = network.config.sample_size
    return _measured(name, network, network.features, (side, side))


def _inception() -> Backbone:
    from torchvision.models import Inception_V3_Weights, inception_v3

    url = Inception_V3_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        raise FileNotFoundError(f"The weights of inception are not here: put {url} into {str(file.parent)!r}, or use judge.")
    network = inception_v3(weights=None, init_weights=False, aux_logits=True, transform_input=True)
    network.load_state_dict(load_pt(file))
    network.fc, network.AuxLogits = nn.Identity(), None
    return _measured("inception", network, _normalised(network, IMAGENET_MEAN, IMAGENET_STD), (299, 299))


def _timm_by_name(name: str, model: str) -> Backbone:
    """A network of timm with the weights that the cache of the Hub has."""
    timm = _import_timm(name)
    if not timm.is_model(model):
        raise unknown("model of timm", model, timm.list_pretrained())
    from huggingface_hub import try_to_load_from_cache

    repository = timm.get_pretrained_cfg(model).hf_hub_id or f"timm/{model}"
    file = try_to_load_from_cache(repository, "model.safetensors")
    if not isinstance(file, str):
        raise FileNotFoundError(
            f"The weights of {name} are not here: the cache of the Hub has no {repository}. "
            f"Get them with `hf download {repository}`, or use judge."
        )
    sizes = {"img_size": 224} if model == DINOV2 else {}
    return _timm(name, timm.create_model(model, pretrained=True, pretrained_cfg_overlay={"file": file}, num_classes=0, **sizes))


def _timm(name: str, network: Any) -> Backbone:
    import timm

    config = timm.data.resolve_model_data_config(network)
    side = getattr(getattr(network, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    return _measured(name, network, _normalised(network, config["mean"], config["std"]), (side[0], side[1]))


def _folder(folder: Path, device: str) -> Backbone:
    from genkit.checkpoints import check_folder

    if (folder / "model_index.json").is_file():
        check_folder(folder)
        return _diffusion(folder, device)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = {key: config.get(key) for key in ("_class_name", "architecture", "model_type")}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(folder)!r} holds no network: config.json is missing or is no JSON object.") from error
    check_folder(folder, shapes=named["_class_name"] is not None)
    if named["_class_name"] == "AttributeClassifier":
        return _attributes(folder.name, folder)
    if named["architecture"] is not None:
        timm = _import_timm(str(folder))
        return _timm(folder.name, timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0))
    if named["model_type"] is None:
        raise ValueError(f"{str(folder)!r} holds {named['_class_name'] or 'nothing'} that gives features of pictures.")
    return _transformers(folder)


def _transformers(folder: Path) -> Backbone:
    from transformers import AutoImageProcessor, AutoModel

    network = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    vision = getattr(network.config, "vision_config", network.config)
    if not hasattr(vision, "image_size"):
        raise ValueError(f"{str(folder)!r} holds a {type(network).__name__}, which is no network of pictures.")
    try:
        config, _ = AutoImageProcessor.get_image_processor_dict(folder, local_files_only=True)
    except (OSError, AttributeError):
        config = {}
    mean, std = config.get("image_mean") or IMAGENET_MEAN, config.get("image_std") or IMAGENET_STD

    def read(pixels: Tensor) -> Tensor:
        found = network.get_image_features(pixels) if hasattr(network, "get_image_features") else network(pixel_values=pixels)
        if isinstance(found, Tensor):
            return found
        pooled = getattr(found, "pooler_output", None)
        return (found.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)

    return _measured(folder.name, network, _normalised(read, mean, std), (vision.image_size, vision.image_size))


def _diffusion(folder: Path, device: str) -> Backbone:
    from genkit.features import FeatureExtractor
    from genkit.runner import load

    pipe = load(str(folder), device=device)  # all of it: the null prompt is encoded there
    extractor = FeatureExtractor(pipe.denoiser, "mid", t=_T, pool="mean")
    networks = nn.ModuleDict({"network": pipe.denoiser.network} | ({} if getattr(pipe, "vae", None) is None else {"vae": pipe.vae}))
    return _measured(folder.name, networks, lambda images: extractor(images)["mid"], extractor.size)


def _normalised(run: Callable[[Tensor], Tensor], mean: Any, std: Any) -> Callable[[Tensor], Tensor]:
    """`run` on pictures in [-1, 1] instead of normalised ones."""
    center, spread = (torch.tensor(list(v)).reshape(3, 1, 1) for v in (mean, std))
    return lambda images: run((images / 2 + 0.5 - center.to(images)) / spread.to(images))


def _measured(name: str, network: nn.Module, run: Callable[[Tensor], Tensor], size: tuple[int, int]) -> Backbone:
    """With the number of features, which one picture tells."""
    network.eval()
    with torch.no_grad():
        return Backbone(name, network, run, size, run(torch.zeros(1, 3, *size, device=next(network.parameters()).device)).shape[1])


def _import_timm(what: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{what} needs timm. Install it with: pip install 'genkit-diffusion[train]'") from error
    return timm
