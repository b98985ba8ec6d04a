"""A page for the browser: sample with guidance, classify, detect and assemble with the embedded models. Needs gradio (extra `ui`).

It listens on the loopback address alone, sends nothing anywhere, and only ever loads embedded models.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit import samplers, zoo
from genkit.errors import unknown
from genkit.recipe import Recipe

if TYPE_CHECKING:
    import gradio
    from PIL.Image import Image

TEXT_MODELS = ("digits", "digits-turbo")
MOST_IMAGES, MOST_STEPS = 16, 100


@functools.cache
def _loaded(model: str, device: str) -> Any:
    """An embedded model; a page may name no other."""
    from genkit.runner import load

    if model not in zoo.names():
        raise unknown("embedded model", model, zoo.names())
    return load(model, device=device, quiet=True)


@functools.cache
def _prior(device: str) -> Any:
    from genkit.pipelines import LayoutPriorPipeline

    return LayoutPriorPipeline.from_pretrained(zoo.path("scenes-prior")).to(device)


def sample(
    prompt: str, model: str, count: int, seed: int, steps: int, cfg: float, sampler: str, guidance: str, *, device: str = "cpu"
) -> list[Image]:
    """Images of one prompt, seeds from `seed` on.

    Args:
        sampler: a name of `genkit.samplers`, or "" for the model's own.
        guidance: specs as `genkit sample --guidance` takes them, separated by spaces; only those that run no code of a user.

    Raises:
        ValueError: see `Recipe`; or guidance that a page may not name.
        FloatingPointError: the run became NaN.
    """
    from genkit.runner import run

    if not (1 <= int(count) <= MOST_IMAGES and 1 <= int(steps) <= MOST_STEPS):
        raise ValueError(f"{count} images in {steps} steps: give 1 to {MOST_IMAGES} images and 1 to {MOST_STEPS} steps.")
    common = Recipe(
        model=model, prompt=prompt, steps=int(steps), cfg=float(cfg), sampler=sampler or None, guidance=tuple(guidance.split())
    )
    common.require_trusted()
    recipes = [dataclasses.replace(common, seed=int(seed) + i) for i in range(int(count))]
    outcomes = list(run(_loaded(model, device), recipes))
    failed = [outcome.error for outcome in outcomes if outcome.image is None]
    if failed:
        raise FloatingPointError(failed[0])
    return [outcome.image for outcome in outcomes if outcome.image is not None]


def classify(picture: Image | None, labels: str, policy: str, *, device: str = "cpu") -> tuple[dict[str, float], str]:
    """Probabilities of labels for a picture, and what they cost; without labels those of the model's card."""
    from genkit.pipelines import DiffusionClassifierPipeline

    if picture is None:
        raise ValueError("There is no picture. Drop one, or draw one on the first page.")
    pipe = DiffusionClassifierPipeline.from_pipe(_loaded("digits", device))
    names = [part.strip() for part in labels.split(",") if part.strip()]
    if names:
        out = pipe([picture], labels=names, template="a {}", policy=policy)
    else:
        out = pipe([picture], prompts=zoo.card("digits")["class_prompts"], policy=policy)
    told = {name: float(value) for name, value in out.probabilities[0].items() if value is not None}
    return told, f"{out.evaluations[0]} network evaluations; error bound {out.error_bounds[0]:.3f}"


def detect(picture: Image | None, prior: bool, budget: int, *, device: str = "cpu") -> tuple[Image, list[list[Any]], str]:
    """The picture with what was found, a table of it, and what it cost; after `budget` evaluations nothing more is looked for."""
    from genkit.images import with_boxes
    from genkit.inversion.layout_search import LayoutSearch
    from genkit.pipelines import LayoutInversionPipeline

    if picture is None:
        raise ValueError("There is no picture. Drop one, or take a scene.")
    pipe = LayoutInversionPipeline.from_pipe(_loaded("scenes", device))
    width, height = pipe.picture_size
    shown = picture.convert("RGB").resize((width, height))
    search = LayoutSearch(budget=int(budget))
    found = pipe([shown], prior=_prior(device) if prior else None, search=search).detections[0]
    boxes = [[x0 * width, y0 * height, x1 * width, y1 * height] for x0, y0, x1, y1 in found.layout.boxes]
    texts = [f"{label} {score:.2f}" for label, score in zip(found.layout.labels, found.scores, strict=True)]
    rows = [
        [label, round(score, 3), *(round(value, 1) for value in box)]
        for label, score, box in zip(found.layout.labels, found.scores, boxes, strict=True)
    ]
    return with_boxes(shown, boxes, texts), rows, f"{found.evaluations:,} network evaluations"


def scene(number: int) -> Image:
    """A held-out scene of several digits."""
    from torchvision.transforms.functional import to_pil_image

    from genkit.data import scenes

    return to_pil_image((scenes.draw("test", int(number) + 1).images[-1] / 2 + 0.5).clamp(0, 1))


def assemble(category: str, number: int, upload: str | None, folder: Path) -> tuple[str, Image, str]:
    """Parts of a generated piece of furniture, or those of a .glb in their assembled pose, on a scan of the whole.

    Returns:
        A .glb of the assembly, views of it, and how right it is.
    """
    import json

    from PIL import Image as Images

    from genkit.assembly import evaluate
    from genkit.assembly.export import write_glb, write_turntable
    from genkit.data.furniture import draw
    from genkit.data.meshes import read_parts, read_reference
    from genkit.pipelines import PartAssemblyPipeline

    if upload:
        parts = read_parts(Path(upload), truth=True, seed=int(number))
        scan = read_reference(Path(upload))
    else:
        piece = draw(category, int(number), "test")
        parts, scan = piece.parts(seed=int(number)), piece.cloud(8192)
    out = PartAssemblyPipeline()(parts, reference=scan, seed=int(number))
    write_glb(folder / "assembled.glb", parts, out.poses[0])
    write_turntable(folder / "turntable.png", parts, out.poses[0])
    measures = {name: round(value, 4) for name, value in evaluate(out.poses, parts).items()}
    return str(folder / "assembled.glb"), Images.open(folder / "turntable.png"), f"{out.verdict.text}\n{json.dumps(measures)}"


def build(device: str = "cpu") -> gradio.Blocks:
    """The page.

    Raises:
        ImportError: gradio is not installed.
    """
    import os

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("The page needs gradio. Install it: pip install 'genkit-diffusion[ui]'.") from error

    def told(function: Any) -> Any:
        """A user's mistake is a message on the page."""

        @functools.wraps(function)
        def call(*values: Any) -> Any:
            try:
                return function(*values, device=device)
            except (ValueError, OSError, ImportError, FloatingPointError) as error:
                raise gr.Error(str(error)) from error

        return call

    here = [name for name in TEXT_MODELS if name in zoo.names()]
    with gr.Blocks(title="genkit", analytics_enabled=False) as page:
        gr.Markdown("# genkit\nEmbedded models; nothing leaves this machine.")
        with gr.Tab("Sample"):
            _sample_tab(gr, told(sample), here)
        with gr.Tab("Classify"):
            _classify_tab(gr, told(classify))
        with gr.Tab("Detect"):
            _detect_tab(gr, told(detect))
        with gr.Tab("Assemble"):
            _assemble_tab(gr, told)
    return page


def _sample_tab(gr: Any, run: Any, models: list[str]) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            prompt = gr.Textbox("a red seven on a yellow background", label="Prompt")
            model = gr.Dropdown(models, value=models[0], label="Model")
            guidance = gr.Textbox("", label="Guidance", placeholder="classifier:label=seven,scale=2 discriminator:scale=1")
            with gr.Row():
                cfg = gr.Slider(1, 8, 3, step=0.5, label="CFG scale")
                steps = gr.Slider(1, MOST_STEPS, 20, step=1, label="Steps")
            with gr.Row():
                count = gr.Slider(1, MOST_IMAGES, 8, step=1, label="Images")
                seed = gr.Number(0, label="First seed", precision=0)
            sampler = gr.Dropdown([("the model's own", ""), *samplers.SAMPLERS], value="", label="Sampler")
            button = gr.Button("Sample", variant="primary")
        gallery = gr.Gallery(label="Images", columns=4, height=520, scale=2, object_fit="contain")
    button.click(run, [prompt, model, count, seed, steps, cfg, sampler, guidance], gallery, api_name="sample")


def _classify_tab(gr: Any, run: Any) -> None:
    with gr.Row():
        with gr.Column():
            picture = gr.Image(type="pil", label="Picture", height=256)
            labels = gr.Textbox("", label="Labels", placeholder="the ten digits, or as in: red seven, blue two")
            policy = gr.Dropdown(["race", "rounds", "exhaustive"], value="race", label="Policy")
            button = gr.Button("Classify", variant="primary")
        with gr.Column():
            answer, cost = gr.Label(label="Probabilities"), gr.Textbox(label="Cost", interactive=False)
    button.click(run, [picture, labels, policy], [answer, cost], api_name="classify")


def _detect_tab(gr: Any, run: Any) -> None:
    from genkit.inversion.layout_search import LayoutSearch

    with gr.Row():
        with gr.Column():
            picture = gr.Image(type="pil", label="Picture", height=256)
            number = gr.Number(0, label="Held-out scene", precision=0)
            take = gr.Button("Take this scene")
            prior = gr.Checkbox(True, label="Prior of layouts")
            most = LayoutSearch.budget
            budget = gr.Slider(500, 2 * most, most, step=500, label="Network evaluations after which nothing more is looked for")
            button = gr.Button("Detect", variant="primary")
        with gr.Column():
            drawn = gr.Image(label="Found", height=340)
            table = gr.Dataframe(headers=["label", "score", "x0", "y0", "x1", "y1"], label="Objects, boxes in pixels")
            cost = gr.Textbox(label="Cost", interactive=False)
    take.click(scene, number, picture, api_name="scene")
    button.click(run, [picture, prior, budget], [drawn, table, cost], api_name="detect")


def _assemble_tab(gr: Any, told: Any) -> None:
    def run(category: str, number: int, upload: str | None, *, device: str = "cpu") -> tuple[str, Image, str]:
        # A folder of its own for each answer: the browser fetches the model after the call.
        return assemble(category, number, upload, Path(tempfile.mkdtemp(prefix="genkit-ui-")))

    from genkit.data.furniture import CATEGORIES

    with gr.Row():
        with gr.Column():
            category = gr.Dropdown(list(CATEGORIES), value="chair", label="Generated furniture")
            number = gr.Number(0, label="Number, and seed of the random poses", precision=0)
            upload = gr.File(label="or parts in their assembled pose (.glb)", file_types=[".glb"], type="filepath")
            button = gr.Button("Assemble on a scan of the whole", variant="primary")
        with gr.Column():
            model = gr.Model3D(label="Assembled", height=320)
            views, verdict = gr.Image(label="Views"), gr.Textbox(label="Verdict", lines=3, interactive=False)
    button.click(told(run), [category, number, upload], [model, views, verdict], api_name="assemble")
