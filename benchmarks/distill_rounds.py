"""What a round of distillation costs: one update of the discriminator and one of the student, in time and memory.

    python benchmarks/distill_rounds.py [--rounds 9] [--only TEXT] [--out benchmarks/results/distill_rounds.json]

    fused                  genkit's round: one pass of student and teacher for both updates
    fused, R1              the same with R1 in every round (the default has it in every 16th)
    fused, checkpointed    with activations computed again in the backward pass
    fused, host average    with the student's average in host memory, which follows every 10 rounds
    separate               genkit's round of two passes
    separate, R1           the same with R1 in every round
    public                 the structure of the public trainers of LADD, with genkit's heads, so that all networks are the same
    public, StyleGAN-T     the same with the heads that those trainers have
    public, early exit     their structure, but passes through the teacher end at the deepest tap
    public, encoded        their structure, on latents and embeddings that are ready

The public structure is that of diffusers' Sprint script, as the specification of distillation has it (2.2, 2.3 and 9: "separate
batches", 8 passes, and one for mismatched pairs): a batch of its own for each phase, whose pictures and prompts are encoded in
the loop; real, generated and mismatched samples each take a whole pass through the teacher; the student's loss leaves gradients
in the heads, which are dropped; AdamW with both moments, no average of the student; text encoder, VAE and one frozen teacher in
memory. The other public script, AMD's Nitro-1, ends its passes through a UNet behind the middle block and reads latents and
embeddings from disk: "early exit" and "encoded" are what each of that is worth. On GPUs both compute in half precision; here all
is float32, on both sides. Optimizers' settings, losses, taps, levels and batch sizes are the same everywhere, and only the rows
"R1" have R1, which those trainers do not use. It is a model of their structure, not a run of their code.

"half" and "quarter" are taps, see `genkit.distill.sources.TeacherTaps`: on a UNet "half" ends at the middle block, as Nitro-1's and
DMD2's do, and "quarter" at the last block, as Sprint's do.

All variants are timed in turn within each round (CPU time on a CPU, so that other processes do not count; medians). Memory is the
peak of what is allocated: what lives through a round (networks, optimizer states, the student's average, encoders where a variant
needs them), and what a round adds, as torch's profiler traces it on a CPU and its allocator on a GPU. "host" is what lives in host
memory beside a device's: on a CPU, where there is no other, it is listed all the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genkit.data import digits
from genkit.denoisers import Cond, Denoiser
from genkit.denoisers.base import with_network
from genkit.distill import losses
from genkit.distill.config import DistillConfig
from genkit.distill.data import LatentDataset
from genkit.distill.discriminator import FeatureDiscriminator
from genkit.distill.networks import condition_vector
from genkit.distill.path import Path as Levels
from genkit.distill.samplers import LevelSampler, NoiseSampler
from genkit.distill.sources import TeacherTaps
from genkit.distill.synth import SynthConfig, synthesize
from genkit.distill.trainer import DistillTrainer
from genkit.features.taps import collect, resolve_taps
from genkit.files import write_atomic
from genkit.measuring import added_bytes, seconds
from genkit.pipelines import GuidedPipeline

CONFIG = {"r1": 0.0, "steps": 1000, "checkpoint_every": 0, "preview_every": 0}
ITEMS = 64  # of the data


class FullPass(TeacherTaps):
    """The teacher's features by a pass that goes on to its output."""

    def __init__(self, denoiser: Denoiser, taps: str) -> None:
        super().__init__(denoiser, taps)
        self.taps = [*self.taps, *resolve_taps(denoiser.network, "conv_out")]

    def __call__(self, *arguments: Any, **options: Any) -> list[Tensor]:
        return super().__call__(*arguments, **options)[:-1]


class PublicRound:
    """A round in the structure of the public trainers.

    Args:
        denoiser: the teacher, with text encoder and VAE.
        pictures: (N, 3, H, W) in [-1, 1], with N captions.
        config: batch size, taps, head, learning rates.
        encoded: whether batches are ready latents and embeddings.
        early_exit: whether the teacher's passes end at the deepest tap.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pictures: Tensor,
        captions: list[str],
        config: DistillConfig,
        *,
        encoded: bool = False,
        early_exit: bool = False,
    ) -> None:
        self.denoiser, self.pictures, self.captions, self.config, self.encoded = denoiser, pictures, captions, config, encoded
        self.network = copy.deepcopy(denoiser.network).float().requires_grad_(True).train()
        self.student, self.levels = with_network(denoiser, self.network), Levels(denoiser.pipe.scheduler)
        self.generator = torch.Generator().manual_seed(0)
        self.step = 0
        self.ready = {step: self._encode(step) for step in range(2)} if encoded else {}
        dim = condition_vector(self._batch()[1]).shape[1]
        source = (TeacherTaps if early_exit else FullPass)(denoiser, str(config.taps))
        self.discriminator = FeatureDiscriminator(source, dim, head=config.head, width=config.head_width).to(denoiser.device)
        self.optimizers = [adamw(self.network, config.learning_rate), adamw(self.discriminator, config.disc_lr)]
        self.student_levels = LevelSampler(config.levels)
        self.noise = NoiseSampler.parse(config.disc_noise)

    def __call__(self) -> None:
        """One update of the heads, one of the student."""
        self._discriminator_phase()
        self._generator_phase()

    def held(self) -> list[Any]:
        """All that lives on the device through a round."""
        pipe = self.denoiser.pipe
        encoders = [] if self.encoded else [pipe.text_encoder, pipe.vae]
        return [self.denoiser.network, self.network, self.discriminator, *encoders, *self.optimizers]

    def on_host(self) -> list[Any]:
        """What lives beside it in host memory."""
        return []

    def _encode(self, step: int) -> tuple[Tensor, Cond]:
        start = step * self.config.batch_size % len(self.pictures)
        rows = slice(start, start + self.config.batch_size)
        self.denoiser.forget()
        with torch.no_grad():
            return self.denoiser.encode(self.pictures[rows]), self.denoiser.condition(prompts=self.captions[rows])

    def _batch(self) -> tuple[Tensor, Cond]:
        """Clean latents and their condition; another batch in each call."""
        self.step += 1
        return self.ready[self.step % 2] if self.encoded else self._encode(self.step)

    def _fake(self, x0: Tensor, cond: Cond) -> Tensor:
        u = self.student_levels.draw(len(x0), 0, self.generator)
        x, level = self.levels.add_noise(x0, torch.randn_like(x0), u)
        return self.student(x, level, cond).x0.float()

    def _score(self, x0: Tensor, cond: Cond) -> list[Tensor]:
        u = self.noise.draw(len(x0), self.generator)
        features = self.discriminator.extract(x0, cond, u, torch.randn_like(x0))
        return self.discriminator(features, condition_vector(cond), u)

    def _discriminator_phase(self) -> None:
        x0, cond = self._batch()
        self._zero()
        with torch.no_grad():
            fake = self._fake(x0, cond)
        wrong = cond[[*range(1, len(x0)), 0]]
        real_logits = self._score(x0, cond)
        loss = losses.gan_d(real_logits, self._score(fake, cond)) + losses.gan_d(real_logits, self._score(x0, wrong))
        (loss / 2).backward()
        self._update(1, self.discriminator)

    def _generator_phase(self) -> None:
        x0, cond = self._batch()
        self._zero()
        losses.gan_g(self._score(self._fake(x0, cond), cond)).backward()
        self._update(0, self.network)

    def _zero(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _update(self, which: int, network: nn.Module) -> None:
        nn.utils.clip_grad_norm_(network.parameters(), self.config.grad_clip)
        self.optimizers[which].step()


class OurRound:
    """A round of genkit's trainer."""

    def __init__(self, denoiser: Denoiser, data: LatentDataset, config: DistillConfig, folder: Path) -> None:
        self.trainer = DistillTrainer(denoiser, data, config, folder)

    def __call__(self) -> None:
        self.trainer._round()
        self.trainer.step += 1

    def held(self) -> list[Any]:
        """All that lives on the device through a round."""
        trainer = self.trainer
        kept = [part for part in vars(trainer.teacher.denoiser.pipe).values() if isinstance(part, nn.Module)]
        networks = [*kept, trainer.student, trainer.discriminator, trainer.student_optimizer, trainer.heads_optimizer]
        return networks if trainer.average.host else [*networks, *trainer.average.shadow]

    def on_host(self) -> list[Any]:
        """What lives beside it in host memory."""
        return self.trainer.average.shadow if self.trainer.average.host else []


Round = OurRound | PublicRound


def adamw(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The trainer's optimizer."""
    return torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.0, 0.99), weight_decay=0.0, fused=True)


def variants(pipe: Any, taps: str, batch: int, width: int, folder: Path) -> dict[str, Round]:
    """The rounds to compare, on one teacher."""
    denoiser = Denoiser.of(pipe)
    side = denoiser.latent_shape(None, None)[-1] * denoiser.factor
    drawn = digits.draw("train", ITEMS, seed=0)
    captions, pictures = drawn.captions(), F.interpolate(drawn.images, (side, side)).to(denoiser.device)
    # As `genkit synth --embeds` stores them.
    data = synthesize(
        GuidedPipeline.from_pipe(pipe), folder / "data", SynthConfig(steps=1, sampler="ddim", embeds=True), prompts=captions
    )
    common = CONFIG | {"taps": taps, "batch_size": batch, "head_width": width}

    def ours(name: str, **changes: Any) -> OurRound:
        return OurRound(denoiser, data, DistillConfig(**common | changes), folder / name.replace(" ", "-"))

    def public(head: str = "conv2d", **structure: bool) -> PublicRound:
        return PublicRound(denoiser, pictures, captions, DistillConfig(**common, head=head), **structure)

    found: dict[str, Round] = {
        "fused": ours("fused"),
        "fused, host average": ours("host", ema_host=True, ema_every=10),
        "separate": ours("separate", fused=False),
        "public": public(),
    }
    if taps == "quarter":
        return found
    return found | {
        "fused, R1": ours("fused_r1", r1=1e-5, r1_every=1),
        "separate, R1": ours("separate_r1", r1=1e-5, r1_every=1, fused=False),
        "fused, checkpointed": ours("checkpointed", gradient_checkpointing=True),
        "public, StyleGAN-T": public("stylegan-t"),
        "public, early exit": public(early_exit=True),
        "public, encoded": public(encoded=True),
    }


def middle_sized() -> Any:
    """A fifth of Stable Diffusion 1.5 in width, untrained, on pictures of 128 x 128."""
    own = GuidedPipeline.from_pretrained("digits").host
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(**own.text_encoder.config.to_dict() | {
        "hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 12, "num_attention_heads": 5,
    })  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128, 256, 256), layers_per_block=2, cross_attention_dim=160, attention_head_dim=8
    )
    vae = AutoencoderKL(
        block_out_channels=(24, 48, 96, 96), layers_per_block=2, norm_num_groups=8, latent_channels=4, sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=transformers.CLIPTextModel(text).eval(), tokenizer=own.tokenizer, unet=unet.eval(),
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def bytes_of(held: list[Any]) -> int:
    """Of tensors, and of what modules and optimizers hold, each once."""
    tensors: list[Tensor] = []
    for item in held:
        if isinstance(item, nn.Module):
            tensors += [*item.parameters(), *item.buffers()]
        elif isinstance(item, Tensor):
            tensors.append(item)
        else:
            tensors += [value for state in item.state.values() for value in state.values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def operations(function: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def a_pass(denoiser: Denoiser) -> Callable[[], Any]:
    """A pass of the network over one sample."""
    shape = denoiser.latent_shape(None, None)
    cond, zeros = denoiser.condition(prompts=["a seven"]), torch.zeros(1, *shape, device=denoiser.device)
    x, level = Levels(denoiser.pipe.scheduler).add_noise(zeros, zeros, torch.ones(1))
    return lambda: denoiser(x, level, cond)


def encoding_share(pipe: Any) -> float:
    """Operations to encode a picture and its prompt / operations of a pass of the network."""
    denoiser = Denoiser.of(pipe)
    side = denoiser.latent_shape(None, None)[-1] * denoiser.factor
    whole = operations(a_pass(denoiser))
    encoding = operations(lambda: denoiser.encode(torch.zeros(1, 3, side, side, device=denoiser.device)))
    return (encoding + operations(lambda: denoiser.condition(prompts=["a red seven"]))) / whole


def depth_share(pipe: Any, taps: str) -> float:
    """Operations to the deepest tap / operations of a pass of the network."""
    denoiser = Denoiser.of(pipe)
    run, reached = a_pass(denoiser), TeacherTaps(denoiser, taps).taps
    return operations(lambda: collect(denoiser.network, reached, run)) / operations(run)


def measure(pipe: Any, taps: str, batch: int, width: int, rounds: int) -> dict[str, Any]:
    """Seconds and bytes of each variant."""
    with tempfile.TemporaryDirectory() as folder:
        cases = variants(pipe, taps, batch, width, Path(folder))
        rows = {}
        for name, case in cases.items():
            case()  # optimizers have their states, prompts are encoded
            held, added = bytes_of(case.held()), added_bytes(case)
            host = bytes_of(case.on_host())
            rows[name] = {"held_bytes": held, "added_bytes": added, "peak_bytes": held + added, "host_bytes": host}
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                times[name].append(seconds(case))
    for name, values in times.items():
        rows[name]["seconds"] = statistics.median(values)
    return {
        "taps": taps, "batch": batch, "head_width": width, "rounds": rounds,
        "encoding_over_pass": encoding_share(pipe), "depth": depth_share(pipe, taps), "rows": rows,
    }  # fmt: skip


def show(name: str, result: dict[str, Any]) -> None:
    """The table of one network and set of taps."""
    title = (
        f"{name}: batch {result['batch']}, the deepest tap is at {result['depth']:.2f} of a pass, "
        f"encoding a sample takes {result['encoding_over_pass']:.2f} of one"
    )
    columns = ("", "s a round", "fused / this", "MB held", "MB added", "peak: fused / this", "peak: host average / this", "MB host")
    table, rows = Table(*columns, title=title, box=None), result["rows"]
    for variant, row in rows.items():
        table.add_row(
            variant, f"{row['seconds']:.3f}", f"{rows['fused']['seconds'] / row['seconds']:.2f}", f"{row['held_bytes'] / 1e6:.0f}",
            f"{row['added_bytes'] / 1e6:.0f}", f"{rows['fused']['peak_bytes'] / row['peak_bytes']:.2f}",
            f"{rows['fused, host average']['peak_bytes'] / row['peak_bytes']:.2f}", f"{row['host_bytes'] / 1e6:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)


def main() -> None:
    """Measure each network, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distill_rounds.json"))
    arguments = parser.parse_args()
    # Heads of the width that the embedded student's have, and of a fifth of the default.
    networks: dict[str, tuple[Callable[[], Any], int, int]] = {
        "digits": (lambda: GuidedPipeline.from_pretrained("digits").host, 16, 128),
        "Stable Diffusion, 1/5 of the width": (middle_sized, 4, 48),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    document: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found = document.setdefault("networks", {})
    for network, (make, batch, width) in networks.items():
        for taps in ("half", "quarter"):
            name = f"{network}, {taps}"
            if arguments.only in name:
                machine = {"device": named, "torch": torch.__version__, "python": platform.python_version()}
                found[name] = {"machine": machine} | measure(make().to(device), taps, batch, width, arguments.rounds)
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(arguments.out, (json.dumps(document, indent=2) + "\n").encode())
    for name, result in found.items():
        show(name, result)


if __name__ == "__main__":
    main()
