"""Guidance specs of the command line."""

from __future__ import annotations

import pytest

from genkit.guidance import registry


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
