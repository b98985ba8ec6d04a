"""Recipe: everything needed to repeat one image. It is data: validated field by field, it never runs or loads anything by itself.

A recipe is written into each PNG (text chunk "genkit") and its side-car JSON. Read back, it may come from anyone, so
`require_trusted` refuses what a stranger must not choose: other models than the embedded ones, token files, and code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import re
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit import samplers, zoo
from genkit.errors import unknown

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = ("float32", "float16", "bfloat16")
CHUNK = "genkit"
MAX_JSON = 256 * 1024  # characters of a recipe that is read
_MAX_SIDE = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make one image. Two equal recipes make the same image.

    Args:
        model: an embedded model, a folder, or a repository of the Hub.
        prompt: text; "" is the null prompt, None is for models without text.
        label: class index or name, for class-conditional models.
        negative: negative prompt.
        seed: 0 to 2^63 - 1.
        steps: number of sampling steps, 1 to 10,000.
        cfg: scale of classifier-free guidance; 1 is off.
        sampler: a name of `genkit.samplers`, or None for the model's own.
        eta: noise of DDIM-like samplers, 0 to 1.
        width, height: in pixels, both or neither; None is the model's own size.
        guidance: specs such as "classifier:label=seven,scale=2"; they are summed.
        dtype: "float32", "float16" or "bfloat16".
        tokens: the token files that the prompt may need, by content: `genkit.tokens.TokenFile.identity`.

    Raises:
        ValueError: a field has the wrong type or range; the message names field and value.

    Example:
        >>> recipe = Recipe(prompt="a red seven on a yellow background", seed=3)
        >>> recipe.run(GuidedPipeline.from_pretrained(recipe.model))
    """

    model: str = "digits"
    prompt: str | None = None
    label: int | str | None = None
    negative: str | None = None
    seed: int = 0
    steps: int = 30
    cfg: float = 3.0
    sampler: str | None = None
    eta: float = 0.0
    width: int | None = None
    height: int | None = None
    guidance: tuple[str, ...] = ()
    dtype: str = "float32"
    tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_text("model", self.model, 4096)
        if not self.model:
            raise ValueError("model is empty. Give an embedded model's name or a folder.")
        for name in ("prompt", "negative"):
            if getattr(self, name) is not None:
                _require_text(name, getattr(self, name), 20_000)
        if isinstance(self.label, str):
            _require_text("label", self.label, 200)
        elif self.label is not None:
            _require_integer("label", self.label, 0, 10**9)
        if self.prompt is not None and self.label is not None:
            raise ValueError(f"A recipe has a prompt or a label, not both: {self.prompt!r} and {self.label!r}.")
        _require_integer("seed", self.seed, 0, 2**63 - 1)
        _require_integer("steps", self.steps, 1, 10_000)
        # 3 and 3.0 are the same recipe, so they must have the same JSON and hash.
        object.__setattr__(self, "cfg", _number("cfg", self.cfg, -1000, 1000))
        object.__setattr__(self, "eta", _number("eta", self.eta, 0, 1))
        if self.sampler is not None:
            _require_text("sampler", self.sampler, 100)
            samplers.require(self.sampler)
        if (self.width is None) != (self.height is None):
            raise ValueError(f"Give width and height together; got {self.width!r} and {self.height!r}.")
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                _require_integer(name, getattr(self, name), 1, _MAX_SIDE)
        if not isinstance(self.guidance, (list, tuple)) or len(self.guidance) > 16:
            raise ValueError(f"guidance must be a list of at most 16 specs; got {self.guidance!r:.200}.")
        for spec in self.guidance:
            _require_text("guidance", spec, 2000)
        object.__setattr__(self, "guidance", tuple(self.guidance))
        if self.dtype not in DTYPES:
            raise unknown("dtype", str(self.dtype), DTYPES)
        if not isinstance(self.tokens, (list, tuple)) or len(self.tokens) > 64:
            raise ValueError(f"tokens must be a list of at most 64; got {self.tokens!r:.200}.")
        for token in self.tokens:
            _require_text("tokens", token, 120)
            if not re.fullmatch(r"\S+:[0-9a-f]{12}", token):
                raise ValueError(f"tokens must be such as '<seven>:0123456789ab'; got {token!r}.")
        object.__setattr__(self, "tokens", tuple(self.tokens))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = {**dataclasses.asdict(self), "guidance": list(self.guidance), "tokens": list(self.tokens)}
        if not self.tokens:
            del fields["tokens"]  # so that recipes from before there were tokens keep their hashes and names
        return fields

    def to_json(self, versions: Mapping[str, str] | None = None, attention: Mapping[str, Any] | None = None) -> str:
        """JSON (ASCII) of the fields and, for the reader's information, what the image was made with.

        Args:
            versions: of packages.
            attention: `genkit.attention.proof.Proof.to_dict`, of which the counts are written.
        """
        counts = ("fused", "unfused", "unproven", "exceptions")
        told: dict[str, Any] = {"versions": dict(versions)} if versions else {}
        told |= {"attention": {name: attention[name] for name in counts}} if attention else {}
        return json.dumps(self.to_dict() | told)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote; what it tells of versions and attention is ignored.

        Raises:
            ValueError: not JSON, an unknown field, or a field of the wrong type or range.
        """
        if len(text) > MAX_JSON:
            raise ValueError(f"The recipe has {len(text):,} characters, more than the {MAX_JSON:,} that are read.")
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The recipe is not JSON ({error}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"The recipe is not a JSON object but {type(content).__name__}.")
        for told in ("versions", "attention"):
            content.pop(told, None)
        extra = sorted(set(content) - {field.name for field in dataclasses.fields(cls)})
        if extra:
            raise ValueError(f"The recipe has an unknown field {extra[0]!r:.100}. It may come from another version of genkit.")
        return cls(**content)

    @functools.cached_property
    def hash(self) -> str:
        """12 hexadecimal digits that identify the recipe."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def subject(self) -> str:
        """What is drawn, for people: the prompt, the label, or the model."""
        if self.prompt is not None:
            return self.prompt or "(null prompt)"
        return self.model if self.label is None else f"class {self.label}"

    @property
    def name(self) -> str:
        """A stable file name without extension: readable, with seed and hash; letters, digits and "-" only."""
        text = "null" if self.prompt == "" else self.subject
        ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:48].strip("-") or "prompt"
        return f"{slug}-s{self.seed:04d}-{self.hash[:8]}"

    def parameters(self, size: tuple[int, int], versions: Mapping[str, str]) -> str:
        """The line that image viewers know from the AUTOMATIC1111 web UI (text chunk "parameters").

        Args:
            size: width and height of the image.
        """
        settings = {
            "Steps": self.steps,
            "Sampler": self.sampler or "model",
            "CFG scale": f"{self.cfg:g}",
            "Seed": self.seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model": Path(self.model).name,
        }
        if self.eta:
            settings["Eta"] = f"{self.eta:g}"
        if self.guidance:
            settings["Guidance"] = json.dumps(" + ".join(self.guidance))  # quoted, as the format does for values with commas
        if self.tokens:
            settings["TI hashes"] = json.dumps(", ".join(token.replace(":", ": ") for token in self.tokens))
        settings["Version"] = f"genkit {versions.get('genkit', '?')}"
        lines = [self.prompt if self.prompt is not None else self.subject]
        if self.negative:
            lines.append(f"Negative prompt: {self.negative}")
        return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in settings.items())])

    def require_trusted(
        self, *, models: Collection[str] = (), guidance: Collection[str] = (), tokens: Collection[str] = ()
    ) -> None:
        """Check that a recipe from elsewhere loads and runs nothing that the user did not name.

        Args:
            models, guidance, tokens: models and guidance specs that the user named, and identities of the token files.

        Raises:
            ValueError: another model than an embedded one, a token whose file the user did not name, or guidance that is unknown,
                is code, or loads something.
        """
        if self.model not in (*zoo.names(), *models):
            raise ValueError(
                f"The recipe wants the model {self.model!r:.200}, which is not embedded. If you trust it, name it: --model MODEL."
            )
        for spec in self.guidance:
            if spec not in guidance:
                _require_harmless(spec)
        for token in self.tokens:
            if token not in tokens:
                raise ValueError(f"The recipe uses the token {token.rpartition(':')[0]!r}. Name its file: --token FILE.")

    def run(self, pipe: Any) -> Image:
        """Make the image with a `GuidedPipeline` of `model` in `dtype`.

        Raises:
            ValueError: the recipe does not fit the model.
            FloatingPointError: the run became NaN or infinite.
        """
        from genkit.runner import run_batch

        return run_batch(pipe, [self])[0]


def versions() -> dict[str, str]:
    """Versions of genkit, of what it stands on, and of Python; read from package metadata, nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name, package in (("genkit", "genkit-diffusion"), ("torch",) * 2, ("diffusers",) * 2, ("transformers",) * 2):
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = "?"
    return found


def read_recipe(path: Path) -> Recipe:
    """The recipe that a PNG carries. It may come from anyone: see `require_trusted`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a PNG, or it has no recipe or a malformed one.
    """
    from genkit.images import read_text

    text = read_text(path).get(CHUNK)
    if text is None:
        raise ValueError(f"{str(path)!r} carries no recipe (text chunk {CHUNK!r}). Give a PNG that `genkit sample` wrote.")
    try:
        return Recipe.from_json(text)
    except ValueError as error:
        raise ValueError(f"The recipe in {str(path)!r} cannot be used. {error}") from error


def _require_harmless(spec: str) -> None:
    """Refuse guidance that is not known by name, or whose values could name a file or a model that is not embedded."""
    from genkit.guidance import registry

    advice = "If you trust it, repeat it: --guidance SPEC."
    name, _ = registry.head(spec)
    if name not in registry.names():
        raise ValueError(f"The recipe wants the guidance {spec!r:.200}, which genkit does not know by that name. {advice}")
    entry = registry.describe(name)
    values = {**({} if entry.model is None else {"model": entry.model}), **registry.split(spec)[1]}
    for key, value in values.items():
        loads = key == "model" and value not in zoo.names()
        if loads or (isinstance(value, str) and key not in entry.texts and re.search(r"[/\\:]", value)):
            raise ValueError(f"The recipe's guidance {spec!r:.200} would load {str(value)!r:.200}, which is not embedded. {advice}")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _require_text(name: str, value: Any, limit: int) -> None:
    if not isinstance(value, str) or len(value) > limit:
        raise ValueError(f"{name} must be text of at most {limit:,} characters; got {value!r:.100}.")
    # Control characters could forge terminal output; lone surrogates are bytes that were not UTF-8.
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in value):
        raise ValueError(f"{name} has control characters or is not valid Unicode: {value!r:.100}. Remove them.")


def _require_integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}; got {value!r:.100}.")


def _number(name: str, value: Any, low: float, high: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:  # NaN is in no range
        raise ValueError(f"{name} must be a number from {low} to {high}; got {value!r:.100}.")
    return float(value)
