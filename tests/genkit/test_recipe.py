"""Recipes as data: validation, JSON, hash, names, trust; seeds, sweeps and plans."""

from __future__ import annotations

import dataclasses
import json

import pytest

from genkit import samplers, sweep, zoo
from genkit.recipe import MAX_JSON, Recipe, versions
from genkit.sweep import Axis, parse_seeds, parse_size, plan

FULL = Recipe(
    model="digits",
    prompt="a 'red' seven,\nquite \u00e9t\u00e9 \u4e03",
    negative="blur",
    seed=2**62,
    steps=7,
    cfg=2,
    sampler="euler-a",
    eta=0.5,
    width=64,
    height=32,
    guidance=("classifier:label=seven,scale=2",),
    dtype="bfloat16",
)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(prompt=""), Recipe(label="cat"), Recipe(label=3), FULL])
def test_json_gives_the_same_recipe_back(recipe: Recipe) -> None:
    text = recipe.to_json(versions())
    assert text.isascii()
    assert Recipe.from_json(text) == recipe
    assert Recipe.from_json(text).hash == recipe.hash


def test_hash_tells_every_field_apart_but_not_equal_numbers() -> None:
    changes = {
        "model": "m", "prompt": "p", "negative": "n", "seed": 1, "steps": 2, "cfg": 1.5, "sampler": "ddim", "eta": 0.1,
        "guidance": ("classifier:label=1",), "dtype": "float16",
    }  # fmt: skip
    base = Recipe(prompt="a")
    hashes = {base.hash, Recipe(label=1).hash, Recipe(prompt="a", width=8, height=8).hash}
    hashes |= {dataclasses.replace(base, **{key: value}).hash for key, value in changes.items()}
    assert len(hashes) == len(changes) + 3
    assert Recipe(cfg=3).hash == Recipe(cfg=3.0).hash


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", 0, "steps must be a whole number from 1"),
        ("steps", True, "steps"),
        ("steps", "30", "'30'"),
        ("steps", 10**9, "steps"),
        ("seed", -1, "seed"),
        ("seed", 2**63, "seed"),
        ("cfg", float("nan"), "cfg must be a number"),
        ("cfg", "3", "'3'"),
        ("eta", 1.5, "eta must be a number from 0 to 1; got 1.5"),
        ("sampler", "eular", "Did you mean 'euler'"),
        ("sampler", 3, "sampler must be text"),
        ("dtype", "float33", "Did you mean 'float32'"),
        ("dtype", [], "Unknown dtype"),
        ("prompt", 7, "prompt must be text"),
        ("prompt", "x" * 30_000, "at most 20,000"),
        ("prompt", "\x1b[31m", "control characters"),
        ("prompt", "\udcff", "not valid Unicode"),
        ("negative", {}, "negative must be text"),
        ("label", -1, "label"),
        ("label", 1.5, "label"),
        ("model", "", "model is empty"),
        ("guidance", "classifier", "guidance must be a list"),
        ("guidance", [1], "guidance must be text"),
        ("guidance", ["classifier"] * 17, "at most 16"),
    ],
)
def test_bad_fields_are_refused_by_name(field: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        Recipe(**{field: value})  # type: ignore[arg-type]
    assert says in str(caught.value)


def test_fields_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="width and height together"):
        Recipe(width=64)
    with pytest.raises(ValueError, match="prompt or a label"):
        Recipe(prompt="a", label=1)
    with pytest.raises(ValueError, match="width must be"):
        Recipe(width=10**6, height=8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 50_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('{"cfg": NaN}', "not JSON"),
        ('{"steps": 1' + "0" * 5000 + "}", "not JSON"),
        ('{"__class__": "os"}', "unknown field '__class__'"),
        ('{"hash": "x"}', "unknown field 'hash'"),
        ('{"steps": null}', "steps"),
        ('{"prompt": {"$ref": "x"}}', "prompt must be text"),
        (" " * (MAX_JSON + 1), "more than"),
    ],
)
def test_hostile_json_is_a_value_error(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        Recipe.from_json(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "starts"),
    [
        ("A red seven!", "a-red-seven-s0007-"),
        ("", "null-s0007-"),
        ("../../etc/passwd", "etc-passwd-s0007-"),
        ("\u4e03", "prompt-s0007-"),
        ("caf\u00e9", "cafe-s0007-"),
        ("x" * 500, "x" * 48 + "-s0007-"),
    ],
)
def test_names_are_plain_and_stable(prompt: str, starts: str) -> None:
    recipe = Recipe(prompt=prompt, seed=7)
    assert recipe.name == starts + recipe.hash[:8]


def test_parameters_line_is_what_viewers_read() -> None:
    line = FULL.parameters((64, 32), {"genkit": "1.0"})
    prompt, more, negative, settings = line.split("\n")
    assert f"{prompt}\n{more}" == FULL.prompt
    assert negative == "Negative prompt: blur"
    assert settings.startswith(
        f"Steps: 7, Sampler: euler-a, CFG scale: 2, Seed: {2**62}, Size: 64x32, Model: digits, Eta: 0.5, Guidance: "
    )
    assert settings.endswith("Version: genkit 1.0")


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "names", lambda: ["digits", "digits-classifier"])


@pytest.mark.usefixtures("embedded")
class TestTrust:
    def test_embedded_models_and_known_guidance_are_fine(self) -> None:
        Recipe(guidance=("classifier:label=seven,scale=2,model=digits-classifier",)).require_trusted()

    @pytest.mark.parametrize("model", ["/tmp/evil", "evil/model", "digits/../x"])
    def test_other_models_must_be_named(self, model: str) -> None:
        with pytest.raises(ValueError, match="is not embedded"):
            Recipe(model=model).require_trusted()
        Recipe(model=model).require_trusted(models=[model])

    @pytest.mark.parametrize(
        ("spec", "says"),
        [
            ("os:system", "does not know"),
            ("my_module:build", "does not know"),
            ("classifier:label=1,model=/tmp/evil", "would load"),
            ("classifier:label=1,model=evil", "would load"),
            ("classifier:label=1,model=timm:resnet18", "would load"),
            ("classifier:label=../x", "would load"),
        ],
    )
    def test_code_and_files_in_guidance_must_be_repeated(self, spec: str, says: str) -> None:
        recipe = Recipe(guidance=(spec,))
        with pytest.raises(ValueError, match=says):
            recipe.require_trusted()
        recipe.require_trusted(guidance=[spec])


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("1,2,5-7", [1, 2, 5, 6, 7]), ("7", [7]), (" 3 , 1 - 2 ", [3, 1, 2]), ("1,1,0-2", [1, 0, 2])],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2", "0-99999999", "1.5", "\u0661"])
def test_bad_seeds_name_the_value(text: str) -> None:
    with pytest.raises(ValueError, match="Seeds"):
        parse_seeds(text)


def test_sizes() -> None:
    assert parse_size("64x48") == (64, 48)
    assert parse_size("64") == (64, 64)
    for text in ("", "64x", "x64", "64*64", "-1x2", "6.4x2"):
        with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
            parse_size(text)


class TestPlan:
    def test_rows_are_subjects_and_points_columns_are_seeds(self) -> None:
        subjects = [Recipe(prompt="a"), Recipe(prompt="b")]
        table = plan(subjects, [4, 9], [Axis.parse("cfg=1,2"), Axis.parse("sampler=ddim,euler")])
        assert table.columns == ("seed 4", "seed 9")
        assert table.rows[:3] == ("a, cfg=1, sampler=ddim", "a, cfg=1, sampler=euler", "a, cfg=2, sampler=ddim")
        assert len(table.recipes) == len(table.rows) * 2 == 16
        fifth = table.recipes[2 * 2 + 1]
        assert (fifth.prompt, fifth.cfg, fifth.sampler, fifth.seed) == ("a", 2.0, "ddim", 9)

    def test_with_one_seed_the_last_axis_takes_the_columns(self) -> None:
        table = plan([Recipe(prompt="a")], [0], [Axis.parse("cfg=1,2"), Axis.parse("steps=5,6,7")])
        assert table.rows == ("cfg=1", "cfg=2")
        assert table.columns == ("steps=5", "steps=6", "steps=7")
        assert table.title == "a"
        assert [recipe.steps for recipe in table.recipes] == [5, 6, 7, 5, 6, 7]

    def test_a_long_row_is_folded(self) -> None:
        table = plan([Recipe(prompt="a")], range(10))
        assert table.rows == ("seed 0 to seed 3", "seed 4 to seed 7", "seed 8 to seed 9")
        assert table.columns == ("",) * 4
        assert [recipe.seed for recipe in table.recipes] == list(range(10))

    def test_guidance_parameters_are_replaced_or_added(self) -> None:
        base = Recipe(prompt="", guidance=("other:x=1", "classifier:label=seven,scale=1"))
        specs = [recipe.guidance[1] for recipe in plan([base], [0], [Axis.parse("classifier.scale=0,2")]).recipes]
        assert specs == ["classifier:label=seven,scale=0", "classifier:label=seven,scale=2"]
        bare = Recipe(prompt="", guidance=("classifier",))
        assert plan([bare], [0], [Axis.parse("classifier.label=one")]).recipes[0].guidance == ("classifier:label=one",)

    def test_negative_prompts_may_be_empty(self) -> None:
        assert [r.negative for r in plan([Recipe()], [0], [Axis.parse("negative=,bad")]).recipes] == ["", "bad"]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("cfg", "key=a,b,c"),
            ("=1", "key=a,b,c"),
            ("cgf=1", "Did you mean 'cfg'"),
            ("cfg=1,,2", "empty value"),
            ("cfg=", "empty value"),
            ("cfg=x", "'x' is not a number"),
            ("steps=1.5", "'1.5' is not a number"),
            ("steps=0", "steps must be"),
            ("sampler=nope", "Unknown sampler 'nope'"),
            ("classifier.scale=1", "needs exactly one guidance 'classifier', but there is none"),
        ],
    )
    def test_bad_sweeps(self, text: str, says: str) -> None:
        with pytest.raises(ValueError, match=r"(?s).*") as caught:
            plan([Recipe(prompt="")], [0], [Axis.parse(text)])
        assert says in str(caught.value)

    def test_two_of_a_guidance_are_ambiguous(self) -> None:
        with pytest.raises(ValueError, match="there are 2"):
            plan([Recipe(guidance=("classifier:label=1", "classifier:label=2"))], [0], [Axis.parse("classifier.scale=1")])

    def test_limits(self) -> None:
        with pytest.raises(ValueError, match="swept twice"):
            plan([Recipe()], [0], [Axis.parse("cfg=1"), Axis.parse("cfg=2")])
        with pytest.raises(ValueError, match="more than 1,000,000"):
            plan([Recipe()] * 2, range(sweep.MAX_IMAGES))
        with pytest.raises(ValueError, match="nothing to do"):
            plan([], [0])


class TestSamplers:
    # The two KDPM2 samplers take seconds to construct; the sampling test of the command line has them.
    @pytest.mark.parametrize("name", [name for name in samplers.SAMPLERS if "kdpm2" not in name])
    def test_each_keeps_the_models_schedule(self, name: str) -> None:
        from diffusers import PNDMScheduler

        own = PNDMScheduler(beta_start=0.001, beta_end=0.013, beta_schedule="scaled_linear", prediction_type="v_prediction")
        built = samplers.build(name, own)
        assert built.config.beta_end == 0.013
        assert built.config.prediction_type == "v_prediction"
        assert not built.config.get("clip_sample", False)

    def test_a_model_that_clips_goes_on_clipping(self) -> None:
        from diffusers import DDPMScheduler

        assert samplers.build("ddim", DDPMScheduler(clip_sample=True)).config.clip_sample

    @pytest.mark.parametrize("name", samplers.FLOW_SAMPLERS)
    def test_flow_models_take_flow_samplers(self, name: str) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        built = samplers.build(name, FlowMatchEulerDiscreteScheduler(shift=3.0))
        assert type(built).__name__ == samplers.FLOW_SAMPLERS[name]
        assert built.config.shift == 3.0

    def test_misfits_are_refused(self) -> None:
        from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

        with pytest.raises(ValueError, match=r"flow-matching model. Use one of: euler"):
            samplers.build("ddim", FlowMatchEulerDiscreteScheduler())
        with pytest.raises(ValueError, match="EDM model"):
            samplers.build("ddim", EDMEulerScheduler())


def test_versions_name_what_an_image_depends_on() -> None:
    assert json.loads(Recipe().to_json(versions()))["versions"].keys() == {"python", "genkit", "torch", "diffusers", "transformers"}
