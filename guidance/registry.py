"""Guidance by name, for the command line: `classifier:label=seven,scale=2`.

    SPEC = NAME[:key=value,...]                     a registered guidance
         | MODULE:FUNCTION[:key=value,...]          a function of the user's, see `genkit.guidance.functions`
         | path/to/FILE.py:FUNCTION[:key=value,...]

Values are numbers, true/false, none, or words; one with commas or outer spaces is quoted, `clip:text="a red, round thing"`, and in
quotes a backslash takes the next character as it is. Several labels are separated by "+". Every guidance has `start`, `stop`
(fractions of the run), `scale` and `recurrence`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from genkit.errors import unknown

if TYPE_CHECKING:
    from genkit.guidance.base import Guidance

_ITEM = re.compile(r'((?:"(?:[^"\\]|\\.)*"|[^,"])*)(,|$)', re.DOTALL)
_FUNCTION = re.compile(r"(?P<source>[\w.]+|.+?\.py):(?P<name>[^\W\d]\w*)(?::(?P<rest>.*))?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A guidance that has a name: what it does, its parameters with their help, and the function that builds it.

    `build(pipe, **values)` gets the pipeline that is steered (or None) and the values of `parameters` that were given.

    Args:
        model: what it loads if its parameter `model` is not given; None if it then loads nothing.
        texts: parameters that are free text, so that they name no file whatever they say.
    """

    summary: str
    parameters: dict[str, str]
    build: Callable[..., Guidance]
    model: str | None = None
    texts: tuple[str, ...] = ()


GENERAL = {
    "start": "begin at this fraction of the run",
    "stop": "end at this fraction of the run",
    "scale": "weight",
    "recurrence": "evaluations at each level, with fresh noise in between; 1 is once",
}
_FUNCTION_PARAMETERS = {"route": "x0_detached, through_denoiser or direct", "space": "what it sees: image or latent"}


def register_guidance(name: str, entry: Entry) -> None:
    """Give a guidance a name for specs. An entry without a parameter `scale` is multiplied by it.

    Raises:
        ValueError: the name is taken, or no name (letters, digits and "-").
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"{name!r} is no name for a guidance. Use lower-case letters, digits and '-'.")
    if name in _ENTRIES:
        raise ValueError(f"There is a guidance {name!r} already.")
    _ENTRIES[name] = entry


def names() -> list[str]:
    """The known guidances."""
    return list(_ENTRIES)


def describe(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: unknown; the message names the closest.
    """
    if name not in _ENTRIES:
        raise unknown("guidance", name, [*_ENTRIES, "MODULE:FUNCTION", "FILE.py:FUNCTION"])
    return _ENTRIES[name]


def items(text: str) -> list[str]:
    """The parts of a text between commas, without surrounding spaces; commas in double quotes do not count.

    Raises:
        ValueError: a quote that does not end.
    """
    parts, position = [], 0
    while True:
        match = _ITEM.match(text, position)
        if match is None:
            raise ValueError(f"{text!r:.100} has a quote that does not end.")
        parts.append(match[1].strip())
        position = match.end()
        if match[2] == "":
            return parts


def head(spec: str) -> tuple[str, str]:
    """(what it is, parameters) of a spec: ("classifier", "label=seven"), ("mymodule:myfunction", "scale=2")."""
    name, _, rest = spec.partition(":")
    function = _FUNCTION.fullmatch(spec.strip())
    if name.strip() not in _ENTRIES and function is not None:
        return f"{function['source']}:{function['name']}", function["rest"] or ""
    return name.strip(), rest


def split(spec: str) -> tuple[str, dict[str, Any]]:
    """(name, parameters) of a spec, validated against the entry but not built; needs no torch and imports nothing of the user's.

    Raises:
        ValueError: unknown guidance or parameter, or a malformed spec.
    """
    name, rest = head(spec)
    own = _FUNCTION_PARAMETERS if ":" in name else describe(name).parameters
    known = {**own, **GENERAL}
    values: dict[str, Any] = {}
    for item in filter(None, items(rest)):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"Guidance {name!r}: {item!r} is not key=value.")
        if key not in known:
            raise unknown(f"{name} parameter", key, known)
        values[key] = _value(value)
    return name, values


def check(spec: str) -> None:
    """Check a spec that the user gave as far as goes before a model is loaded; imports the function that it names.

    Raises:
        ValueError: see `split`; or the function cannot be used.
    """
    name, _ = split(spec)
    if ":" in name:
        from genkit.guidance import functions

        functions.load(*name.rsplit(":", 1))


def parse(spec: str, pipe: Any = None) -> Guidance:
    """Build the guidance that a spec names.

    Args:
        spec: for instance "classifier:label=seven,scale=2".
        pipe: the pipeline that it will steer; nothing is built that does not fit.

    Raises:
        ValueError: unknown guidance or parameter, or a value that the guidance refuses.
    """
    guidance, times = _parse(spec, pipe)
    return guidance if times == 1 else guidance.recurrent(times)


def parse_all(specs: Sequence[str], pipe: Any = None) -> Guidance | None:
    """The sum of the guidances that specs name, None for none; a `recurrence` of one repeats the sum.

    Raises:
        ValueError: see `parse`; or two specs want different recurrences.
    """
    if not specs:
        return None
    parts = [_parse(spec, pipe) for spec in specs]
    times = {count for _, count in parts} - {1}
    if len(times) > 1:
        raise ValueError(
            f"All guidances are repeated together, but recurrence is {' and '.join(map(str, sorted(times)))}. Give one."
        )
    total = functools.reduce(operator.add, [guidance for guidance, _ in parts])
    return total.recurrent(times.pop()) if times else total


def _parse(spec: str, pipe: Any) -> tuple[Guidance, int]:
    """A guidance without its recurrence, and that."""
    name, values = split(spec)
    for key in GENERAL:
        value = values.get(key, 0)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"Guidance {name!r}: {key}={value!r} is not a number.")
    start, stop = values.pop("start", 0.0), values.pop("stop", 1.0)
    times = values.pop("recurrence", 1)
    if not isinstance(times, int) or times < 1:
        raise ValueError(f"Guidance {name!r}: recurrence={times!r} must be a whole number of at least 1.")
    factor = 1 if ":" in name or "scale" in describe(name).parameters else values.pop("scale", 1)
    try:
        if ":" in name:
            from genkit.guidance.functions import function_guidance

            guidance = function_guidance(*name.rsplit(":", 1), **values)
        else:
            guidance = describe(name).build(pipe, **values)
    except TypeError as error:
        raise ValueError(f"Guidance {name!r}: a parameter has the wrong type or is missing ({error}).") from error
    guidance = guidance if factor == 1 else factor * guidance
    return guidance if (start, stop) == (0.0, 1.0) else guidance.between(start, stop), times


def unquote(text: str) -> str:
    """What stands between the quotes of a quoted text; any other text as it is."""
    quoted = len(text) > 1 and text.startswith('"') and text.endswith('"')
    return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL) if quoted else text


def _value(text: str) -> Any:
    """A number, truth value or None if the text is one, else the text; always a text if it is quoted."""
    if text.startswith('"'):
        return unquote(text)
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


def _clip(pipe: Any, *, text: str | None = None, **arguments: Any) -> Guidance:
    from genkit.guidance.clip import ClipGuidance

    if text is None:
        raise ValueError("Guidance 'clip' needs text=..., for instance clip:text=\"a red, round thing\".")
    guidance = ClipGuidance(str(text), **arguments)
    if pipe is not None:
        guidance.energy.network.to(pipe.device)
    return guidance


def _discriminator(
    pipe: Any,
    *,
    model: str = "digits-discriminator",
    scale: float = 1.0,
    preset: str = "default",
    w1: float | None = None,
    w2: float | None = None,
    low: float | None = None,
    high: float | None = None,
    matching: float | None = None,
    boost: float | None = None,
) -> Guidance:
    """Builds `DiscriminatorGuidance`; what is None takes the preset's default."""
    from genkit.guidance.discriminator import PRESETS, WINDOW, Boosting, DiscriminatorGuidance, load_discriminator

    discriminator = load_discriminator(model)
    if pipe is not None:
        discriminator.to(pipe.device)
    arguments: dict[str, Any] = {"window": (WINDOW[0] if low is None else low, WINDOW[1] if high is None else high)}
    if matching is not None:
        arguments["matching"] = matching
    if boost is not None:
        arguments["boosting"] = Boosting(weight=boost)
    if w1 is not None or w2 is not None:
        own = PRESETS.get(preset, {}).get("weights", (1.0, 1.0))
        arguments["weights"] = (own[0] if w1 is None else w1, own[1] if w2 is None else w2)
    return DiscriminatorGuidance.from_preset(preset, discriminator, scale=scale, **arguments)


def _noisy_classifier(
    pipe: Any, *, label: Any = None, model: str = "digits-noisy-classifier", attribute: str | None = None, scale: float = 1.0
) -> Guidance:
    from genkit.guidance.noisy_classifier import NoisyClassifierGuidance, load_noisy_classifier

    if label is None:
        raise ValueError("Guidance 'noisy-classifier' needs label=NAME or label=INDEX, for instance noisy-classifier:label=seven.")
    network = load_noisy_classifier(model)
    if pipe is not None:
        network.to(pipe.device)
    return NoisyClassifierGuidance(network, label.split("+") if isinstance(label, str) else label, scale, attribute=attribute)


def _attend(pipe: Any, *, words: Any = None, scale: float = 20.0, grid: int | None = None, until: float = 0.5) -> Guidance:
    from genkit.guidance.attend import AttendAndExcite

    if words is None:
        raise ValueError("Guidance 'attend' needs words=A+B of the prompt, for instance attend:words=cat+frog.")
    return AttendAndExcite(str(words).split("+"), scale, grid=grid, until=until)


_ENTRIES: dict[str, Entry] = {
    "attend": Entry(
        "let no word of the prompt be overlooked (Attend-and-Excite)",
        {
            "words": "words of the prompt, joined by +",
            "scale": "length of the displacements; 20 in the paper",
            "grid": "side of the attention maps that are used",
            "until": "fraction of the run after which nothing is displaced",
        },
        _attend,
        texts=("words",),
    ),
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
        },
        _classifier,
        model="digits-classifier",
    ),
    "clip": Entry(
        "steer to a text with CLIP or SigLIP",
        {
            "text": "what the image should show; in quotes if it has commas",
            "model": "a Hub model, a folder, or open_clip:ARCHITECTURE:TAG; by default openai/clip-vit-base-patch32",
            "scale": "weight of the gradient",
            "route": "x0_detached or through_denoiser",
            "cutouts": "random crops of each image; 0 compares the whole image",
        },
        _clip,
        model="openai/clip-vit-base-patch32",
        texts=("text",),
    ),
    "discriminator": Entry(
        "correct the model's samples with a discriminator that was trained on them (DG)",
        {
            "model": "an embedded discriminator or a folder that `genkit train discriminator` wrote",
            "scale": "weight of the gradient; 1 in theory",
            "preset": "default (raw logit, one evaluation a step) or paper (weights 2 and 0, clipped sigmoid)",
            "w1": "weight in the first stage of a step",
            "w2": "weight in the second stage of second-order samplers",
            "low": "lowest noise-to-signal ratio at which it acts",
            "high": "highest noise-to-signal ratio at which it acts",
            "matching": "how strongly a sample is held to its prompt or class, where the discriminator knows it; 0 is pure",
            "boost": "weight, on every other step, of samples that it takes for generated (2 in the paper)",
        },
        _discriminator,
        model="digits-discriminator",
    ),
    "noisy-classifier": Entry(
        "steer to a class with a classifier that was trained on noisy samples",
        {
            "label": "class name or index; several as a+b, one for each sample",
            "model": "an embedded noisy classifier or a folder of one",
            "attribute": "which attribute: digit, ink or paper",
            "scale": "weight of the gradient; 1 is Bayes' rule",
        },
        _noisy_classifier,
        model="digits-noisy-classifier",
    ),
}
