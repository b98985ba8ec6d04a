"""The package's layout: names that diffusers would trip over, component modules, public names, the README's commands."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import diffusers
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("genkit", "guidance", "pipelines")
FILES = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]


def test_no_folder_is_called_like_a_pipeline_folder_of_diffusers():
    """diffusers takes the second-to-last part of a component's module path for one of its own folders of that name."""
    folders = {p.name for p in (Path(diffusers.__file__).parent / "pipelines").iterdir() if p.is_dir()}
    ours = {p.parent.name for p in FILES}
    assert len(folders) > 50
    assert not ours & folders


def test_modules_of_components_import_their_base_class_by_name():
    """diffusers finds a component's loading methods through the base class's name in the component's module."""
    checked = 0
    for file in FILES:
        tree = ast.parse(file.read_text())
        imported = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases} & {"ModelMixin", "SchedulerMixin"}
                assert bases <= imported, f"{file}: {node.name}"
                checked += len(bases)
    assert checked >= 1


@pytest.mark.parametrize(
    "name", ["genkit", "genkit.denoisers", "genkit.features", "genkit.guidance", "genkit.metrics", "genkit.pipelines"]
)
def test_every_public_name_exists_and_is_documented(name):
    package = importlib.import_module(name)
    assert package.__all__
    for public in package.__all__:
        assert getattr(package, public).__doc__, f"{name}.{public} has no docstring"
    with pytest.raises(AttributeError, match="nothing_like_this"):
        package.nothing_like_this  # noqa: B018


def test_every_folder_with_code_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    for file in FILES:
        parts = file.parent.relative_to(ROOT).parts
        name = ".".join(parts if parts[0] == "genkit" else ("genkit", *parts))
        assert f'"{name}"' in text, f"{name} is not among the packages of pyproject.toml"


def test_the_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    assert ".venv/bin/genkit sample" in blocks[0]
    assert ".venv/bin/pytest" in blocks[1]
    assert all(block.count("\n") == 1 for block in blocks[:2])
