"""Is a model folder safe and whole? Answered from file headers, before anything is loaded.

Safe: weights are safetensors; a pickle is refused unless it was asked for. Whole: no file is truncated, every component has
weights, and shapes are those of the configuration. The last check builds each component on the meta device (no memory), so it
imports torch and diffusers; the others do not.
"""

from __future__ import annotations

import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

WEIGHTS = (".safetensors",)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Components of a pipeline that carry no weights, by the end of their class name.
_WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor", "ProcessorFast")


def check_folder(path: str | Path, allow_pickle: bool = False, *, shapes: bool = True) -> None:
    """Check a diffusers pipeline folder (`model_index.json`) or a model folder (`config.json`).

    Args:
        allow_pickle: accept `.bin` weights where a component has nothing else; they must be loaded with `weights_only=True`.
        shapes: compare tensor shapes with the configuration too (imports torch and diffusers).

    Raises:
        FileNotFoundError: the folder is missing, or is no model folder.
        ValueError: the path is a file, a component is missing, or a checkpoint is truncated, no safetensors, lacks tensors or has
            wrong shapes.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{str(path)!r} is a file. Give a folder in diffusers' layout, as save_pretrained(FOLDER) writes it.")
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path)!r}.")
    for component, (library, class_name) in components(folder).items():
        if class_name.endswith(_WEIGHTLESS):
            _require_folder(component)
            continue
        tensors = _tensors(component, allow_pickle)
        if shapes and tensors is not None:
            _check_shapes(component, library, class_name, tensors)


def components(folder: Path) -> dict[Path, tuple[str, str]]:
    """(library, class) of each component folder; the folder itself for a single model."""
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        # [library, class] is a component, [null, null] one that is left out, anything else a setting.
        pairs = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and all(v)}
        for name, pair in pairs.items():
            if Path(name).name != name or not all(isinstance(part, str) for part in pair):
                raise ValueError(f"The component {name!r:.100} of {str(folder)!r} is damaged: {pair!s:.100}. Get the model again.")
        return {folder / k: (v[0], v[1]) for k, v in pairs.items()}
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        library = "diffusers" if "_class_name" in config else "transformers"
        name = config.get("_class_name") or config.get("architectures") or "AutoModel"
        name = name[0] if isinstance(name, list) else name
        if not isinstance(name, str):
            raise ValueError(f"{str(folder / 'config.json')!r} does not say its class. The model is damaged: get it again.")
        return {folder: (library, name)}
    raise FileNotFoundError(f"{str(folder)!r} is no model folder: it has neither model_index.json nor config.json.")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object of a model's file.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}). The model is damaged: get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} is not a JSON object. The model is damaged: get it again.")
    return content


def load_pt(file: Path, device: Any = "cpu") -> Any:
    """What `torch.save` wrote to a file: tensors and plain values, and nothing that runs.

    An archive whose entries are packed or overlap is refused: torch writes numbers as they are, but unpacks any size of them.

    Raises:
        ValueError: the file is damaged, holds something else, or is packed.
        OSError: it cannot be opened.
    """
    import torch

    try:
        with file.open("rb") as stream:
            if stream.read(4) == b"PK\3\4":  # else it is of old torch, without an archive
                with zipfile.ZipFile(stream) as archive:
                    entries = archive.infolist()
                packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                if packed or sum(entry.file_size for entry in entries) > file.stat().st_size:
                    raise ValueError("its archive is packed, which torch never does")
        return torch.load(file, map_location=device, weights_only=True)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _require_folder(component: Path) -> None:
    if not component.is_dir():
        raise ValueError(f"The model's component {component.name!r} is missing: there is no folder {str(component)!r}.")


def _tensors(component: Path, allow_pickle: bool) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a component's tensors, from safetensors headers; None if it is an accepted pickle."""
    _require_folder(component)
    files = sorted(p for p in component.iterdir() if p.suffix in WEIGHTS)
    if not files:
        pickles = sorted(p.name for p in component.iterdir() if p.suffix in PICKLES)
        if not pickles:
            raise ValueError(
                f"The component {component.name!r} has no weights: there is no safetensors file in {str(component)!r}."
            )
        if not allow_pickle:
            raise ValueError(
                f"The weights {str(component / pickles[0])!r} are a pickle, which can run code when it is loaded. "
                "Convert them to safetensors, or pass --allow-pickle (allow_pickle=True) if you trust their source."
            )
        return None
    shards = [component / name for index in component.glob("*.safetensors.index.json") for name in _shards(index)]
    missing = [file.name for file in shards if file not in files]
    if missing:
        raise ValueError(f"The weights {str(component)!r} lack the shard {missing[0]!r}. Download the model again.")
    tensors: dict[str, tuple[int, ...]] = {}
    for file in files:
        tensors |= read_shapes(file)
    return tensors


def _shards(index: Path) -> set[str]:
    table = read_json(index).get("weight_map", {})
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{str(index)!r} does not say where the weights are. The model is damaged: get it again.")
    return set(table.values())


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file; reads its header only.

    Raises:
        ValueError: truncated, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as weights:
            return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(
            f"The weights {str(file)!r} are truncated or not safetensors ({error}). Download or train the model again."
        ) from error


def _check_shapes(component: Path, library: str, class_name: str, tensors: dict[str, tuple[int, ...]]) -> None:
    """Compare with the component built from its configuration on the meta device."""
    try:
        model = on_meta(component, library, class_name, most=10 * (len(tensors) + 100))
    except Exception as error:  # a constructor with values that it never expected raises almost anything
        raise ValueError(
            f"The configuration of {component.name!r} makes no {class_name} ({type(error).__name__}: {error!s:.200}). "
            f"Check config.json in {str(component)!r}, or get the model again."
        ) from error
    if model is None:
        return
    for name, tensor in model.state_dict().items():
        shape = tensors.get(name, tuple(tensor.shape))
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"The weights of {component.name!r} do not fit its configuration: {name} is {shape}, not {tuple(tensor.shape)}. "
                f"Check config.json in {str(component)!r}, or get the model again."
            )
    # Libraries rename tensors when they load old files, so it is sizes, not names, that say whether something is missing.
    expected, found = sum(p.numel() for p in model.parameters()), sum(_numel(s) for s in tensors.values())
    if found < expected:
        raise ValueError(
            f"The weights of {component.name!r} have {found:,} numbers but its configuration needs {expected:,}. "
            f"Check config.json in {str(component)!r}, or get the model again."
        )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def on_meta(component: Path, library: str, class_name: str, *, most: int = 100_000) -> Any:
    """The component without memory; None if its class cannot be told or its weights are quantised (packed shapes).

    Args:
        most: parameters, after which the configuration is taken for damaged: it must not ask for layers without end.
    """
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    cls = _find_class(library, class_name)
    if cls is None or "quantization_config" in read_json(component / "config.json"):
        return None
    left = itertools.count(most, -1)

    def count(*_: Any) -> None:
        if next(left) <= 0:
            raise ValueError(f"it asks for more than {most:,} tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            if hasattr(cls, "load_config"):  # diffusers
                return cls.from_config(cls.load_config(component))
            return cls(cls.config_class.from_pretrained(component))
    finally:
        hook.remove()


def _find_class(library: str, class_name: str) -> Any:
    """A class of diffusers, transformers or genkit; nothing else is imported on a file's word."""
    if library not in ("diffusers", "transformers"):
        return None
    import diffusers
    import transformers

    import genkit.classifiers

    for module in (diffusers if library == "diffusers" else transformers, genkit.classifiers):
        if hasattr(module, class_name):
            return getattr(module, class_name)
    return None
