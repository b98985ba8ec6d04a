"""HostedPipeline: what genkit's pipelines share, a diffusers pipeline (`host`) with a new call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from genkit import zoo
from genkit.attention.proof import Known
from genkit.checkpoints import check_folder
from genkit.denoisers import Denoiser
from genkit.distill.spec import FewStepSpec

Self = TypeVar("Self", bound="HostedPipeline")


class HostedPipeline:
    """Wraps a diffusers pipeline (`host`): same components, another call.

    The host is shared, not copied, and is left as it was after each call; `save_pretrained` writes the stock format. Everything
    that is not defined here (`components`, `to`, `progress_bar`, `vae`, `scheduler`, ...) is the host's.

    `attention` says what the last call's attention was computed with (`genkit.attention.proof.Proof.to_dict`); None before it.

    `student` says how a few-step student samples (`genkit_distill.json` in the folder that the host was loaded from); None for
    any other model.
    """

    def __init__(self, host: DiffusionPipeline) -> None:
        self.host = host
        self.denoiser = Denoiser.of(host)
        folder = getattr(host, "name_or_path", None)
        self.student: FewStepSpec | None = None if folder is None else FewStepSpec.load(folder)
        self.tokens: list[str] = []
        self.attention: dict[str, Any] | None = None
        self._audited = Known()
        self._interrupt = False

    @classmethod
    def from_pipe(cls: type[Self], pipe: DiffusionPipeline | HostedPipeline) -> Self:
        """Wrap a pipeline, of diffusers or of genkit; its components are shared.

        Raises:
            ValueError: the pipeline's family is not supported; the message lists those that are.
        """
        if not isinstance(pipe, HostedPipeline):
            return cls(pipe)
        wrapped = cls(pipe.host)
        wrapped.tokens, wrapped.student = list(pipe.tokens), pipe.student
        return wrapped

    @classmethod
    def from_pretrained(cls: type[Self], model: str | Path, *, allow_pickle: bool = False, **arguments: Any) -> Self:
        """Load an embedded model by name, a folder, or a model of the Hub.

        Args:
            model: "digits", a folder in diffusers' layout, or a repository of the Hub.
            allow_pickle: also take pickled weights (read with `weights_only=True`); safetensors only by default.
            **arguments: for `DiffusionPipeline.from_pretrained`: `dtype` (float32 by default), `variant`, `revision`, ...

        Raises:
            ValueError: an unknown name, or a folder whose weights are missing, damaged, of the wrong shape or pickled.
        """
        # An embedded name wins over a folder of that name, so that a recipe means the same in every working directory.
        embedded = str(model) in zoo.names() or (not Path(model).is_dir() and "/" not in str(model))
        folder = zoo.path(str(model)) if embedded else Path(model)
        if folder.is_dir():
            check_folder(folder, allow_pickle=allow_pickle)
        arguments.setdefault("dtype", torch.float32)
        host = _pipeline_class(folder).from_pretrained(
            str(folder if folder.is_dir() else model), use_safetensors=None if allow_pickle else True, **arguments
        )
        return cls(host)

    def __getattr__(self, name: str) -> Any:
        if name == "host":
            raise AttributeError(name)
        return getattr(self.host, name)

    @property
    def scheduler(self) -> Any:
        """The host's scheduler; assign another to change the sampler."""
        return self.host.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.host.scheduler = scheduler

    def to(self: Self, *arguments: Any, **keywords: Any) -> Self:
        """Move or cast the host; returns this pipeline."""
        self.host.to(*arguments, **keywords)
        return self

    def load_tokens(self, *paths: str | Path) -> list[str]:
        """Load token files (textual inversion, safetensors) into the host; prompts may then say the tokens, which are returned.

        `tokens` lists the identities of what was loaded, for recipes.

        Raises:
            FileNotFoundError, ValueError: a file that is missing, damaged, a pickle, or made for other text encoders; a token that
                the tokenizer knows. Nothing is loaded then.
        """
        from genkit.guidance.token_embedding import load_tokens

        files = load_tokens(self.denoiser, paths)
        self.tokens += [file.identity for file in files]
        return [file.token for file in files]

    def interrupt(self) -> None:
        """Stop soon (from a callback or another thread); the call returns what there is."""
        self._interrupt = True


def _pipeline_class(folder: Path) -> type[DiffusionPipeline]:
    """What loads a folder: diffusers finds its own classes by name, but not ours (see its `model_index.json`)."""
    from genkit.pipelines.layout import LayoutToImagePipeline

    index = folder / "model_index.json"
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name") if index.is_file() else None
    return LayoutToImagePipeline if name == LayoutToImagePipeline.__name__ else DiffusionPipeline
