"""The table of measured figures: it is whole, what is recorded lies within its intervals and is what the documents show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.metrics.estimate import bootstrap_mean
from genkit.suite import TABLE, Suite, find_checkout

ROOT = Path(__file__).parents[2]


def suite(*arguments: object, code: int = 0):
    """Run `genkit eval suite` in this process; every test says which exit code it expects."""
    result = CliRunner().invoke(app, ["eval", "suite", *(str(argument) for argument in arguments)], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


def rows(result) -> list[dict]:
    return json.loads(result.stdout)["rows"]


class TestOurs:
    def test_what_is_recorded_is_right_and_shown(self) -> None:
        found = rows(suite("--recorded", "--json"))
        assert len(found) > 100
        assert all(row["ok"] for row in found)
        assert all(set(row) == {"name", "value", "low", "high", "ok"} for row in found)

    def test_every_figure_of_the_readme_is_in_the_table(self) -> None:
        """Of the table of figures: a number is that of a figure which is shown in the row."""
        table, readme = Suite.load(ROOT), (ROOT / "README.md").read_text(encoding="utf-8")
        lines = readme.split("| what | against | genkit | command |\n|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
        assert len(lines) >= 10
        for line in lines:
            numbers = set(re.findall(r"\d[\d,.]*\d|\d", "|".join(line.split("|")[2:4])))
            for figure in table.figures:
                value = table.recorded(figure)
                for text, pattern in zip(figure.texts(value), figure.patterns, strict=True):
                    if text in line:
                        numbers.discard(re.findall(r"\{[^}]*\}", pattern)[0].format(value * figure.scale))
            assert not numbers, line

    def test_values_and_intervals_are_those_that_the_table_explains(self) -> None:
        table = Suite.load(ROOT)
        for figure in table.figures:
            value = table.recorded(figure)
            assert figure.value == pytest.approx(value, rel=1e-3, abs=1e-6), figure.name
            kind, count = [*figure.interval.split(), "0"][:2]
            if kind == "wilson":
                known = binomtest(round(value * int(count)), int(count)).proportion_ci(method="wilson")
                assert (figure.low, figure.high) == pytest.approx((known.low, known.high), abs=1e-5), figure.name
            elif kind == "objects":
                document = json.loads((ROOT / table.commands[figure.command].recorded).read_text())
                each = torch.tensor([row[figure.path[-1]] for row in document["rows"]], dtype=torch.float64)
                assert len(each) == int(count)
                assert (figure.low, figure.high) == pytest.approx((bootstrap_mean(each).low, bootstrap_mean(each).high), abs=1e-5)

    def test_every_command_is_there_and_has_a_figure(self) -> None:
        table = Suite.load(ROOT)
        assert {figure.command for figure in table.figures} == set(table.commands)
        assert {figure.interval.split()[0] for figure in table.figures} == set(table.intervals)
        for command in table.commands.values():
            script = command.run.split()[1]
            assert script == "-m" or (ROOT / script).is_file()
            assert (command.folder is None) == (command.needs is None)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project with two commands, one that prints its JSON and one that writes it, a third that needs a folder, and a README."""
    measure = "import json, pathlib, sys; {}"
    document = {"rows": [{"share": 0.5}, {"share": 0.8}]}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "out.json").write_text(json.dumps(document))
    (tmp_path / "printed.py").write_text(measure.format("print(pathlib.Path('out.json').read_text())"))
    (tmp_path / "written.py").write_text(
        measure.format("pathlib.Path(sys.argv[1]).write_text(json.dumps({'deep': json.load(open('out.json'))}))")
    )
    (tmp_path / "README.md").write_text("It reads\n50.0 % right, guided 1.6 times as\nmany.")
    share = {"command": "printed", "path": ["rows", 0, "share"], "value": 0.5, "low": 0.4, "high": 0.6, "interval": "wide"}
    figures = [
        {"name": "plain", **share, "shown": "reads {:.1f} %", "scale": 100},
        {**share, "name": "ratio", "command": "written", "path": ["rows", 1, "share"], "over": ["rows", 0, "share"], "value": 1.6,
         "low": 1.5, "high": 1.7, "shown": "guided {:.1f} times as many", "baseline": "plain"},
        {**share, "name": "mean", "path": [["rows", 0, "share"], ["rows", 1, "share"]], "low": 0.6, "high": 0.7, "shown": "It"},
        {**share, "name": "far", "command": "needing", "shown": "It"},
    ]  # fmt: skip
    content = {
        "intervals": {"wide": "for tests"},
        "commands": {
            "printed": {"run": "python printed.py", "recorded": "out.json"},
            "written": {"run": "python written.py {out}", "recorded": "out.json", "at": ["deep"]},
            "needing": {"run": "python printed.py {place}", "recorded": "out.json", "needs": "a place"},
        },
        "figures": figures,
    }
    (tmp_path / TABLE).write_text(json.dumps(content))
    return tmp_path


def change(checkout: Path, **figure: object) -> None:
    """Change the table's first figure."""
    content = json.loads((checkout / TABLE).read_text())
    content["figures"][0] |= figure
    (checkout / TABLE).write_text(json.dumps(content))


class TestAny:
    def test_commands_run_and_values_are_found(self, checkout: Path) -> None:
        line = ("--checkout", checkout, "--only", "plain", "--only", "ratio", "--only", "mean")
        found = rows(suite(*line, "--json"))
        assert {row["name"]: row["value"] for row in found} == pytest.approx({"plain": 0.5, "ratio": 1.6, "mean": 0.65})
        text = suite(*line).stdout
        assert "baseline" in text
        assert "outside" not in text

    def test_a_value_outside_is_exit_code_1(self, checkout: Path) -> None:
        (checkout / "out.json").write_text(json.dumps({"rows": [{"share": 0.61}, {"share": 0.8}]}))
        result = suite("--checkout", checkout, "--only", "plain", "--json", code=1)
        assert rows(result) == [{"name": "plain", "value": 0.61, "low": 0.4, "high": 0.6, "ok": False}]
        assert "outside" in suite("--checkout", checkout, "--only", "plain", code=1).stdout

    def test_what_cannot_run_is_said_and_the_rest_done(self, checkout: Path, tmp_path: Path) -> None:
        result = suite("--checkout", checkout, "--json", code=3)
        assert [row["name"] for row in rows(result)] == ["plain", "ratio", "mean"]
        assert "needing needs a place. Give it: --folder place=DIR." in result.stderr
        assert len(rows(suite("--checkout", checkout, "--folder", f"place={tmp_path}", "--json"))) == 4
        assert "is not NAME=DIR" in suite("--checkout", checkout, "--folder", "place=nowhere", code=2).stderr
        (checkout / "printed.py").write_text("raise SystemExit('no disk')")
        result = suite("--checkout", checkout, "--only", "plain", "--json", code=3)
        assert "'python printed.py' failed with exit code 1: no disk" in result.stderr
        assert rows(result) == []

    def test_an_interrupted_suite_goes_on(self, checkout: Path, tmp_path: Path) -> None:
        line = ("--checkout", checkout, "--only", "plain", "--only", "ratio", "--out", tmp_path / "measured")
        suite(*line)
        (checkout / "printed.py").unlink()
        (tmp_path / "measured" / "written.done").unlink()
        result = suite(*line, "--resume")
        assert "printed: kept" in result.stderr
        assert "written: python written.py" in result.stderr
        assert "--resume needs the folder" in suite("--resume", code=2).stderr

    def test_recorded_checks_documents(self, checkout: Path) -> None:
        suite("--checkout", checkout, "--recorded")
        (checkout / "README.md").write_text("It reads 51.0 % right, guided 1.6 times as many.")
        result = suite("--checkout", checkout, "--recorded", code=1)
        assert "plain: neither the README nor a page has 'reads 50.0 %'" in result.stderr
        change(checkout, shown=["reads {:.0f}", "has {:.1f} %"])  # in two places, of which the second lacks it
        (checkout / "README.md").write_text("It reads 50, guided 1.6 times as many.")
        result = suite("--checkout", checkout, "--recorded", code=1)
        assert "plain: neither the README nor a page has 'has 50.0 %'" in result.stderr
        assert "reads 50" not in result.stderr

    def test_a_plan_is_only_a_plan(self, checkout: Path) -> None:
        assert "python printed.py {place}" in suite("--checkout", checkout, "--dry-run").stdout

    @pytest.mark.parametrize(
        ("figure", "says"),
        [
            ({"path": ["rows", 7]}, "has nothing at rows / 7"),
            ({"path": ["rows"]}, "has no number at rows"),
            ({"command": "none"}, "what it refers to is not there"),
            ({"baseline": "none"}, "what it refers to is not there"),
            ({"name": "ratio"}, "is there twice"),
            ({"surplus": 1}, "is damaged"),
        ],
    )
    def test_a_damaged_table(self, checkout: Path, figure: dict, says: str) -> None:
        change(checkout, **figure)
        assert says in suite("--checkout", checkout, "--recorded", code=2).stderr

    def test_bad_names_and_places(self, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "Unknown figure 'nothing'" in suite("--checkout", checkout, "--only", "nothing", code=2).stderr
        assert "There is no benchmarks" in suite("--checkout", tmp_path / "nowhere", code=2).stderr
        monkeypatch.chdir(checkout / "benchmarks")
        assert find_checkout() == checkout
        assert "benchmarks/suite.json" in suite("--help").stdout
