"""`genkit synth`: clean latents that a teacher samples, for its students to learn from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from genkit.cli.common import (
    Attn,
    Debug,
    Device,
    Json,
    Output,
    Quiet,
    check_attn,
    check_device,
    check_dtype,
    check_model,
    command,
    option,
    read_prompts,
    resumable,
)

if TYPE_CHECKING:
    from genkit.distill import SynthConfig
    from genkit.ranks import Ranks

MAX_LABELS = 1_000_000
_WHAT, _HOW, _WHERE, _MACHINE = "What to draw", "How to sample", "Files", "Machine"


def synth(
    out: Annotated[Path, option(_WHERE, "Folder for the data: synth.json, and shards with latents, seeds and prompts.")],
    teacher: Annotated[
        str | None, option(_WHAT, "An embedded model, a folder, or a Hub repository.", show_default="the recipe's, or digits")
    ] = None,
    prompts: Annotated[
        Path | None, option(_WHAT, 'UTF-8 file with a prompt on each line; # starts a comment. Of .jsonl the "text" of each line.')
    ] = None,
    prompt: Annotated[list[str] | None, option(_WHAT, 'A prompt; "" is the null prompt. Repeat it for several.')] = None,
    captions: Annotated[
        str | None, option(_WHAT, "digits: the captions of the training digits, mostly in full, some as people type them.")
    ] = None,
    labels: Annotated[str | None, option(_WHAT, "Classes of a class-conditional model: 0-999, or 207,360, or names.")] = None,
    count: Annotated[
        int | None, option(_WHAT, "Items; prompts and labels repeat as needed.", min=1, show_default="one for each prompt or label")
    ] = None,
    recipe: Annotated[Path | None, option(_HOW, "TOML file with settings; options on the command line win.")] = None,
    guidance: Annotated[
        float | None, option(_HOW, "Classifier-free guidance, which the student will have built in; 1 is off.", show_default="3")
    ] = None,
    steps: Annotated[int | None, option(_HOW, "Sampling steps.", min=1, show_default="50")] = None,
    sampler: Annotated[str | None, option(_HOW, "dpm++, unipc, ddim, euler, euler-a, ...", show_default="the model's own")] = None,
    eta: Annotated[float | None, option(_HOW, "Noise of DDIM-like samplers, 0 to 1.", show_default="0")] = None,
    size: Annotated[str | None, option(_HOW, "WIDTHxHEIGHT in pixels.", show_default="the model's own")] = None,
    seed: Annotated[int | None, option(_HOW, "Another seed gives other items.", show_default="0")] = None,
    embeds: Annotated[
        bool | None,
        option(_WHERE, "Also store the encoded prompts, so that training needs no text encoder.", "--embeds", show_default="off"),
    ] = None,
    storage: Annotated[str | None, option(_WHERE, "Numbers on the disk: float16 or float32.", show_default="float16")] = None,
    shard_size: Annotated[
        int | None, option(_WHERE, "Items in a file; an interruption costs at most one file.", min=1, show_default="200")
    ] = None,
    resume: Annotated[bool, option(_WHERE, "Make what is missing of the data in --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be done, and stop.", "--dry-run")] = False,
    batch: Annotated[int, option(_MACHINE, "Items at a time; it changes none by more than rounding.", min=1)] = 16,
    device: Device = "auto",
    attn: Attn = "auto",
    dtype: Annotated[str, option(_MACHINE, "Of the network: float32, float16 or bfloat16.")] = "float32",
    allow_pickle: Annotated[bool, option(_MACHINE, "Accept weights that are pickles.", "--allow-pickle")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Sample a teacher into a folder of clean latents, the data of `genkit distill`.

    An item depends on the settings and its number alone, whatever the batch, the order or the number of processes. Ctrl-C keeps
    finished shards; [bold]--resume[/bold] makes the missing ones, and those that were damaged.

    Examples:

        [bold]genkit synth --teacher digits --captions digits --count 16000 --guidance 2 --sampler dpm++ --out data[/bold]

        [bold]genkit synth --teacher DIR --prompts prompts.txt --guidance 5 --embeds --out data[/bold]

        [bold]torchrun --nproc_per_node 2 -m genkit synth --teacher DIR --labels 0-999 --count 50000 --out data[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.ranks import Ranks
        from genkit.sweep import parse_size

        check_device(device)
        attn = check_attn(attn)
        check_dtype(dtype)
        if recipe is not None:
            from genkit.distill.config import recipe_teacher

            named = recipe_teacher(recipe)
            teacher = teacher or named
        teacher = teacher or "digits"
        check_model(teacher, allow_pickle)
        texts = read_texts(prompts, prompt or [], captions, count)
        classes = None if labels is None else parse_labels(labels)
        items = count or len(texts or classes or [])
        if items == 0:
            raise ValueError("Nothing says what to draw. Give --prompts FILE, --prompt, --captions digits or --labels; or --count "
                             "for an unconditional model.")  # fmt: skip
        width, height = (None, None) if size is None else parse_size(size)
        from genkit.distill import SynthConfig

        config = SynthConfig.preset(
            recipe, guidance_scale=guidance, steps=steps, sampler=sampler, eta=eta, height=height, width=width, seed=seed,
            storage=storage, embeds=embeds, shard_size=shard_size,
        )  # fmt: skip
        plan: dict[str, Any] = {
            "teacher": teacher, "count": items, "prompts": None if texts is None else len(set(texts)),
            "labels": None if classes is None else len(set(classes)), "folder": str(out), **dataclasses.asdict(config),
        }  # fmt: skip
        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        if dry_run:
            shards = -(-items // config.shard_size)
            output.result(plan, f"Would sample {items:,} items of {teacher} in {config.steps} steps into {out} ({shards} shards).")
            return
        with resumable(output, plan, ranks):
            made = _synthesize(
                output, plan, config, texts, classes, ranks,
                batch=batch, resume=resume, device=device, attn=attn, dtype=dtype, allow_pickle=allow_pickle,
            )  # fmt: skip
        output.result({**plan, **made}, f"{items:,} items of {teacher} in {out} ({made['seconds']:.0f} s)")


def read_texts(file: Path | None, prompts: list[str], captions: str | None, count: int | None) -> list[str] | None:
    """The prompts of the options; None if there are none.

    Raises:
        ValueError: captions and prompts at once, unknown captions or captions without a count, a file that is malformed or empty.
        OSError: the file cannot be read.
    """
    from genkit.errors import unknown

    if captions is not None:
        from genkit.data.source import open_source

        if captions != "digits":
            raise unknown("captions", captions, ["digits"])
        if prompts or file is not None:
            raise ValueError("Both --captions and prompts were given. Give one of them.")
        if count is None:
            raise ValueError("--captions digits has no end. Give --count, for instance 16000.")
        return open_source("digits", count).captions
    if file is None or file.suffix != ".jsonl":
        return read_prompts(prompts, file) or None
    return prompts + [_text(file, number, line) for number, line in enumerate(read_prompts(None, file), 1)]


def _text(file: Path, number: int, line: str) -> str:
    import json

    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'Entry {number} of the prompts file {str(file)!r} is not {{"text": "..."}}: {line:.80}')
    return text


def parse_labels(text: str) -> list[int | str]:
    """The labels of "0-9", "207,360" or "seven,three".

    Raises:
        ValueError: none, more than a million, or a range that runs backwards.
    """
    labels: list[int | str] = []
    for part in (part.strip() for part in text.split(",")):
        first, _, last = part.partition("-")
        if first.isdecimal() and last.isdecimal():
            if int(first) > int(last):
                raise ValueError(f"--labels {text!r}: the range {part!r} runs backwards. Write {last}-{first}.")
            if int(last) - int(first) + len(labels) >= MAX_LABELS:
                raise ValueError(f"--labels {text!r:.100}: that is more than {MAX_LABELS:,} labels.")
            labels += range(int(first), int(last) + 1)
        elif part:
            labels.append(int(part) if part.isdecimal() else part)
    if not labels:
        raise ValueError(f"--labels {text!r} names no class, as 0-9 or seven,three do.")
    return labels


def _synthesize(
    output: Output, plan: dict[str, Any], config: SynthConfig, texts: list[str] | None, classes: list[int | str] | None,
    ranks: Ranks, *, batch: int, resume: bool, device: str, attn: str, dtype: str, allow_pickle: bool,
) -> dict[str, Any]:  # fmt: skip
    import time

    from genkit.attention import use_attention
    from genkit.cli.common import resolve_device
    from genkit.console import progress
    from genkit.distill import synthesize
    from genkit.runner import load

    own = ranks.join(cpu=device == "cpu")
    with progress(disable=not ranks.leads) as bar:
        task = bar.add_task("items", total=-(-plan["count"] // ranks.world))
        pipe = load(
            plan["teacher"], dtype=dtype, device=own or resolve_device(device), allow_pickle=allow_pickle, quiet=output.quiet
        )
        began = time.perf_counter()
        with use_attention(pipe, attn):
            data = synthesize(
                pipe, plan["folder"], config, prompts=texts, labels=classes, count=plan["count"], batch_size=batch, resume=resume,
                ranks=ranks, progress=lambda items: bar.advance(task, items),
            )  # fmt: skip
        seconds = time.perf_counter() - began
    shapes = [list(shape) for shape in data.shapes]
    return {"shapes": shapes, "paired": data.paired, "seconds": seconds, "attention": pipe.attention}
