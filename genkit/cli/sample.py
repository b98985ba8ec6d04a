"""`genkit sample`: images from prompts, one for each prompt, seed and sweep point."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.cli.common import (
    Attn,
    Debug,
    Device,
    Json,
    Output,
    Quiet,
    check_attn,
    check_device,
    check_model,
    command,
    option,
    read_prompts,
)

if TYPE_CHECKING:
    from genkit.recipe import Recipe
    from genkit.runner import Watch
    from genkit.sweep import Plan

_WHAT, _HOW, _WHERE, _MACHINE = "What to draw", "How to sample", "Files", "Machine"


def sample(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help='What to draw; "" is the null prompt.')] = None,
    prompts_file: Annotated[Path | None, option(_WHAT, "UTF-8 text file with a prompt on each line; # starts a comment.")] = None,
    labels: Annotated[str | None, option(_WHAT, "Classes, by index or name (207,360), for class-conditional models.")] = None,
    negative: Annotated[str | None, option(_WHAT, "Negative prompt.")] = None,
    model: Annotated[
        str | None, option(_WHAT, "An embedded model (`genkit zoo list`), a folder, or a Hub repository.", show_default="digits")
    ] = None,
    source: Annotated[
        Path | None, option(_WHAT, "Repeat the image that genkit wrote to this PNG; other options override its recipe.", "--from")
    ] = None,
    seeds: Annotated[str | None, option(_HOW, "Seeds, as in 0-15 or 1,2,5-10.", "--seeds", "--seed", show_default="0")] = None,
    steps: Annotated[int | None, option(_HOW, "Sampling steps.", show_default="30, or a few-step student's own")] = None,
    cfg: Annotated[
        float | None, option(_HOW, "Classifier-free guidance; 1 is off.", show_default="3, or a few-step student's own: 1")
    ] = None,
    sampler: Annotated[
        str | None,
        option(_HOW, "ddim, ddpm, dpm++, unipc, euler, euler-a, heun, lms, pndm, ...", show_default="the model's own"),
    ] = None,
    eta: Annotated[float | None, option(_HOW, "Noise of DDIM-like samplers, 0 to 1.", show_default="0")] = None,
    size: Annotated[str | None, option(_HOW, "WIDTHxHEIGHT in pixels.", show_default="the model's own")] = None,
    guidance: Annotated[
        list[str] | None,
        option(
            _HOW, "NAME:key=value,... as in classifier:label=seven,scale=2, or MODULE:FUNCTION:scale=2. Repeat it to add several."
        ),
    ] = None,
    token: Annotated[
        list[Path] | None, option(_HOW, "Token file of `genkit train token`; prompts may say its <name>. Repeat it for several.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        option(_HOW, "key=a,b,c: steps, cfg, eta, sampler, negative, or a guidance's classifier.scale. Repeat it for a grid."),
    ] = None,
    out: Annotated[Path, option(_WHERE, "Folder for the images.")] = Path("out"),
    grid: Annotated[bool, option(_WHERE, "Draw a labelled contact sheet, grid.png, of up to 1,024 images.")] = True,
    shards: Annotated[bool, option(_WHERE, "Spread the images over 256 folders in it, for very many.", "--shards")] = False,
    heatmaps: Annotated[
        bool, option(_WHERE, "Also heat maps of the prompt's words over each image, in the folder heatmaps.", "--heatmaps")
    ] = False,
    heatmap_words: Annotated[str | None, option(_WHERE, "Heat maps of these words only, as in red,seven.")] = None,
    attention_entropy: Annotated[
        bool, option(_WHERE, "Also the entropy of attention, module by module, in each JSON.", "--attention-entropy")
    ] = False,
    resume: Annotated[bool, option(_WHERE, "Keep the images that are there already.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Print what would be made, and stop.", "--dry-run")] = False,
    batch: Annotated[int, option(_MACHINE, "Images at a time; it changes none by more than rounding.", min=1)] = 16,
    device: Device = "auto",
    attn: Attn = "auto",
    dtype: Annotated[str | None, option(_MACHINE, "float32, float16 or bfloat16.", show_default="float32")] = None,
    allow_pickle: Annotated[bool, option(_MACHINE, "Accept weights that are pickles.", "--allow-pickle")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make images from prompts.

    Writes a PNG and a JSON for each prompt, seed and sweep point, and a contact sheet. Each PNG carries its recipe, so
    [bold]--from[/bold] repeats it. A seed gives the same image whatever the batch, the order or the number of processes.

    Examples:

        [bold]genkit sample "a red seven on a yellow background" --seeds 0-15[/bold]

        [bold]genkit sample "" --guidance classifier:label=seven --sweep classifier.scale=0,1,2 --seeds 0-7[/bold]

        [bold]genkit sample "a red seven on a yellow background" --heatmap-words red,seven,yellow[/bold]

        [bold]genkit sample --from out/IMAGE.png --seeds 100-103[/bold]

        [bold]torchrun --nproc_per_node 2 -m genkit sample "a blue two" --seeds 0-99[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.cli.job import Job
        from genkit.gallery import Gallery
        from genkit.ranks import Ranks
        from genkit.sweep import Axis, parse_seeds, plan

        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        check_device(device)
        attn = check_attn(attn)
        settings = dict(model=model, negative=negative, steps=steps, cfg=cfg, sampler=sampler, eta=eta, dtype=dtype)  # noqa: C408
        base = _base(source, settings, size=size, guidance=guidance, tokens=token)
        folder = check_model(base.model, allow_pickle)
        if source is None and folder is not None:
            base = as_student(base, folder, settings)
        subjects = _subjects(base, read_prompts(prompts, prompts_file), labels, from_recipe=source is not None, folder=folder)
        table = plan(subjects, [base.seed] if seeds is None else parse_seeds(seeds), [Axis.parse(text) for text in sweep or []])
        _check_guidance(table)
        watch = _watch(table, heatmaps, heatmap_words, attention_entropy)
        if dry_run:
            _print_plan(output, table, out)
            return
        gallery = Gallery(out, shards=shards)
        done = {recipe for recipe in table.recipes if resume and gallery.has(recipe, watch)}
        Job(table, gallery, done, ranks, output, watch).run(
            device=device, attn=attn, batch_size=batch, allow_pickle=allow_pickle, grid=grid, tokens=token or []
        )


def _base(
    source: Path | None, settings: dict[str, Any], *, size: str | None, guidance: list[str] | None, tokens: list[Path] | None
) -> Recipe:
    """The recipe that all images start from: that of --from or the default one, with the options that were given."""
    import dataclasses

    from genkit.recipe import Recipe, read_recipe
    from genkit.sweep import parse_size
    from genkit.tokens import read_tokens

    given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    if size is not None:
        given["width"], given["height"] = parse_size(size)
    if guidance:
        given["guidance"] = tuple(guidance)
    files = read_tokens(tokens or [])
    given["tokens"] = tuple(file.identity for file in files)
    if source is None:
        return Recipe(**given)
    recipe = read_recipe(source)
    # A file that was named replaces the recipe's of the same token; one that was not is refused.
    named = {file.token for file in files}
    given["tokens"] = (*(t for t in recipe.tokens if t.rpartition(":")[0] not in named), *given["tokens"])
    base = dataclasses.replace(recipe, **given)
    models = [settings["model"]] if settings["model"] else []
    base.require_trusted(models=models, guidance=guidance or [], tokens=[file.identity for file in files])
    return base


def as_student(base: Recipe, folder: Path, given: dict[str, Any]) -> Recipe:
    """With a few-step student's own steps and guidance where none were given; other models' recipes as they are."""
    import dataclasses

    from genkit.distill.spec import FewStepSpec

    spec = FewStepSpec.load(folder)
    if spec is None:
        return base
    own: dict[str, Any] = {"steps": spec.default_steps, "cfg": spec.guidance_scale}
    return dataclasses.replace(base, **{key: value for key, value in own.items() if given[key] is None})


def _subjects(base: Recipe, prompts: list[str], labels: str | None, *, from_recipe: bool, folder: Path | None) -> list[Recipe]:
    """A recipe for each prompt or label."""
    import dataclasses
    import json

    if prompts and labels is not None:
        raise ValueError("Both prompts and --labels were given. Text-to-image models take prompts, class-conditional ones labels.")
    if labels is not None:
        values = [int(text) if text.isdecimal() else text for text in (part.strip() for part in labels.split(",")) if text]
        return [dataclasses.replace(base, prompt=None, label=label) for label in dict.fromkeys(values)]
    if prompts:
        return [dataclasses.replace(base, prompt=prompt, label=None) for prompt in dict.fromkeys(prompts)]
    if not from_recipe and (folder is None or "tokenizer" in json.loads((folder / "model_index.json").read_text(encoding="utf-8"))):
        raise ValueError('There is no prompt. Say what to draw: genkit sample "a red seven" ("" is the null prompt).')
    return [base]


def _check_guidance(table: Plan) -> None:
    """Names and parameters of all guidance, before anything is loaded."""
    from genkit.guidance import registry

    for spec in dict.fromkeys(spec for recipe in table.recipes for spec in recipe.guidance):
        registry.check(spec)


def _watch(table: Plan, heatmaps: bool, words: str | None, entropy: bool) -> Watch:
    """What to record of attention; the words are looked for in each prompt.

    Raises:
        ValueError: a prompt that has no words, or not these.
    """
    from genkit.denoisers.words import chosen_words
    from genkit.runner import Watch

    chosen = None if words is None else tuple(word.strip() for word in words.split(",") if word.strip())
    if chosen == ():
        raise ValueError(f"--heatmap-words {words!r} names no word. Give some of the prompt's, as in red,seven.")
    watch = Watch(heatmaps=heatmaps or chosen is not None, words=chosen, entropy=entropy)
    for recipe in table.recipes if watch.heatmaps else []:
        if not chosen_words(recipe.prompt or "", chosen):
            raise ValueError(
                f"There are no words to make heat maps of in {recipe.subject!r:.100}. Give a prompt, or leave --heatmaps out."
            )
    return watch


def _print_plan(output: Output, table: Plan, out: Path) -> None:
    images = [{"file": str(out / f"{recipe.name}.png"), "recipe": recipe.to_dict()} for recipe in table.recipes]
    first = table.recipes[0]
    settings = ", ".join(f"{key} {value}" for key, value in first.to_dict().items() if value not in (None, [], ""))
    lines = [f"Would make {len(images)} images in {out} ({len(table.rows)} x {len(table.columns)}). The first: {settings}."]
    output.result({"count": len(images), "images": images}, "\n".join(lines + [f"  {image['file']}" for image in images]))
