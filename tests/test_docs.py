"""The documents: tutorials run, links lead somewhere, commands parse, and the reference names every public package."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer.main

from genkit.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`(genkit(?: [^`]*)?)`")
_STARTS = re.compile(r"(?:^|\s|/|-m )genkit (?=[a-z-])")


def of(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


@of(TUTORIALS)
def test_tutorials_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python of a page, one block after the other, as a reader would type it."""
    from genkit.denoisers import registry

    module = ModuleType(f"tutorial_{page.stem.replace('-', '_')}")  # diffusers looks the modules of its classes up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert len(found) >= 4
    for number, block in enumerate(found, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), module.__dict__)


@of(PAGES)
def test_examples_are_python_and_import_what_exists(page: Path) -> None:
    """Of the blocks that are not run, since they need your model or your pictures."""
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "genkit":
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    there = hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
                    assert there, f"{node.module} has no {name.name}"


@of(PAGES)
def test_relative_links_resolve(page: Path) -> None:
    for target in _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}: no such heading"


@of(PAGES)
def test_commands_parse(page: Path) -> None:
    """Every command in a shell block, by the parser of the command line itself; of those within a text, the options they name."""
    for line in command_lines(page):
        parse(arguments(line))
    for inline in _INLINE.findall(_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        words = [word for word in inline.split()[1:] if word not in ("...", "|")]
        command, rest = resolve(words)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, inline


def command_lines(page: Path) -> Iterator[str]:
    for language in ("sh", ""):
        for body in blocks(page, language):
            for line in body.replace("\\\n", " ").splitlines():
                line = line.lstrip("$ ")
                if match := _STARTS.search(line):
                    yield line[match.end() :]


def arguments(line: str) -> list[str]:
    """The words of a command, up to where the shell goes on."""
    words = shlex.split(line, comments=True)
    end = next((i for i, word in enumerate(words) if word in ("&&", "||", "|", ";", ">")), len(words))
    return words[:end]


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words name, and what is left of them.

    Raises:
        AssertionError: there is no such command.
    """
    command: click.Command = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        context = command.make_context("genkit", list(rest), resilient_parsing=True)
        held = vars(context).get("_protected_args") or vars(context).get("protected_args", [])  # click 8.2; before
        try:  # as the group itself does: one of them reads what is no subcommand as the arguments of another
            _, found, rest = command.resolve_command(context, [*held, *context.args])
        except Exception as error:
            raise AssertionError(f"there is no command genkit {shlex.join(words)}") from error
        command = found
    return command, rest


def parse(words: list[str]) -> None:
    """As the command line does, without running the command.

    Raises:
        AssertionError: the parser refuses the words.
    """
    command, rest = resolve(words)
    if not rest and hasattr(command, "commands"):
        return
    try:
        command.make_context("genkit", rest)
    except Exception as error:
        if type(error).__name__ != "Exit":  # --help, --version
            raise AssertionError(f"genkit {shlex.join(words)}: {error!r}") from error


def test_wrong_commands_would_be_noticed() -> None:
    for words in (["sample", "a", "--no-such-option", "1"], ["nonsense"], ["sample", "a", "--steps", "many"], ["export", "--out"]):
        with pytest.raises(AssertionError):
            parse(words)


def test_the_reference_has_every_public_package() -> None:
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    packages = [p for folder in ("genkit", "guidance", "pipelines", "distill") for p in (ROOT / folder).rglob("__init__.py")]
    public = set()
    for file in packages:
        if any(isinstance(n, ast.Call) and ast.unparse(n.func) == "lazy_exports" for n in ast.walk(ast.parse(file.read_text()))):
            parts = file.parent.relative_to(ROOT).parts
            public.add(".".join(parts if parts[0] == "genkit" else ("genkit", *parts)))
    assert public - {"genkit.attention.kernels", "genkit.guidance.training"} <= listed


def test_what_the_threat_page_says_is_held_by_tests_that_exist() -> None:
    text = (ROOT / "docs" / "threats.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", text)
    assert len(named) >= 20
    for file, path in named:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for name in path.split("::"):
            found = next((n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name), None)
            assert found is not None, f"{file} has no {path}"
            body = found.body


def test_no_code_of_others_is_trusted() -> None:
    files = [p for folder in ("genkit", "guidance", "pipelines", "distill") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    assert not [file for file in files if "trust_remote_code" in file.read_text(encoding="utf-8")]
