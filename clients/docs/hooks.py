"""What mkdocs does here beside turning Markdown into HTML: pages made of the code, and links into the repository."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from clients.docs.http_reference import http_reference
from clients.docs.reference import commands, errors, metrics, settings

ROOT = Path(__file__).parents[2]
_RESULTS = ROOT / "training/benchmark/results"
_TITLES = {
    "real": "Report: real tasks",
    "world": "Report: generated world",
    "world-beta": "Report: weight of KL",
    "world-layers": "Report: layers",
    "world-steps": "Report: steps",
    "world-longer": "Report: more learning from tasks",
    "world-more-tasks": "Report: more tasks to learn from",
    "world-longest": "Report: most learning from tasks",
    "world-longer-steps": "Report: more learning, and more steps",
    "real-longer-steps": "Report: more learning, and more steps, on real tasks",
    "real-own-temperatures": "Report: a temperature for each real task",
    "texts": "Report: texts of real tasks",
    "texts-world": "Report: texts of the generated world",
}
# Files of the repository that are pages or pictures of the site.
_PLACES = {
    ROOT / "server/deploy/README.md": "monitoring.md",
    **{_RESULTS / name / "report.md": f"reports/{name}.md" for name in _TITLES},
    **{path: f"pictures/{path.parent.name}/{path.name}" for path in sorted(_RESULTS.glob("*/*.svg"))},
}
_MADE: dict[str, Callable[[], str]] = {
    "http": http_reference,
    "commands": commands,
    "settings": settings,
    "errors": errors,
    "metrics": metrics,
}
_MARK = re.compile(r"^<!-- made: (\w+) -->$", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
# What no link is in.
_FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds files of the repository, where they lie or as pages."""
    for path, place in _PLACES.items():
        if place.startswith("reports/"):
            files.append(File.generated(config, place, content=_report(path)))
        else:
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts in what is made of the code, and turns links into the repository to the site's pages.

    A link to a file that is no page becomes plain text: a site does not know where its repository is.
    """
    here = next((path for path, place in _PLACES.items() if place == page.file.src_uri), None)
    folder = (here or Path(str(page.file.abs_src_path))).parent
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda found: _link(found, folder, page.file.src_uri), part) for part in parts[::2]]
    return _MARK.sub(lambda found: _MADE[found[1]](), "".join(parts))


def _link(found: re.Match[str], folder: Path, source: str) -> str:
    picture, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    path = (folder / target).resolve()
    if "://" in target or not path.exists() or path.is_relative_to(Path(__file__).parent):
        return found[0]  # what is not there mkdocs complains of
    place = _PLACES.get(path)
    if place is None:
        return text
    return f"{picture}[{text}]({relpath(place, str(Path(source).parent))}{anchor})"


def _report(path: Path) -> str:
    """A benchmark's report with its pictures."""
    name = path.parent.name
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# ")]
    pictures = [f"![{file.stem}](../{_PLACES[file]})" for file in sorted(path.parent.glob("*.svg"))]
    text = "\n".join(lines).strip()
    return "\n\n".join(["---\nhide: [toc]\n---", f"# {_TITLES[name]}", text, "## Pictures", *pictures])
