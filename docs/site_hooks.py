"""Hooks of the documentation site: sources laid as they are installed, MathML, and links to files outside of docs/."""

from __future__ import annotations

import html
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[1]
INSIDE = ("guidance", "pipelines", "distill")  # folders of the repository that are installed inside genkit

_MATH = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+((?!\.\./)[^)#]+)(#[^)]*)?\)")
_FETCHED = re.compile(r"""(?:\bsrc=|<link\b(?![^>]*canonical)[^>]*href=)["']?https?://[^"' >]*""")
_FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: Any) -> Any:
    """Lay the sources as they are installed, since three folders of the top belong inside the package, where griffe looks."""
    sources = Path(tempfile.mkdtemp(prefix="genkit-docs-"))
    copy = {"ignore": shutil.ignore_patterns("models", "__pycache__")}
    shutil.copytree(ROOT / "genkit", sources / "genkit", **copy)
    for folder in INSIDE:
        shutil.copytree(ROOT / folder, sources / "genkit" / folder, **copy)
    python = config.plugins["mkdocstrings"].config.handlers.setdefault("python", {})
    python["paths"] = [str(sources)]
    config.extra["sources"] = sources
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Files outside of docs/ are not part of the site: their links become links into the repository, or their paths."""
    depth = page.file.src_uri.count("/") + 1

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        if match[0].count("../") < depth:
            return match[0]
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor or ''})"
        return f"{text} (`{path}`)" if text.strip("`") != path else f"`{path}`"

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _OUTSIDE.sub(link, part) for part in parts)


def on_page_content(content: str, **kwargs: Any) -> str:
    """TeX that arithmatex marked, as MathML, which browsers draw by themselves."""

    def mathml(match: re.Match[str]) -> str:
        display = match[1] == "div"
        tex = html.unescape(match[3] if display else match[2])
        found = convert(tex, display="block" if display else "inline")
        if "\\" in found:  # a command that it does not know is left as it is
            raise PluginError(f"TeX that latex2mathml does not know, in {kwargs['page'].file.src_uri}: {tex}")
        return found

    return _MATH.sub(mathml, content)


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Remove the copy of the sources, and check that no page fetches anything from elsewhere.

    Raises:
        PluginError: a page loads a script, a style or a picture from another host.
    """
    shutil.rmtree(config.extra["sources"], ignore_errors=True)
    for page in Path(config.site_dir).rglob("*.html"):
        if found := _FETCHED.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page} fetches {found[0]}. Pages must work without a network.")
