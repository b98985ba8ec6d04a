"""`genkit classify`: labels for images, by a diffusion model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
    check_dtype,
    check_model,
    command,
    option,
    read_prompts,
)

_WHAT, _HOW, _WHERE, _MACHINE = "What to tell apart", "How to decide", "Files", "Machine"


def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders (searched recursively), patterns.")],
    labels: Annotated[
        str | None,
        option(
            _WHAT, "Labels, as in cat,dog; of class-conditional models numbers or names.", show_default="those of the model's card"
        ),
    ] = None,
    labels_file: Annotated[Path | None, option(_WHAT, "UTF-8 text file with a label on each line; # starts a comment.")] = None,
    prompt: Annotated[
        list[str] | None,
        option(
            _WHAT,
            "Template, taken as it is, with {} for the label. Repeat it for several prompts a label.",
            show_default='"a photo of a {}", or the prompts of the model\'s card',
        ),
    ] = None,
    model: Annotated[str, option(_WHAT, "An embedded model (`genkit zoo list`), a folder, or a Hub repository.")] = "digits",
    policy: Annotated[
        str,
        option(
            _HOW,
            "race (drops beaten labels by paired tests), rounds (the published rounds), exhaustive, taylor (a gradient makes the "
            "shortlist), dive (gradients lead from label to label, those met are raced), tree (needs --hierarchy).",
        ),
    ] = "race",
    budget: Annotated[int | None, option(_HOW, "Network evaluations of an image, at most.", show_default="labels x pairs")] = None,
    pairs: Annotated[int, option(_HOW, "Pairs of noise level and noise that a label is scored on, at most.", min=1)] = 64,
    alpha: Annotated[float, option(_HOW, "Probability that a race drops the label that all pairs would choose.")] = 0.05,
    metric: Annotated[str, option(_HOW, "Loss of the predicted noise: l2, l1 or huber.")] = "l2",
    weighting: Annotated[str, option(_HOW, "uniform, or elbo: scores are -log p(image | label) in nats.")] = "uniform",
    reduce: Annotated[str, option(_HOW, "What several prompts of a label make: min, mean or logsumexp.")] = "min",
    prior: Annotated[str | None, option(_HOW, "Prior probabilities, as in cat=0.9,dog=0.1.", show_default="uniform")] = None,
    temperature: Annotated[float | None, option(_HOW, "Of the posterior.", show_default="from the number of values")] = None,
    pmi: Annotated[bool, option(_HOW, "Subtract the null prompt's score: comparable between images.", "--pmi")] = False,
    hierarchy: Annotated[Path | None, option(_HOW, 'For tree: JSON file, {"prompt of a group": ["label", ...]}.')] = None,
    seed: Annotated[int, option(_HOW, "Of the noise.", min=0)] = 42,
    accuracy: Annotated[
        bool | None,
        option(_WHERE, "Take the name of an image's folder as its true label.", show_default="where all of them are labels"),
    ] = None,
    out: Annotated[
        Path | None, option(_WHERE, "FILE.csv or FILE.json, or a folder for both. A journal beside it keeps what is finished.")
    ] = None,
    resume: Annotated[bool, option(_WHERE, "Go on with the journal of --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be done, and stop.", "--dry-run")] = False,
    batch: Annotated[
        int, option(_MACHINE, "Network evaluations at a time; it changes no result by more than rounding.", min=1)
    ] = 128,
    fold: Annotated[
        bool, option(_MACHINE, "Compute what labels and images share once, not in each evaluation; up to rounding the same.")
    ] = True,
    device: Device = "auto",
    attn: Attn = "auto",
    dtype: Annotated[str, option(_MACHINE, "float32, float16 or bfloat16.")] = "float32",
    allow_pickle: Annotated[bool, option(_MACHINE, "Accept weights that are pickles.", "--allow-pickle")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Classify images with a diffusion model that was never trained to.

    Each image is noised, and denoised under every label; the label that explains it best wins. Lower scores are better. The error
    bound limits the probability that scoring every pair would have chosen another label.

    Transparent images are put on white, of animated ones the first frame is read. Where folders are named after labels, accuracy is
    reported too. A file that cannot be read is reported, and the others are done (exit code 3).

    Examples:

        [bold]genkit classify photos/*.png --labels red,blue --prompt "a {} digit" --policy race[/bold]

        [bold]genkit classify testset --out results.csv --resume[/bold]

        [bold]torchrun --nproc_per_node 2 -m genkit classify testset --out results[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.cli.classify_job import Job, Table, truths
        from genkit.data.pictures import find_pictures
        from genkit.ranks import Ranks

        check_device(device)
        attn = check_attn(attn)
        check_dtype(dtype)
        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        check_model(model, allow_pickle)
        files = find_pictures(images)
        known = _class_prompts(model)
        names = _labels(labels, labels_file, known)
        settings = {
            "model": model, "dtype": dtype, **_texts(names, prompt, known), "policy": policy, "budget": budget, "alpha": alpha,
            "metric": metric, "reduce": reduce, "prior": _prior(prior), "temperature": temperature, "pmi": pmi,
            "hierarchy": _hierarchy(hierarchy), "plan": {"count": pairs, "weighting": weighting, "seed": seed},
        }  # fmt: skip
        truth = truths(files, names, accuracy)
        table = None if out is None else Table(out, names)
        if dry_run:
            _print_plan(output, files, names, settings, truth is not None)
            return
        Job(files, names, settings, truth, table, ranks, output).run(
            device=device, attn=attn, batch_size=batch, fold=fold, allow_pickle=allow_pickle, resume=resume
        )


def _class_prompts(model: str) -> dict[str, str]:
    """The prompt of each class that the model was made for, where its card says so (`digits`, generative classifiers)."""
    from genkit import zoo

    known = zoo.card(model).get("class_prompts", {}) if model in zoo.names() or Path(model).is_dir() else {}
    if not isinstance(known, dict):
        raise ValueError(f"The class_prompts of {model!r} are no mapping of labels to prompts. Repair its card.json.")
    return {str(label): str(prompt) for label, prompt in known.items()}


def _labels(text: str | None, file: Path | None, known: dict[str, str]) -> list[str]:
    """The labels of the command line and the file, or those of the model's card.

    Raises:
        OSError, ValueError: the file is missing, not UTF-8 or holds no label; too few labels, one twice.
    """
    from genkit.pipelines.classes import check_labels

    if text is None and file is None:
        if not known:
            raise ValueError("There are no labels. Say what to tell apart: --labels cat,dog, or --labels-file FILE.")
        return check_labels(list(known))
    given = [part.strip() for part in (text or "").split(",") if part.strip()]
    return check_labels(read_prompts(given, file, what="label"))


def _texts(names: list[str], templates: list[str] | None, known: dict[str, str]) -> dict[str, Any]:
    """How the pipeline gets the labels: with templates, or with the prompts of the model's card if it knows them all."""
    from genkit.pipelines.classes import fill_template

    if templates:
        fill_template(names, templates)
        return {"labels": names, "template": templates}
    return {"prompts": {name: known[name] for name in names}} if set(names) <= set(known) else {"labels": names}


def _prior(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    prior = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        try:
            prior[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"--prior {part!r} is not LABEL=PROBABILITY, as in cat=0.9,dog=0.1.") from None
    return prior


def _hierarchy(file: Path | None) -> dict[str, list[str]] | None:
    if file is None:
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"The hierarchy {str(file)!r} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The hierarchy {str(file)!r} is not JSON ({error}).") from error
    if not isinstance(content, dict) or not all(isinstance(value, list) for value in content.values()):
        raise ValueError(f'The hierarchy {str(file)!r} is not of the form {{"prompt of a group": ["label", ...]}}.')
    return content


def _print_plan(output: Output, files: list[Path], names: list[str], settings: dict[str, Any], accuracy: bool) -> None:
    pairs, prompts = settings["plan"]["count"], len(names) * len(settings.get("template") or [""])
    most = (settings["budget"] or prompts * pairs) + pairs * settings["pmi"]
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    text = (
        f"Would classify {len(files)} images into {len(names)} labels ({shown}) "
        f"by {settings['policy']}, with at most {most:,} network evaluations each{', and report accuracy' if accuracy else ''}."
    )
    output.result(
        {"count": len(files), "images": list(map(str, files)), "most_evaluations": most, "accuracy": accuracy, **settings}, text
    )
