"""The lower bounds of pyproject.toml as constraints for pip, on stdout; with --check, that just these are installed."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib

EXTRAS = ("test",)


def bounds() -> dict[str, str]:
    """The lower bound of each package that genkit and its tests need."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"]) + [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return {m[1]: m[2] for line in lines if ";" not in line and (m := re.match(r"([\w-]+)>=([\d.]+)", line))}


def main() -> None:
    """Print the constraints, or check what is installed."""
    wrong = []
    for name, bound in bounds().items():
        if "--check" not in sys.argv:
            print(f"{name}=={bound}")
        elif not (version(name) + ".").replace("+", ".").startswith(bound + "."):
            wrong.append(f"{name} {version(name)} is installed, the lower bound is {bound}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
