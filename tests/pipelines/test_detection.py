"""LayoutInversionPipeline: its moves where the errors are known, its scores, what it refuses; `genkit detect` on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from genkit import noise
from genkit.cli.app import app
from genkit.data import scenes
from genkit.data.coco import CocoImage, write_coco
from genkit.denoisers.base import Cond
from genkit.inversion.layout_loss import LayoutLoss
from genkit.inversion.layout_search import LayoutSearch, without_slot
from genkit.inversion.proposals import new, propose
from genkit.layouts import Layout, LayoutPrior, pack
from genkit.layouts.grounding import Grounding
from genkit.layouts.layout import inside
from genkit.layouts.prior import prior_scheduler
from genkit.pipelines import GuidedPipeline, LayoutInversionPipeline, LayoutPriorPipeline
from genkit.pipelines.detection import PLAN as SCENES_PLAN
from genkit.scoring import PairPlan
from tests import tiny
from tests.genkit.test_layouts import NAMES
from tests.genkit.test_layouts import tiny as layout_model
from tests.processes import two_processes

PLAN = PairPlan(count=6, weighting="elbo", span=(0.1, 0.9))
SEARCH = LayoutSearch(few=2, some=4, proposals=3, steps=3, budget=300)


def pipeline(paint: int = 0) -> LayoutInversionPipeline:
    pipe = LayoutInversionPipeline(layout_model(paint=paint))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prior(names: list[str], slots: int = 3) -> LayoutPriorPipeline:
    torch.manual_seed(0)
    return LayoutPriorPipeline(LayoutPrior(names, slots=slots, width=16, layers=1).eval(), prior_scheduler())


class Planted(LayoutLoss):
    """A loss whose minimum is known: at each place the squared difference to what is drawn, classes at other heights."""

    def __init__(self, truth: Tensor, side: int = 16) -> None:
        self.side, self.pairs, self.prior, self.beta, self.evaluations = side, range(16), None, 1.0, 0
        self.grounding = Grounding(NAMES, len(truth), lambda packed: Cond({"layout": packed}))
        self.target = self._drawn(truth[None])[0]

    def _drawn(self, layouts: Tensor) -> Tensor:
        """Sums of soft boxes (B, h, w), whose edges have a gradient."""
        at = (torch.arange(self.side) + 0.5) / self.side
        label, x0, y0, x1, y1 = (part[..., None] for part in layouts.unbind(-1))
        inside_x = torch.sigmoid(40 * (at - x0)) * torch.sigmoid(40 * (x1 - at))
        inside_y = torch.sigmoid(40 * (at - y0)) * torch.sigmoid(40 * (y1 - at))
        height = torch.where(label >= 0, 3 + label, 0.0)
        return (height[..., None] * inside_y[..., :, None] * inside_x[..., None, :]).sum(1)

    def maps(self, layouts: Tensor, count: int | None = None) -> Tensor:
        self.evaluations += len(layouts)
        return (self._drawn(layouts) - self.target).square()

    def gradient(self, layouts: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        boxes = layouts[..., 1:].detach().requires_grad_()
        with torch.enable_grad():
            losses = self.maps(torch.cat([layouts[..., :1], boxes], -1)).sum((1, 2))
            (gradient,) = torch.autograd.grad(losses.sum(), boxes)
        return losses.detach(), gradient


class TestSearch:
    def test_it_finds_what_was_planted(self) -> None:
        truth = pack([Layout([0, 2, 1], [(0.06, 0.1, 0.4, 0.5), (0.55, 0.1, 0.9, 0.4), (0.3, 0.6, 0.7, 0.95)])], NAMES, 4)[0]
        loss = Planted(truth)
        found, trace = LayoutSearch(steps=60)(loss, 4, len(NAMES))
        order, own = truth[:3, 1].argsort(), found[found[:, 0] >= 0]
        own = own[own[:, 1].argsort()]
        assert own[:, 0].tolist() == truth[:3][order][:, 0].tolist()
        torch.testing.assert_close(own[:, 1:], truth[:3][order][:, 1:], atol=0.02, rtol=0)
        values = loss(torch.stack(trace))
        assert (values.diff() <= 1e-9).all()  # no step makes it worse
        assert values[-1] < 0.05 * values[0]

    def test_nothing_is_found_where_nothing_is(self) -> None:
        loss = Planted(pack([Layout([], [])], NAMES, 2)[0])
        found, _ = LayoutSearch()(loss, 2, len(NAMES))
        assert (found[:, 0] == -1).all()

    def test_proposals_are_the_surprising_places(self) -> None:
        surprise = torch.zeros(16, 16)
        surprise[2:6, 3:7] = 1.0
        surprise[10:14, 9:12] = 0.5
        boxes = propose(surprise)
        torch.testing.assert_close(boxes[0], torch.tensor([3, 2, 7, 6]) / 16)
        assert any(torch.equal(box, torch.tensor([9, 10, 12, 14]) / 16) for box in boxes)
        assert not len(new(boxes, boxes))
        assert not len(propose(torch.zeros(16, 16)))

    def test_without_a_slot(self) -> None:
        layout = pack([Layout([0, 1], [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)])], NAMES, 3)[0]
        assert without_slot(layout, 0)[:, 0].tolist() == [1, -1, -1]

    @pytest.mark.parametrize("name", ["few", "some", "proposals", "lr", "doubt", "budget"])
    def test_wrong_numbers(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
            LayoutSearch(**{name: 0})


class TestLoss:
    def test_maps_add_up_to_the_classifier_s_loss(self) -> None:
        pipe = pipeline()
        torch.manual_seed(1)
        x0 = torch.randn(4, 8, 8)
        layouts = pack([Layout([0], [(0.1, 0.1, 0.6, 0.5)]), Layout([], [])], NAMES, 3)
        loss = LayoutLoss(pipe.denoiser, pipe.denoiser.grounding(), x0, PLAN)
        cond = pipe.denoiser.condition(layouts=layouts)
        pairs = PLAN.pairs(pipe.scheduler, x0.shape)
        expected = (pipe.denoiser.losses(x0[None], pairs, cond)[0] * pairs.weight).mean(1)
        torch.testing.assert_close(loss(layouts), expected, rtol=1e-4, atol=0)
        assert loss.evaluations == 12
        loss(layouts.flip(0))
        assert loss.evaluations == 12  # remembered

    def test_surprise_is_measured_against_nothing_known(self) -> None:
        pipe = pipeline(paint=5)
        x0 = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
        layouts = pack([Layout([0], [(0.1, 0.1, 0.6, 0.5)]), Layout([], [])], NAMES, 3)
        loss = LayoutLoss(pipe.denoiser, pipe.denoiser.grounding(), x0, PLAN)
        null = pipe.denoiser.condition(layouts=layouts[:1]).null()
        pairs = PLAN.pairs(pipe.scheduler, x0.shape)
        unknown = (pipe.denoiser.losses(x0[None], pairs, null)[0] * pairs.weight)[:, :4].mean()
        for layout in layouts:
            expected = loss(layout[None], 4)[0] - unknown
            torch.testing.assert_close(loss.surprise(layout, 4).double().sum(), expected, rtol=1e-4, atol=1e-4)
        plain = dataclasses.replace(loss.grounding, unknown=None)
        plainly = LayoutLoss(pipe.denoiser, plain, x0, PLAN).surprise(layouts[0])
        torch.testing.assert_close(plainly, loss.maps(layouts[:1])[0], rtol=1e-4, atol=1e-4)

    def test_what_is_left_out_of_a_scene_is_surprising(self) -> None:
        batch, layouts = scenes.draw("test", 3), pack(scenes.layouts("test", 3), scenes.CLASSES, 6)
        denoiser = LayoutInversionPipeline.from_pretrained("scenes").denoiser
        for image, layout in zip(batch.images, layouts, strict=True):
            loss = LayoutLoss(denoiser, denoiser.grounding(), denoiser.encode(image[None])[0], SCENES_PLAN)
            whole = loss.surprise(layout, 8).clamp(min=0).sum()
            for slot in range(int((layout[:, 0] >= 0).sum())):
                less = loss.surprise(without_slot(layout, slot), 8)
                assert less.clamp(min=0).sum() > whole + 4
                (box,) = inside(layout[slot : slot + 1, 1:], 16, 16)
                assert less[box].sum() > less[~box].sum()

    def test_the_gradient_is_that_of_the_loss(self) -> None:
        pipe = pipeline()
        pipe.host.layout_encoder.double(), pipe.host.unet.double()
        torch.manual_seed(1)
        layouts = pack([Layout([0], [(0.1, 0.2, 0.6, 0.5)])], NAMES, 3).double()
        x0 = torch.randn(4, 8, 8, dtype=torch.float64)
        loss = LayoutLoss(pipe.denoiser, pipe.denoiser.grounding(), x0, PLAN)
        value, gradient = loss.gradient(layouts, torch.arange(6))
        torch.testing.assert_close(value, loss(layouts).to(value))
        for side in range(4):
            step = torch.zeros_like(layouts)
            step[0, 0, 1 + side] = 1e-4
            difference = (loss(layouts + step) - loss(layouts - step)) / 2e-4
            torch.testing.assert_close(gradient[0, 0, side], difference[0], rtol=1e-3, atol=1e-5)

    def test_the_prior_counts_in_nats(self) -> None:
        pipe, known = pipeline(), prior(NAMES)
        layouts = pack([Layout([0], [(0.1, 0.1, 0.6, 0.5)]), Layout([], [])], NAMES, 3)
        x0 = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
        plain, both = (
            LayoutLoss(pipe.denoiser, pipe.denoiser.grounding(), x0, PLAN, prior=each, beta=0.5) for each in (None, known)
        )
        torch.testing.assert_close(both(layouts) - plain(layouts), 0.5 * known.nats(layouts), atol=1e-4, rtol=0)


class TestPipeline:
    def test_results_depend_on_neither_order_nor_batch(self) -> None:
        pipe = pipeline()
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        seen = []
        there = pipe(images, search=SEARCH, plan=PLAN, callback=lambda _, index, found: seen.append(index)).detections
        back = pipe(images.flip(0), search=SEARCH, plan=PLAN, batch_size=3, return_dict=False)[0]
        assert seen == [0, 1]
        for a, b in zip(there, reversed(back), strict=True):
            assert a is not None
            assert b is not None
            assert a.layout.labels == b.layout.labels
            torch.testing.assert_close(torch.tensor(a.layout.boxes), torch.tensor(b.layout.boxes), atol=1e-3, rtol=0)
            assert a.evaluations == b.evaluations
            assert all(0 <= score <= 1 for score in a.scores)
            assert a.scores == sorted(a.scores, reverse=True)
        assert pipe.attention is not None
        assert pipe.attention["unfused"] == 0 < pipe.attention["fused"]

    def test_interrupted(self) -> None:
        pipe = pipeline()
        found = pipe(
            torch.zeros(2, 3, 16, 16), search=SEARCH, plan=PLAN, callback=lambda pipe, index, found: pipe.interrupt()
        ).detections
        assert found[0] is not None
        assert found[1] is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"beta": -1.0}, "beta=-1.0"),
            ({"beta": float("nan")}, "beta=nan"),
            ({"temperature": 0.0}, "temperature=0.0"),
            ({"nms": 0.0}, "nms=0.0"),
            ({"search": LayoutSearch(some=9)}, "wants 9 pairs, but the plan has 6"),
            ({"prior": prior(["circle", "square"])}, "The prior knows circle, square"),
            ({"prior": prior(NAMES, slots=2)}, "The prior has 2 slots, the model 3"),
            ({"prior": prior(NAMES), "plan": PairPlan(count=16)}, "nats"),
            ({"images": []}, "no images"),
            ({"images": ["a.png"]}, "Image 0 is str"),
            ({"images": torch.zeros(3, 8, 8)}, "has shape"),
            ({"images": torch.full((3, 16, 16), float("nan"))}, "values from nan"),
        ],
    )
    def test_bad_input(self, changes: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {"images": torch.zeros(3, 16, 16), "search": SEARCH, "plan": PLAN} | changes
        with pytest.raises(ValueError, match=message):
            pipeline()(**arguments)

    def test_other_models_are_refused(self) -> None:
        image = torch.zeros(3, 16, 16)
        with pytest.raises(ValueError, match="Stable Diffusion has no layout condition"):
            LayoutInversionPipeline.from_pipe(GuidedPipeline(tiny.pipeline("stable_diffusion")))(image)
        with pytest.raises(ValueError, match="not continuous"):
            LayoutInversionPipeline(layout_model("tokens"))(image)
        with pytest.raises(ValueError, match="Did you mean 'square'"):
            pipeline()(image, labels=["sqare"])

    def test_only_the_classes_that_are_asked_for(self) -> None:
        pipe = pipeline()
        layout = Layout(["star"], [(0.1, 0.1, 0.6, 0.5)])
        few, all_ = pipe.denoiser.grounding(["star", "circle"]), pipe.denoiser.grounding()
        pair = few.condition(pack([layout], ["star", "circle"], 3)), all_.condition(pack([layout], NAMES, 3))
        torch.testing.assert_close(pair[0].tensors["layout_embeds"], pair[1].tensors["layout_embeds"])
        found = pipe(torch.rand(3, 16, 16), labels=["star"], search=SEARCH, plan=PLAN).detections[0]
        assert set(found.layout.labels) <= {"star"}

    def test_gligen_draws_what_the_stock_pipeline_draws(self) -> None:
        host = tiny.pipeline("gligen")
        host.scheduler = DDIMScheduler.from_config(host.scheduler.config)
        layout = Layout(["a cat", "seven"], [(0.1, 0.1, 0.6, 0.5), (0.3, 0.4, 0.9, 0.8)])
        seeds, arguments = [3], {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
        ours = GuidedPipeline(host)("a red seven", layouts=layout, seeds=seeds, **arguments).images
        plain = GuidedPipeline(host)("a red seven", seeds=seeds, **arguments).images
        latents = noise.normal(seeds, LayoutInversionPipeline(host).denoiser.latent_shape(None, None))
        theirs = host(
            "a red seven", gligen_phrases=list(layout.labels), gligen_boxes=[list(box) for box in layout.boxes],
            gligen_scheduled_sampling_beta=1, latents=latents, **arguments,
        ).images  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert (ours - plain).abs().max() > 1e-4
        with pytest.raises(ValueError, match="2 layouts for 1 prompts"):
            GuidedPipeline(host)("a", layouts=[layout, layout], seeds=seeds)
        with pytest.raises(ValueError, match="has the label 3"):
            GuidedPipeline(host)("a", layouts=Layout([3], [(0, 0, 1, 1)]), seeds=seeds)

    def test_gligen(self) -> None:
        """A stock pipeline: any phrases, with a prompt beside them or without."""
        host = tiny.pipeline("gligen")
        pipe = LayoutInversionPipeline(host)
        image = torch.rand(3, *pipe.picture_size[::-1], generator=torch.Generator().manual_seed(0)) * 2 - 1
        found = pipe(image, labels=["a cat", "a red seven"], search=SEARCH, plan=PLAN).detections[0]
        assert set(found.layout.labels) <= {"a cat", "a red seven"}
        assert found.evaluations > 50
        assert pipe.attention is not None
        assert pipe.attention["unfused"] == 0
        with pytest.raises(ValueError, match="say what"):
            pipe(image)


class TestCommand:
    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory: pytest.TempPathFactory) -> Any:
        root = tmp_path_factory.mktemp("detect")
        layout_model().save_pretrained(root / "model")
        prior(NAMES).save_pretrained(root / "prior")
        (root / "images").mkdir()
        torch.manual_seed(0)
        for name, size in (("a", (16, 16)), ("b", (64, 32))):
            Image.fromarray(torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8).numpy()).save(
                root / "images" / f"{name}.png"
            )
        images = [
            CocoImage(3, "a.png", 16, 16, Layout(["star"], [(0, 0, 0.5, 0.5)])),
            CocoImage(8, "b.png", 64, 32, Layout([], [])),
        ]
        write_coco(root / "coco.json", images, NAMES)
        return root

    def run(self, *arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["detect", *map(str, arguments)], prog_name="genkit")
        assert result.exit_code == code, result.stderr
        return SimpleNamespace(out=result.stdout, err=" ".join(result.stderr.split()))

    def test_files_and_figures(self, folders: Path, tmp_path: Path) -> None:
        line = [folders / "images", "--model", folders / "model", "--pairs", 4, "--budget", 200, "--out", tmp_path, "--json"]
        document = json.loads(self.run(*line, "--reference", folders / "coco.json").out)
        assert {"AP", "AP50"} <= set(document)
        a, b = document["results"]
        assert set(a) >= {"image", "boxes", "labels", "scores", "evaluations"}
        for record, (left, right, height) in ((a, (0, 16, 16)), (b, (16, 48, 32))):  # b is cut to its centre
            assert record["boxes"], "noise is no picture of nothing to this model"
            for x0, y0, x1, y1 in record["boxes"]:
                assert left <= x0 < x1 <= right
                assert 0 <= y0 < y1 <= height
        rows = json.loads((tmp_path / "coco.json").read_text())
        assert {row["image_id"] for row in rows} == {3, 8}
        assert json.loads((tmp_path / "detections.json").read_text())["results"] == document["results"]
        for name, width in (("a.png", 320), ("b.png", 320)):
            with Image.open(tmp_path / name) as picture:
                assert picture.width == width
        assert "holds results" in self.run(*line, code=2).err
        again = json.loads(self.run(*line, "--resume").out)
        assert again["results"] == document["results"]
        assert "was made with" in self.run(*line, "--resume", "--beta", 2, code=2).err
        surest = max(a["scores"])
        fewer = json.loads(self.run(*line, "--resume", "--least", surest).out)["results"][0]
        assert fewer["scores"] == [surest]

    def test_two_processes_find_what_one_finds(self, folders: Path, tmp_path: Path) -> None:
        line = ["detect", folders / "images", "--model", folders / "model", "--prior", folders / "prior", "--pairs", 4]
        line = [str(part) for part in (*line, "--budget", 200, "--device", "cpu", "--json", "--out")]
        _, stdout, stderr = two_processes([*line, str(tmp_path / "two")], ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
        assert (tmp_path / "two" / "detections.1.jsonl").is_file(), stderr
        two, one = (json.loads(text) for text in (stdout, CliRunner().invoke(app, [*line, str(tmp_path / "one")]).stdout))
        for a, b in zip(two["results"], one["results"], strict=True):
            assert (a["image"], a["labels"], a["evaluations"]) == (b["image"], b["labels"], b["evaluations"])
            assert torch.tensor(a["boxes"]).sub(torch.tensor(b["boxes"])).abs().max() < 0.1  # pixels
            assert a["scores"] == pytest.approx(b["scores"], abs=1e-3)

    def test_a_table_for_people_and_a_prior(self, folders: Path) -> None:
        line = [
            folders / "images" / "a.png",
            "--model",
            folders / "model",
            "--pairs",
            4,
            "--budget",
            200,
            "--prior",
            folders / "prior",
        ]
        assert "1 of 1 images." in self.run(*line).out
        plan = json.loads(self.run(*line, "--dry-run", "--json").out)
        assert plan["prior"] == str(folders / "prior")
        assert plan["count"] == 1

    def test_bad_input(self, folders: Path, tmp_path: Path) -> None:
        line = [folders / "images", "--model", folders / "model", "--pairs", 4, "--budget", 200]
        other = tmp_path / "other.json"
        write_coco(other, [CocoImage(1, "c.png", 9, 9, Layout(["star"], [(0, 0, 1, 1)]))], NAMES)
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        for more, message in (
            (["--reference", other], "lacks 'a.png'"),
            (["--reference", broken], "is no "),
            (["--prior", tmp_path / "none"], "none"),
            (["--dtype", "float3"], "Unknown dtype"),
        ):
            assert message in self.run(*line, *more, code=2).err
        assert "no layout condition" in self.run(folders / "images", "--model", "digits", "--prior", "none", code=2).err
        assert "cannot be read" in self.run(*line, broken, code=3).err
