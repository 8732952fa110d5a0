"""The documentation: it builds without a warning, leads nowhere that is not there, and does what it says."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import typer
from mkdocs.commands.build import build
from mkdocs.config import load_config

from clients.http import Client
from server.cli import create_cli
from server.settings import Settings
from tests.clients.conftest import Keyed

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "clients/docs"
TEXTS = [ROOT / "README.md", ROOT / "server/deploy/README.md", *sorted((DOCS / "pages").glob("*.md"))]
COMMANDS: Mapping[str, Any] = vars(typer.main.get_command(create_cli()))["commands"]
_BLOCK = re.compile(r"^```(\w+)(?: title=\"(\S+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_BARS = re.compile("[\u2580-\u259f]+")  # as wide as numbers say that stand beside them
# By which a page loads something, rather than leading to it.
_LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


@dataclass
class Html(HTMLParser):
    """What a page leads to, loads, and can be led to at."""

    path: Path
    ids: set[str] = field(default_factory=lambda: set[str]())
    links: list[str] = field(default_factory=lambda: list[str]())
    loaded: list[str] = field(default_factory=lambda: list[str]())

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in _LOADS and _LOADS[tag] in given:
            self.loaded.append(given[_LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Path, Html]:
    """Its pages by their paths; built in strict mode, in which a warning is an error."""
    folder = tmp_path_factory.mktemp("site").resolve()
    logging.getLogger("mkdocs").setLevel(logging.WARNING)  # above it strict mode counts nothing
    build(load_config(str(DOCS / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return {page: Html(page) for page in folder.rglob("*.html") if page.name != "404.html"}


def test_every_link_of_the_site_leads_somewhere(site: Mapping[Path, Html]) -> None:
    broken: list[str] = []
    for page, html in site.items():
        for link in html.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            known = site.get(target)
            if not target.is_file() or (parts.fragment and known and unquote(parts.fragment) not in known.ids):
                broken.append(f"{page.name}: {link}")
    pages = {page.stem: html for page, html in site.items()}
    for name, anchor in re.findall(r"\(clients/docs/pages/(\w+)\.md#(\S+?)\)", (ROOT / "README.md").read_text("utf-8")):
        if anchor not in pages[name].ids:
            broken.append(f"README.md: {name}.md#{anchor}")
    assert not broken
    assert len(site) > 15


def test_the_site_loads_nothing_from_elsewhere(site: Mapping[Path, Html]) -> None:
    loaded = {link for html in site.values() for link in html.loaded if not link.startswith("data:")}
    assert [link for link in loaded if urlsplit(link).scheme or urlsplit(link).netloc] == []
    folder = next(page for page in site if page.name == "index.html").parent
    assert any(link.endswith(".js") for link in loaded)
    sheets = list(folder.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", sheet.read_text(encoding="utf-8")) == []


def test_references_name_all_that_there_is(site: Mapping[Path, Html]) -> None:
    texts = {page.name: page.read_text(encoding="utf-8") for page in site}
    for name in ("post-generate", "get-tasksname", "post-v1chatcompletions", "generatereply"):
        assert name in _ids(site, "http.html")
    for name in COMMANDS:
        assert f"abmll {name}" in texts["commands.html"]
    for name in Settings.model_fields:
        assert f"<code>{name}</code>" in texts["settings.html"]
    for name in ("PromptTooLong", "RateLimited", "abmll_feedback_ece", "ABMLL_KEY_FILE"):
        assert name in texts["settings.html"]
    for name in ("LoadedPosterior", "AsyncClient", "RequestRejected", "Recalibration"):
        assert any(name in anchor for anchor in _ids(site, "python.html")), name


def _ids(site: Mapping[Path, Html], name: str) -> set[str]:
    return next(html.ids for page, html in site.items() if page.name == name)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_text_names_is_in_the_repository(text: Path) -> None:
    written = text.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", _BLOCK.sub("", written)):
        assert "://" in target or (text.parent / target).exists(), f"{target} is not there"
    said = re.findall(r"`([^`\n]+)`", _BLOCK.sub("", written))
    said += [body for kind, _, body in _BLOCK.findall(written) if kind in ("console", "sh", "text")]
    code = "\n".join(said).replace("\\\n", " ")
    for line in re.findall(r"(?:^|\$ |run --rm -T )abmll ([a-z].*)", code, re.MULTILINE):
        _check_command(line.split("  #")[0].split(" > ")[0].split())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|\$ )make ([a-z-]+)", code, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"there is no `make {target}`"


def _check_command(words: list[str]) -> None:
    assert words[0] in COMMANDS, f"there is no `abmll {words[0]}`"
    command = COMMANDS[words[0]]
    below: Mapping[str, Any] | None = vars(command).get("commands")
    if below and len(words) > 1 and not words[1].startswith("-"):
        assert words[1] in below, f"there is no `abmll {words[0]} {words[1]}`"
        command = below[words[1]]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    assert {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= known, " ".join(words)


def test_the_tutorial_prints_what_it_shows(keyed: Keyed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ABMLL_URL", keyed.url)
    monkeypatch.setenv("ABMLL_KEY", keyed.owner)
    blocks = _BLOCK.findall((DOCS / "pages/tutorial.md").read_text(encoding="utf-8"))
    session: dict[str, Any] = {}
    compared, threads = 0, torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for each other where other tests run
    try:
        for (kind, title, body), (after, _, shown) in pairwise([*blocks, ("", "", "")]):
            if title:
                Path(title).write_text(body, encoding="utf-8")
            printed = _run(kind, body, session)
            if after == "text" and kind in ("python", "sh"):
                assert _alike(shown, printed), f"{body}\nshows\n{shown}\nprints\n{printed}"
                compared += 1
    finally:
        torch.set_num_threads(threads)
        with Client(keyed.url, key=keyed.owner) as client, contextlib.suppress(Exception):
            client.delete_task("requests")
    assert compared > 10


def _run(kind: str, code: str, session: dict[str, Any]) -> str:
    """What a block prints; what is neither Python nor a shell's is shown only."""
    if kind == "python":
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compile(code, "tutorial.md", "exec"), session)  # the repository's own text
        return stream.getvalue()
    if kind != "sh":
        return ""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", code], capture_output=True, text=True, check=False, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _alike(shown: str, printed: str) -> bool:
    """Whether words are the same, and numbers but for a tenth: another processor rounds otherwise.

    A last line of ``…`` stands for whatever follows.
    """
    wanted, got = (_BARS.sub("", text).split() for text in (shown, printed))
    if wanted and wanted[-1] == "…":
        wanted, got = wanted[:-1], got[: len(wanted) - 1]
    if [_NUMBER.sub("0", word) for word in wanted] != [_NUMBER.sub("0", word) for word in got]:
        return False
    pairs = zip(*(map(float, _NUMBER.findall(" ".join(words))) for words in (wanted, got)), strict=True)
    return all(abs(a - b) <= max(0.05, 0.1 * a) for a, b in pairs)


@pytest.mark.parametrize(
    ("printed", "alike"), [("12 lights 0.55", True), ("12 lights 0.70", False), ("12 music 0.56", False), ("12", False)]
)
def test_a_tutorial_that_shows_something_else_is_found_out(printed: str, alike: bool) -> None:
    assert _alike("12 lights ██ 0.56\n", printed) is alike
    assert _alike("12 lights\n…\n", printed) is (printed.startswith("12 lights"))
