"""Guidance specs of the command line."""

from __future__ import annotations

import sys

import pytest
import torch

from genkit import zoo
from genkit.guidance import Guidance, State, registry
from genkit.levels import Level
from genkit.prediction import Prediction
from genkit.recipe import Recipe
from genkit.sweep import Axis, plan


def test_split_reads_values():
    name, values = registry.split("classifier:label=seven,scale=2,tau2=0.5,beta=none,route=through_denoiser")
    assert name == "classifier"
    assert values == {"label": "seven", "scale": 2, "tau2": 0.5, "beta": None, "route": "through_denoiser"}
    assert registry.split("classifier") == ("classifier", {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clasifier:label=1", "Did you mean 'classifier'"),
        ("classifier:scal=2", "Did you mean 'scale'"),
        ("classifier:label", "'label' is not key=value"),
        ("classifier:label=", "is not key=value"),
    ],
)
def test_split_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.split(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("classifier", "needs label="),
        ("classifier:label=1,preset=adm", "preset 'adm'"),
        ("classifier:label=1,scale=big", "scale='big' is not a number"),
        ("classifier:label=1,model=nothing-like-this", "nothing-like-this"),
        ("classifier:label=1,start=0.9,stop=0.1", "between"),
    ],
)
def test_parse_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.parse(spec)


def test_every_entry_describes_itself():
    for name in registry.names():
        entry = registry.describe(name)
        assert entry.summary
        assert all(entry.parameters.values())


# The grammar of values


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a=1,b=2", ["a=1", "b=2"]),
        ("", [""]),
        ("a=1,", ["a=1", ""]),
        ('text="a, b",scale=2', ['text="a, b"', "scale=2"]),
        (r'"say \"a, b\"", c', [r'"say \"a, b\""', "c"]),
    ],
)
def test_items(text, parts):
    assert registry.items(text) == parts


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("a red thing", "a red thing"),
        ('"a red, round thing"', "a red, round thing"),
        (r'"say \"seven\" \\ eight"', r'say "seven" \ eight'),
        ('"7"', "7"),
        ('" spaced "', " spaced "),
        ('"a=b: c"', "a=b: c"),
        ("7", 7),
    ],
)
def test_texts_may_be_quoted(value, read):
    assert registry.split(f"clip:text={value},scale=2")[1] == {"text": read, "scale": 2}


def test_a_quote_must_end():
    with pytest.raises(ValueError, match="quote that does not end"):
        registry.split('clip:text="a, b')


# General parameters


class Nothing(Guidance):
    name = "nothing"


@pytest.fixture
def nothing(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry.register_guidance("nothing", registry.Entry("does nothing", {}, lambda pipe: Nothing()))


@pytest.mark.usefixtures("nothing")
def test_every_guidance_has_the_general_parameters():
    level = Level(0.8, 0.6, 0)
    state = State(torch.zeros(1, 1), level, [level])
    assert isinstance(registry.parse("nothing"), Nothing)
    (term,) = registry.parse("nothing:scale=3,start=0,stop=0.5").terms(state)
    assert term.weight == 3
    assert not registry.parse("nothing:start=0.5").active(state)
    assert registry.parse("nothing:recurrence=4,stop=0.5").times == 4


@pytest.mark.usefixtures("nothing")
def test_a_sum_is_repeated_as_a_whole():
    assert registry.parse_all([]) is None
    assert registry.parse_all(["nothing", "nothing:scale=2"]).name == "nothing + nothing"
    repeated = registry.parse_all(["nothing:recurrence=3", "nothing", "nothing:recurrence=3"])
    assert (repeated.times, len(repeated.leaves())) == (3, 3)
    with pytest.raises(ValueError, match="recurrence is 2 and 3"):
        registry.parse_all(["nothing:recurrence=3", "nothing:recurrence=2"])


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("recurrence=0", "whole number of at least 1"),
        ("recurrence=1.5", "whole number of at least 1"),
        ("recurrence=often", "'often' is not a number"),
        ("start=soon", "'soon' is not a number"),
        ("scale=true", "is not a number"),
        ("route=direct", "Unknown nothing parameter 'route'"),
    ],
)
def test_bad_general_parameters(parameters, says):
    with pytest.raises(ValueError, match=says):
        registry.parse(f"nothing:{parameters}")


@pytest.mark.usefixtures("nothing")
def test_names_are_given_once():
    entry = registry.describe("nothing")
    with pytest.raises(ValueError, match="already"):
        registry.register_guidance("classifier", entry)
    for name in ("", "My Guidance", "a:b", "a.py"):
        with pytest.raises(ValueError, match="no name"):
            registry.register_guidance(name, entry)


# Functions


SOURCE = """
import torch
from genkit.guidance import EnergyGuidance

def redness(images):
    return images[:, 0].flatten(1).mean(1)

def by_level(images, level):
    return images.flatten(1).sum(1) * level.sigma

def broken(images):
    return images.shape[7]

def scalar(images):
    return images.sum()

def constant(images):
    return torch.zeros(len(images))

def endless(images):
    return images.flatten(1).sum(1) / 0

ready = EnergyGuidance(redness, 5.0, name="ready")
number = 3

class Thing:
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current folder, and the same as a file elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_guides.py").write_text(SOURCE)
    (tmp_path / "else where").mkdir()
    (tmp_path / "else where" / "guides-2.py").write_text("from helper_of_guides import value\n" + SOURCE)
    (tmp_path / "else where" / "helper_of_guides.py").write_text("value = 1\n")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in name or name in ("my_guides", "helper_of_guides") or name.startswith("failing"):
            del sys.modules[name]


def evaluate(guidance):
    level = Level(0.8, 0.6, 500, 3)
    state = State(torch.rand(2, 3, 4, 4), level, [Level(0.8, 0.6, 500, i) for i in range(5)])
    return guidance(state, lambda *, grad=False: Prediction(state.x, level, state.x, "x0")), state


@pytest.mark.parametrize("source", ["my_guides", "my_guides.py", "else where/guides-2.py"])
def test_a_function_is_a_guidance(module, source):
    guidance = registry.parse(f"{source}:redness:scale=2,space=image,route=x0_detached")
    assert (guidance.scale, guidance.route, guidance.name) == (2, "x0_detached", "redness")
    _, state = evaluate(guidance)
    torch.testing.assert_close(state.log["redness"], state.x[:, 0].flatten(1).mean(1))
    assert registry.split(f"{source}:redness") == (f"{source}:redness", {})
    registry.check(f"{source}:redness")
    assert registry.parse(f"{source}:by_level:start=0.5,recurrence=2").times == 2


def test_an_absolute_path_and_a_ready_guidance(module):
    ready = registry.parse(f"{module / 'my_guides.py'}:ready")
    assert ready.scale == 5
    twice = registry.parse("my_guides.py:ready:scale=2")
    assert twice.guidance is ready  # a file is imported once
    with pytest.raises(ValueError, match="has its own route"):
        registry.parse("my_guides:ready:route=direct")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("my_gides:redness", "no module 'my_gides'.*path/to/my_gides.py"),
        ("my_guides.inner:redness", "my_guides"),
        ("missing.py:redness", "no file 'missing.py'"),
        ("my_guides:rednes", "Unknown function of 'my_guides', 'rednes'. Did you mean 'redness'"),
        ("my_guides:number", "of type int, not a function"),
        ("my_guides:Thing", "is a class, not a function"),
        ("my_guides:redness:scal=2", "Did you mean 'scale'"),
        ("my_guides", "Unknown guidance 'my_guides'.*MODULE:FUNCTION"),
        ("failing_import:f", r"Importing 'failing_import' failed \(ModuleNotFoundError: No module named 'not_there'\)"),
        ("failing_import.py:f", "Importing 'failing_import.py' failed"),
        ("failing_value:f", r"Importing 'failing_value' failed \(ValueError: no\)"),
        ("failing_exit:f", r"Importing 'failing_exit' failed \(SystemExit: 3\)"),
        ("failing_syntax:f", r"Importing 'failing_syntax' failed \(SyntaxError"),
    ],
)
def test_functions_that_cannot_be_had(module, spec, says):
    for name, text in {
        "import": "import not_there",
        "value": "raise ValueError('no')",
        "exit": "raise SystemExit(3)",
        "syntax": "(",
    }.items():
        (module / f"failing_{name}.py").write_text(text)
    with pytest.raises(ValueError, match=says):
        registry.check(spec)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("broken", ValueError, r"Guidance 'broken' failed at evaluation 4 of 5 \(timestep 500\) \(IndexError"),
        ("scalar", ValueError, r"Guidance 'scalar' must return .* shape \(2,\); got \(\) at evaluation 4 of 5"),
        ("constant", ValueError, "Guidance 'constant' returned at evaluation 4 of 5 .*differentiable"),
        ("endless", FloatingPointError, "Guidance 'endless' gave NaN or infinity at evaluation 4 of 5"),
    ],
)
def test_functions_that_fail(module, name, error, says):
    with pytest.raises(error, match=says):
        evaluate(registry.parse(f"my_guides:{name}"))


@pytest.mark.parametrize("spec", ["my_guides:redness", "my_guides.py:redness:scale=2", "else where/guides-2.py:redness"])
def test_a_recipe_from_elsewhere_runs_no_function(module, spec):
    (module / "my_guides.py").write_text("raise SystemExit('it ran')")
    recipe = Recipe(prompt="", guidance=(spec,))
    with pytest.raises(ValueError, match="does not know by that name"):
        recipe.require_trusted()
    recipe.require_trusted(guidance=[spec])
    assert "my_guides" not in sys.modules


@pytest.mark.skipif("digits-classifier" not in zoo.names(), reason="the embedded models are not in this checkout")
def test_what_a_recipe_from_elsewhere_may_load():
    trusted = ("classifier:label=seven", "classifier:label=1,model=digits-classifier,recurrence=2,start=0.1")
    Recipe(prompt="", guidance=trusted, model="digits").require_trusted()
    for spec in ("clip:text=a seven", "clip:text=a,model=folder", "classifier:label=1,model=folder", 'clip:text=a,model="/x"'):
        with pytest.raises(ValueError, match="is not embedded"):
            Recipe(prompt="", guidance=(spec,), model="digits").require_trusted()


# Sweeps


def swept(guidance, *axes):
    table = plan([Recipe(prompt="", guidance=guidance)], [0], [Axis.parse(axis) for axis in axes])
    return [recipe.guidance for recipe in table.recipes]


def test_sweeps_of_functions_windows_and_texts():
    assert swept(("my_guides:redness:scale=1",), "redness.scale=0,2") == [
        ("my_guides:redness:scale=0",),
        ("my_guides:redness:scale=2",),
    ]
    assert swept(("else where/g.py:f",), "f.stop=0.5") == [("else where/g.py:f:stop=0.5",)]
    assert swept(("classifier:label=1",), "classifier.start=0,0.5") == [
        ("classifier:label=1,start=0",), ("classifier:label=1,start=0.5",)
    ]  # fmt: skip
    assert swept(('clip:text="a, b",scale=1',), "clip.scale=2") == [('clip:text="a, b",scale=2',)]
    assert swept(("clip:text=a",), 'clip.text="b, c",d') == [('clip:text="b, c"',), ("clip:text=d",)]


def test_sweeps_of_one_of_several():
    two = ("classifier:label=1", "other:x=1", "classifier:label=2")
    assert swept(two, "classifier#2.scale=3")[0] == ("classifier:label=1", "other:x=1", "classifier:label=2,scale=3")
    assert swept(two, "classifier#1.scale=3", "classifier#2.scale=4")[0] == (
        "classifier:label=1,scale=3", "other:x=1", "classifier:label=2,scale=4"
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"there are 2 guidances 'classifier'. Say which: classifier#2.scale"):
        swept(two, "classifier.scale=1")
    for number in ("0", "3", "x", "-1", "\u00b2"):
        with pytest.raises(ValueError, match="of 'classifier' there are 2"):
            swept(two, f"classifier#{number}.scale=1")
    with pytest.raises(ValueError, match="quote that does not end"):
        swept(two, 'classifier#2.label="a')


def test_sweeps_of_negative_prompts_with_commas():
    table = plan([Recipe(prompt="")], [0], [Axis.parse('negative="bad, worse",ugly')])
    assert [recipe.negative for recipe in table.recipes] == ["bad, worse", "ugly"]
