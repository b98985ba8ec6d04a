"""Guidance by name, for the command line: `classifier:label=seven,scale=2`.

A spec is `NAME` or `NAME:key=value,...`. Values are numbers, true/false, none, or words; several labels are separated by "+".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from genkit.errors import unknown

if TYPE_CHECKING:
    from genkit.guidance.base import Guidance


@dataclasses.dataclass(frozen=True)
class Entry:
    """A guidance that has a name: what it does, its parameters with their help, and the function that builds it."""

    summary: str
    parameters: dict[str, str]
    build: Callable[..., Guidance]


def names() -> list[str]:
    """The known guidances."""
    return list(_ENTRIES)


def describe(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: unknown; the message names the closest.
    """
    if name not in _ENTRIES:
        raise unknown("guidance", name, _ENTRIES)
    return _ENTRIES[name]


def split(spec: str) -> tuple[str, dict[str, Any]]:
    """(name, parameters) of a spec, validated against the entry but not built; needs no torch.

    Raises:
        ValueError: unknown guidance or parameter, or a malformed spec.
    """
    name, _, rest = spec.partition(":")
    entry = describe(name.strip())
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"Guidance {name!r}: {item!r} is not key=value.")
        if key not in entry.parameters:
            raise unknown(f"{name} parameter", key, entry.parameters)
        values[key] = _value(value)
    return name.strip(), values


def parse(spec: str, pipe: Any = None) -> Guidance:
    """Build the guidance that a spec names.

    Args:
        spec: for instance "classifier:label=seven,scale=2".
        pipe: the pipeline that it will steer; nothing is built that does not fit.

    Raises:
        ValueError: unknown guidance or parameter, or a value that the guidance refuses.
    """
    name, values = split(spec)
    start, stop = values.pop("start", 0.0), values.pop("stop", 1.0)
    for key, value in (("start", start), ("stop", stop), ("scale", values.get("scale", 0.0))):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"Guidance {name!r}: {key}={value!r} is not a number.")
    try:
        guidance = describe(name).build(pipe, **values)
    except TypeError as error:
        raise ValueError(f"Guidance {name!r}: a parameter has the wrong type or is missing ({error}).") from error
    return guidance if (start, stop) == (0.0, 1.0) else guidance.between(start, stop)


def _value(text: str) -> Any:
    """A number, truth value or None if the text is one, else the text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _classifier(
    pipe: Any,
    *,
    label: Any = None,
    model: str = "digits-classifier",
    attribute: str | None = None,
    scale: float | None = None,
    preset: str = "default",
    tau1: float = 1.0,
    tau2: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    m: float = 0.004,
    route: str = "x0_detached",
    preprocess: str = "none",
    size: int | None = None,
) -> Guidance:
    """Builds `ClassifierGuidance` or one of the paper's two presets; what is None takes the preset's default."""
    from genkit.classifiers import load_classifier
    from genkit.guidance import elucd

    if label is None:
        raise ValueError("Guidance 'classifier' needs label=NAME or label=INDEX, for instance classifier:label=seven.")
    if preset not in elucd.PRESETS:
        raise ValueError(f"Guidance 'classifier': unknown preset {preset!r}. Use one of: {', '.join(elucd.PRESETS)}.")
    network = load_classifier(model)
    if pipe is not None:
        network.to(pipe.device)
    target = label.split("+") if isinstance(label, str) else label
    return elucd.from_preset(
        preset, network, target, scale=scale, tau1=tau1, tau2=tau2, softplus_beta=beta, gamma=gamma, m=m,
        route=route, attribute=attribute, preprocess=preprocess, size=size,
    )  # fmt: skip


_ENTRIES: dict[str, Entry] = {
    "classifier": Entry(
        "steer to a class with an off-the-shelf classifier (EluCD)",
        {
            "label": "class name or index; several as a+b, one for each sample",
            "model": "an embedded classifier, a folder, timm:NAME, torchvision:NAME or transformers:FOLDER",
            "attribute": "which attribute of an embedded classifier: digit, ink or paper",
            "scale": "weight of the gradient",
            "preset": "default (any sampler), ddpm or edm (the paper's two algorithms)",
            "tau1": "temperature of the target's logit",
            "tau2": "temperature of the normaliser; 0 is the joint direction",
            "beta": "swap ReLU for Softplus(beta) in the gradient",
            "gamma": "height of the sine schedule",
            "m": "largest relative displacement, preset edm",
            "route": "x0_detached or through_denoiser",
            "preprocess": "none or imagenet",
            "size": "resize to this many pixels for the classifier",
            "start": "begin at this fraction of the run",
            "stop": "end at this fraction of the run",
        },
        _classifier,
    ),
}
