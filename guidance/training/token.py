"""Discriminative class tokens: a word for what a classifier sees (Schwartz et al., ICCV 2023, arXiv 2303.17155).

    e*  =  argmax_e  E_z [ U( decode( sample(z; prompt(e)) ) ) ]          U = log p(class | image), or any log-potential

e (n, D) is the embedding of a new word in the prompt, the only thing that is trained. The images come from the ordinary sampler
with classifier-free guidance, started from noise z. *Gradient skipping* keeps it cheap: only the last K network evaluations are
differentiated,

    d x_final / d e   ~   sum over the last K evaluations k of   (d x_final / d eps_k) (d eps_k / d e)

and the run before them has no graph. K counts network evaluations. How much of the gradient they carry depends on the scheduler:
with 30 steps on Stable Diffusion's noise levels |d x_final / d eps| is 0.012 at DDIM's last evaluation, but 0.293 at the last but
one of PNDM, whose steps mix several.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from genkit import _host, noise
from genkit.attention.proof import Proof
from genkit.checkpoints import load_pt
from genkit.console import progress
from genkit.denoisers import Denoiser
from genkit.files import prepare_folder, shorten_log, write_atomic
from genkit.guidance.token_embedding import embedding_of, spliced
from genkit.guidance.training.token_state import Learner, TokenConfig, TrainedToken
from genkit.sampling import sample
from genkit.tokens import token_of

Energy = Callable[[Tensor], Tensor]
CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"


class TokenTrainer:
    """Trains a token for each class, all of them in one batch through the sampler.

    Args:
        pipe: a `GuidedPipeline`, or a Stable Diffusion 1.x, 2.x or XL pipeline. Its scheduler samples. Nothing of it is changed.
        energies: by name of the token, the log-potential of images (B, 3, H, W) in [-1, 1], (B,), each sample's depending on that
            sample alone: a `ClassifierEnergy`, or any function. One with a method `correct(images) -> bool (B,)`, as
            `ClassifierEnergy` has it, lets training stop early.
        config: how to train.

    The same seed gives the same tokens, and a class the same token whatever the others (to rounding).

    Raises:
        ValueError: a name that cannot be a token or is one of the tokenizer's, a model without CLIP text encoders, in float16 (its
            gradients underflow) or with CPU offload, more evaluations than the sampler has, a guide that does not fit the images.

    Example:
        >>> guide = load_classifier("digits-classifier")
        >>> config = TokenConfig(prompts=("a red {token}",), init="digit")
        >>> trained = TokenTrainer(pipe, {"my-seven": ClassifierEnergy(guide, "seven")}, config).train()
        >>> trained["my-seven"].save(Path("my-seven.safetensors"))
        >>> pipe.load_tokens("my-seven.safetensors")
        >>> pipe("a blue <my-seven>")
    """

    def __init__(self, pipe: Any, energies: Mapping[str, Energy], config: TokenConfig | None = None) -> None:
        self.config = config = config or TokenConfig()
        self.denoiser = getattr(pipe, "denoiser", None) or Denoiser.of(pipe)
        self.energies = dict(energies)
        if not self.energies:
            raise ValueError("There is no class to train a token for. Give at least one.")
        init = embedding_of(self.denoiser, config.init)
        self.learners = {name: _learner(name, init, config.vectors) for name in self.energies}
        groups = [
            {"params": [one.vectors[key] for one in self.learners.values()], "lr": config.lr * value.square().mean().sqrt().item()}
            for key, value in init.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=config.weight_decay)
        self.update = 0
        self._shape = self.denoiser.latent_shape(config.height, config.width)
        self._check_pipeline()
        with spliced(self.denoiser, self._vectors()):
            pass  # names and widths, before anything runs
        for name, energy in self.energies.items():
            self._check_guide(name, energy)

    def train(self, folder: Path | None = None, *, resume: bool = False) -> dict[str, TrainedToken]:
        """Update until every token is finished or there were `config.updates` of them; the best of each, by name.

        Args:
            folder: for a checkpoint and a log (a JSON line for each update); None keeps neither.
            resume: go on from the folder's checkpoint if there is one.

        Raises:
            FloatingPointError: a loss or gradient became NaN or infinite; names the update. The checkpoint stays.
            ValueError: the checkpoint is damaged, or of other settings or classes.
        """
        if folder is not None:
            prepare_folder(folder)
            if resume and (folder / CHECKPOINT).is_file():
                self._restore(folder / CHECKPOINT)
            shorten_log(folder / LOG, self.update, "update")
        with self.prepared(), Proof(self.denoiser) as proof, progress() as bar:
            task = bar.add_task("class tokens", total=self.config.updates, completed=self.update)
            while self.update < self.config.updates and self._active():
                began = time.perf_counter()
                with proof.step("update"):
                    figures = self.step()
                if folder is not None:
                    entry = {"update": self.update, "seconds": round(time.perf_counter() - began, 3), "tokens": figures}
                    entry |= {"attention": proof.to_dict()} if self.update == 1 else {}
                    with open(folder / LOG, "a", encoding="utf-8") as log:
                        print(json.dumps(entry), file=log)
                    self._save(folder / CHECKPOINT)
                loss = sum(one["loss"] for one in figures.values()) / len(figures)
                bar.update(task, completed=self.update, description=f"class tokens  loss {loss:.3f}")
        return {name: learner.trained() for name, learner in self.learners.items()}

    def step(self) -> dict[str, dict[str, Any]]:
        """One update of the tokens that are not finished; loss, accuracy and norm of the gradient of each. See `prepared`."""
        names = self._active()
        images = self._images([self.learners[name].token for name in names])
        parts = dict(zip(names, images.chunk(len(names)), strict=True))
        losses = {name: -self.energies[name](part).mean() for name, part in parts.items()}
        bad = [name for name, loss in losses.items() if not torch.isfinite(loss)]
        if bad:
            raise FloatingPointError(f"Update {self.update + 1}: the loss of {bad[0]!r} is {losses[bad[0]].item()}. {_ADVICE}")
        parameters = [p for name in names for p in self.learners[name].vectors.values()]
        # The gradient of these alone: whatever else the energies hold gets none.
        gradients = torch.autograd.grad(torch.stack(list(losses.values())).sum(), parameters)
        self.optimizer.zero_grad(set_to_none=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        figures = {name: self._read(name, losses[name].item(), parts[name].detach()) for name in names}
        self.optimizer.step()
        self.update += 1
        return figures

    def _read(self, name: str, loss: float, images: Tensor) -> dict[str, Any]:
        """Take in what was measured, clip the gradient; a token that is finished by it keeps its vectors."""
        learner = self.learners[name]
        correct = getattr(self.energies[name], "correct", None)
        accuracy = None if correct is None else correct(images).float().mean().item()
        vectors = list(learner.vectors.values())
        norm = nn.utils.clip_grad_norm_(vectors, self.config.grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"Update {self.update + 1}: the gradient of {name!r} is NaN or infinite. {_ADVICE}")
        learner.read(loss, accuracy, self.config)
        if learner.finished is not None:
            for vector in vectors:
                vector.grad = None
        return {"loss": loss, "accuracy": accuracy, "gradient": norm.item()}

    def _images(self, tokens: list[str]) -> Tensor:
        """Images (len(tokens) * batch, 3, H, W), token by token, with a graph through the last evaluations."""
        config, denoiser, scheduler = self.config, self.denoiser, self.denoiser.pipe.scheduler
        prompts = [config.prompts[i % len(config.prompts)].replace("{token}", t) for t in tokens for i in range(config.batch)]
        cond = denoiser.condition(prompts, grad=True)
        first = config.seed * 2**32 + (self.update * config.batch if config.resample else 0)
        # Every class has the same noise, so its token does not depend on which others there are.
        generators = noise.generators(list(range(first, first + config.batch)) * len(tokens), noise.TRAINING)
        denoiser.set_timesteps(scheduler, config.steps, self._shape, denoiser.device)
        x = randn_tensor((len(prompts), *self._shape), generator=generators, device=torch.device(denoiser.device))
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        try:
            x0 = sample(
                denoiser, scheduler, x, cond,
                guidance_scale=config.cfg, generator=generators, grad_evaluations=config.evaluations,
            )  # fmt: skip
        except FloatingPointError as error:
            raise FloatingPointError(f"Update {self.update + 1}: {error}") from error
        return denoiser.decode(x0)

    def _active(self) -> list[str]:
        return [name for name, learner in self.learners.items() if learner.finished is None]

    def _vectors(self) -> dict[str, dict[str, nn.Parameter]]:
        return {learner.token: learner.vectors for learner in self.learners.values()}

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Around `step`: frozen components, gradients on, the tokens spliced in, checkpointing if asked for; undone at the end."""
        modules = [c for c in self.denoiser.pipe.components.values() if isinstance(c, nn.Module)]
        trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
        savers: list[Any] = [
            m for m in modules if self.config.gradient_checkpointing and hasattr(m, "enable_gradient_checkpointing")
        ]
        savers = [m for m in savers if not m.is_gradient_checkpointing]
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in savers:
            module.enable_gradient_checkpointing()
        try:
            with torch.inference_mode(False), torch.enable_grad(), spliced(self.denoiser, self._vectors()):
                yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module in savers:
                module.disable_gradient_checkpointing()

    def _check_pipeline(self) -> None:
        """Raise for what would only show in the middle of the run, or never."""
        config, denoiser = self.config, self.denoiser
        if denoiser.dtype == torch.float16:
            raise ValueError("The pipeline is in float16, whose gradients underflow. Load it in bfloat16 or float32.")
        if _host.is_offloaded(denoiser.pipe):
            raise ValueError("CPU offload breaks gradients. Load the pipeline without enable_model_cpu_offload or the like.")
        denoiser.set_timesteps(denoiser.pipe.scheduler, config.steps, self._shape, denoiser.device)
        there = len(denoiser.pipe.scheduler.timesteps)
        if config.evaluations > there:
            scheduler = type(denoiser.pipe.scheduler).__name__
            raise ValueError(
                f"evaluations={config.evaluations}, but {config.steps} steps of {scheduler} are {there} network evaluations. "
                "Lower it, or take more steps."
            )

    def _check_guide(self, name: str, energy: Energy) -> None:
        """Evaluate a guide on blank images: a wrong size or shape shows at once, not after minutes of sampling."""
        shape = (self.config.batch, 3, *(side * self.denoiser.factor for side in self._shape[1:]))
        expected = _input_size(energy)
        if expected is not None and expected != shape[-1]:
            raise ValueError(
                f"The guide of {name!r} was made for images of {expected} pixels, but the model draws {shape[-1]}. "
                f"Let it resize: ClassifierEnergy(..., size={expected}), --guide-size {expected}."
            )
        try:
            with torch.no_grad():
                value = energy(torch.zeros(shape, device=self.denoiser.device))
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"The guide of {name!r} does not read images of shape {shape}: {error}") from error
        if not isinstance(value, Tensor) or value.shape != shape[:1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"The guide of {name!r} must return one value for each image, shape {shape[:1]}; got {got}.")

    def _settings(self) -> dict[str, Any]:
        """What a run must have in common with the one that it goes on from; it may be longer."""
        settings = dataclasses.asdict(self.config) | {"classes": list(self.learners), "prompts": list(self.config.prompts)}
        settings.pop("updates")
        return settings

    def _save(self, path: Path) -> None:
        learners = {name: learner.state() for name, learner in self.learners.items()}
        state = {"settings": json.dumps(self._settings()), "update": self.update, "optimizer": self.optimizer.state_dict()}
        buffer = io.BytesIO()
        torch.save(state | {"learners": learners}, buffer)
        write_atomic(path, buffer.getvalue())

    def _restore(self, path: Path) -> None:
        try:
            state = load_pt(path)
            made, ours = json.loads(state["settings"]), self._settings()
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(
                f"The checkpoint {str(path)!r} is damaged ({type(error).__name__}). Train without --resume."
            ) from error
        differ = [key for key in ours if made.get(key) != ours[key]]
        if differ:
            key = differ[0]
            raise ValueError(
                f"The checkpoint {str(path)!r} was made with {key}={made.get(key)!r}, not {ours[key]!r}. "
                "Give the same settings, or train without --resume."
            )
        self.update = state["update"]
        self.optimizer.load_state_dict(state["optimizer"])
        for name, learner in self.learners.items():
            learner.restore(state["learners"][name])


_ADVICE = "Lower lr, or check the guide."


def _learner(name: str, init: Mapping[str, Tensor], count: int) -> Learner:
    start = {key: value.repeat(count, 1) for key, value in init.items()}
    return Learner(token_of(name), {key: nn.Parameter(value.clone()) for key, value in start.items()}, start)


def _input_size(energy: Any) -> int | None:
    """Side of the images that an energy's classifier was made for, if it says so and the energy does not resize."""
    config = getattr(getattr(energy, "classifier", None), "config", None)
    if getattr(energy, "size", None) is not None:
        return None
    size = getattr(config, "image_size", None) or getattr(config, "sample_size", None)
    return size if isinstance(size, int) else None
