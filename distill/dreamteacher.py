"""DreamTeacher (Li et al., ICCV 2023, arXiv 2307.07487): what a diffusion model knows, in an ordinary backbone.

    x0 -> teacher's features f^g at (x_t, t);   picture -> backbone -> regressor -> f^r;   L_feat (f^r, f^g) + w L_ld

Without a label the backbone learns the frozen teacher's features of each picture; with a few, an interpreter on the teacher labels
all pictures softly, and the backbone learns these labels too. The losses are in `dreamteacher_losses`; the loop, with checkpoints,
resume, processes, trackers, EMA and bfloat16, is `genkit.training.fit`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.data.source import ImageSource
from genkit.denoisers import Denoiser
from genkit.distill.data import LatentDataset
from genkit.distill.dreamteacher_config import DreamTeacherConfig
from genkit.distill.dreamteacher_data import Pictures, labelled_rows, labels_of
from genkit.distill.dreamteacher_interpreter import Interpreter, train_interpreter
from genkit.distill.dreamteacher_losses import attention_loss, mse_loss, soft_label_loss
from genkit.distill.dreamteacher_student import Backbone, DreamStudent, create_backbone
from genkit.distill.dreamteacher_teacher import TeacherLevels, decoder_taps
from genkit.distill.runs import require_same_run
from genkit.features.cache import model_identity
from genkit.files import prepare_folder, write_atomic
from genkit.ranks import Ranks
from genkit.training import fit


class DreamTeacher:
    """A distillation of a teacher's features into a backbone.

    Args:
        denoiser: the teacher, on the device that trains; it stays as it is.
        data: pictures, or latents that `genkit synth` made of the teacher.
        config: everything else.
        folder: of the run: `config.json`, `data/` (encoded pictures), `interpreter/`, `training/` (checkpoint, log).
        labelled: pictures with labels or label maps, for the label branch; by default those of the data.
        ranks: the processes that train together, after `Ranks.join`.

    Attributes:
        student: the backbone with what is trained on it; after `fit` the average of its weights.
        teacher: the frozen model's features.
        labels: names of the classes of the label branch.

    Raises:
        ValueError: a backbone without intermediate features, taps that do not match it, labels that are missing, or a teacher of
            no RGB pictures.

    Example:
        >>> config = DreamTeacherConfig.preset("digits", steps=600)
        >>> run = DreamTeacher(pipe.denoiser, open_source("digits"), config, Path("run"))
        >>> student = run.fit(resume=True)
        >>> export_backbone(student, config, Path("backbone"))
    """

    def __init__(
        self,
        denoiser: Denoiser,
        data: ImageSource | LatentDataset,
        config: DreamTeacherConfig,
        folder: Path,
        *,
        labelled: ImageSource | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.denoiser, self.data, self.config, self.folder = denoiser, data, config, Path(folder)
        self.ranks = ranks or Ranks()
        _, height, width = denoiser.latent_shape(None, None)
        own = (height * denoiser.factor, width * denoiser.factor)
        size = own if config.size is None else (config.size, config.size)
        torch.manual_seed(config.train.seed)
        backbone = Backbone(create_backbone(config.backbone, size), size)
        taps = config.taps or decoder_taps(denoiser, [(h, w) for _, h, w in backbone.levels])
        self.teacher = TeacherLevels(
            denoiser, taps, config.t, encoding=config.encoding, ddim_steps=config.ddim_steps, bf16=config.teacher_bf16
        )
        dense = config.task == "segmentation"
        self.labels: list[str] = []
        self.targets = torch.empty(0)
        self.labelled, self.labelled_rows = labelled, list[int]()
        if config.label:
            self.labelled = labelled or (data if isinstance(data, ImageSource) else None)
            if self.labelled is None:
                raise ValueError("The label branch needs labelled pictures, but samples of the teacher have none. Give `labelled`.")
            self.labelled_rows = labelled_rows(self.labelled, config.labelled, config.train.seed, dense=dense)
            self.targets, self.labels = labels_of(self.labelled, self.labelled_rows, size, dense=dense)
        self.student = DreamStudent(
            backbone, self.teacher.shapes, regressor=config.regressor, width=config.width, num_classes=len(self.labels), dense=dense
        )

    def fit(self, *, resume: bool = False, progress: Callable[[int], None] | None = None) -> DreamStudent:
        """Train, and return the student with the average of its weights.

        Args:
            resume: go on with the run in the folder, if there is one.
            progress: called with the number of pictures that are encoded since the last call.

        Raises:
            ValueError: a run in the folder that is not to be resumed, or that was made otherwise (with the difference); a batch
                that the data does not fill.
            FloatingPointError: the loss became NaN or infinite.
        """
        config, ranks = self.config, self.ranks
        prepare_folder(self.folder)
        pictures = Pictures(
            self.data, self.denoiser, self.student.backbone.size, self.folder / "data", flip=config.flip, ranks=ranks,
            progress=progress,
        )  # fmt: skip
        settings = self._settings(pictures)
        require_same_run(self.folder, settings, resume=resume)
        ranks.wait()
        if ranks.leads:
            write_atomic(self.folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
        interpreter = self._interpreter()

        def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
            rows = pictures.rows(config.train.batch_size, config.train.seed, step, ranks)
            teacher = self.teacher(pictures.clean(rows), generator)
            student, logits = model(pictures.pictures(rows))
            return self.loss(student, teacher, logits, None if interpreter is None else interpreter(teacher))

        self.student = fit(
            self.student, loss, config.train, self.folder / "training", name="dreamteacher", resume=resume,
            device=str(self.denoiser.device), ranks=ranks,
        )  # fmt: skip
        return self.student

    def loss(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], logits: Tensor | None, soft: Tensor | None
    ) -> Tensor:  # fmt: skip
        """w_mse L_MSE + w_at L_AT + w_ld L_ld of maps by tap, and of logits of the student and of the interpreter."""
        config = self.config
        found = [student[name].float() for name in teacher]
        wanted = list(teacher.values())
        with torch.autocast(wanted[0].device.type, enabled=False):
            total = wanted[0].new_zeros(())
            if config.mse:
                total = total + config.mse * mse_loss(found, wanted, config.whitening)
            if config.attention:
                total = total + config.attention * attention_loss(found, wanted, config.power)
            if logits is not None and soft is not None:
                total = total + config.label * soft_label_loss(logits.float(), soft.float(), config.temperature)
        return total

    def _interpreter(self) -> Interpreter | None:
        """The interpreter, trained on the labelled pictures; None without a label branch."""
        config, size = self.config, self.student.backbone.size
        if not config.label or self.labelled is None:
            return None
        torch.manual_seed(config.interpreter.seed)
        dense = config.task == "segmentation"
        interpreter = Interpreter(self.teacher.shapes, len(self.labels), size, width=config.width, dense=dense)
        _, height, width = self.denoiser.latent_shape(None, None)
        own = (height * self.denoiser.factor, width * self.denoiser.factor)
        parts = [self.labelled_rows[i : i + 32] for i in range(0, len(self.labelled_rows), 32)]
        device = self.denoiser.device
        with torch.no_grad():
            x0 = torch.cat([self.denoiser.encode(self.labelled.images(rows, own).to(device)).float().cpu() for rows in parts])
        return train_interpreter(
            interpreter, self.teacher, x0, self.targets, config.interpreter, self.folder / "interpreter", device=str(device),
            ranks=self.ranks,
        )  # fmt: skip

    def _settings(self, pictures: Pictures) -> dict[str, Any]:
        """What a run and its continuation share, flat."""
        settings = self.config.to_json()
        for part in ("train", "interpreter"):
            loop = settings.pop(part)
            settings |= {f"{part}.{name}": value for name, value in loop.items() if name not in ("trackers", "checkpoint_seconds")}
        shapes = {name: list(shape) for name, shape in self.teacher.shapes.items()}
        return settings | {"data": pictures.identity, "model": model_identity(self.denoiser.pipe), "maps": shapes}
