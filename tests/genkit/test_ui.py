"""The page for the browser: what its buttons do, and that it names only embedded models; the page itself where gradio is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from genkit import ui


def test_sampling_is_that_of_the_recipe() -> None:
    from genkit.pipelines import GuidedPipeline
    from genkit.recipe import Recipe

    first, second = ui.sample("a red seven", "digits", 2, 5, 2, 2.0, "ddim", "classifier:label=seven,scale=1")
    recipe = Recipe(prompt="a red seven", seed=6, steps=2, cfg=2.0, sampler="ddim", guidance=("classifier:label=seven,scale=1",))
    again = recipe.run(GuidedPipeline.from_pretrained("digits"))
    assert first.size == second.size == again.size
    difference = max(abs(a - b) for a, b in zip(second.tobytes(), again.tobytes(), strict=True))
    assert difference <= 1  # another batch size sums in another order


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "/etc"}, "not embedded"),
        ({"guidance": "os:system"}, "os:system"),
        ({"count": 99}, "99 images"),
        ({"sampler": "eular"}, "eular"),
    ],
)
def test_a_page_runs_nothing_but_what_it_should(change: dict[str, object], says: str) -> None:
    values = {"prompt": "a two", "model": "digits", "count": 1, "seed": 0, "steps": 2, "cfg": 1.0, "sampler": "", "guidance": ""}
    with pytest.raises(ValueError, match=says):
        ui.sample(**{**values, **change})  # type: ignore[arg-type]


def test_classifying_tells_the_cost() -> None:
    from genkit.data.digits import draw

    picture = Image.fromarray(((draw("test", 1).images[0] / 2 + 0.5) * 255).byte().permute(1, 2, 0).numpy())
    told, cost = ui.classify(picture, "", "race")
    assert sum(told.values()) == pytest.approx(1, abs=1e-3)
    assert "network evaluations" in cost
    assert set(ui.classify(picture, "two, seven", "exhaustive")[0]) == {"two", "seven"}
    with pytest.raises(ValueError, match="There is no picture"):
        ui.classify(None, "", "race")


def test_detecting_draws_what_it_tells() -> None:
    picture, rows, cost = ui.detect(ui.scene(0), True, 500)
    assert picture.size == (320, 320)
    assert rows
    assert all(len(row) == 6 for row in rows)
    assert int(cost.replace(",", "").removesuffix(" network evaluations")) < 4000  # that of the look that is under way, and scores


def test_assembling_writes_a_model(tmp_path: Path) -> None:
    pytest.importorskip("trimesh")
    file, views, told = ui.assemble("table", 3, None, tmp_path)
    assert Path(file).read_bytes()[:4] == b"glTF"
    assert views.width > views.height
    assert "part_accuracy" in told


def test_the_page_has_its_tabs_and_calls() -> None:
    pytest.importorskip("gradio")
    page = ui.build()
    names = {str(call.api_name) for call in page.fns.values()}
    assert {"sample", "classify", "assemble"} <= names
    assert {block.label for block in page.blocks.values() if type(block).__name__ == "Tab"} >= {"Sample", "Classify", "Assemble"}
