"""The lower bounds of pyproject.toml as constraints for pip, on stdout; with --check, that just these are installed."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import metadata, version
from pathlib import Path

EXTRAS = ("test",)
PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def bounds() -> dict[str, str]:
    """The lower bound of each package that genkit and its tests need."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra])]
    return {m[1]: m[2] for line in lines if ";" not in line and (m := re.match(r"([\w-]+)>=([\d.]+)", line))}


def check() -> list[str]:
    """What is wrong: another version is installed, or one that does not run on the lowest Python that the project claims."""
    from packaging.specifiers import SpecifierSet  # not there before the packages are

    wrong = []
    python = PROJECT["requires-python"].removeprefix(">=")
    for name, bound in bounds().items():
        if not (version(name) + ".").replace("+", ".").startswith(bound + "."):
            wrong.append(f"{name} {version(name)} is installed, the lower bound is {bound}")
        needs = metadata(name)["Requires-Python"]
        if needs and not SpecifierSet(needs).contains(python):
            wrong.append(f"{name} {version(name)} needs Python {needs}, the project claims {python}")
    return wrong


def main() -> None:
    """Print the constraints, or check what is installed."""
    if "--check" not in sys.argv:
        print("\n".join(f"{name}=={bound}" for name, bound in bounds().items()))
    elif wrong := check():
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
