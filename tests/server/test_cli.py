"""The command line against a real server, and how commands end."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from clients.render import token
from tests.command_line import CommandLine
from tests.server.conftest import Server, free_port


def test_a_streamed_answer_is_the_answer_then_its_confidence(abmll: CommandLine, server: Server) -> None:
    asked = ("ask", "the film was a", "--max-tokens", 6, "--url", server.url)
    whole = abmll(*asked, "--json").json
    ran = abmll(*asked, "--stream")
    assert ran.code == 0, ran.err
    text, rest = ran.out.split(f"\n{100 * whole['confidence']:.1f} % confident")
    assert text.strip() == token(whole["answer"], None).plain.strip()
    assert "least sure of" in rest
    assert "\x1b" not in ran.out


@pytest.mark.parametrize("option", [("-o", "a"), ("--json",), ("--abstain-below", "0.5"), ("--normalize", "mean")])
def test_what_needs_the_whole_answer_is_not_streamed(abmll: CommandLine, option: tuple[str, ...]) -> None:
    ran = abmll("ask", "hi", "--stream", *option)
    assert ran.code == 2
    assert "needs the whole answer" in " ".join(ran.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--normalize", "mean"), "--normalize: is for questions with options"),
        (("--tolerance", "0.1"), "--tolerance: is for questions with options"),
        (("--tolerance", "0.1", "--stream"), "--tolerance: is for questions with options"),
        (("--top-p", "0.5"), "--top-p: is for --temperature above 0, or --samples"),
        (("-o", "a", "-o", "b", "--stop", "x"), "--stop: is for free text"),
        (("-o", "a", "-o", "b", "--max-tokens", "9"), "--max-tokens: is for free text"),
        (("-o", "a", "-o", "b", "--draws", "4", "--tolerance", "0.1"), "--tolerance: is for --draws auto"),
    ],
)
def test_what_would_do_nothing_is_refused(abmll: CommandLine, options: tuple[str, ...], expected: str) -> None:
    ran = abmll("ask", "hi", *options)
    assert ran.code == 2
    assert expected in " ".join(ran.err.replace("│", " ").split())


def test_a_shell_completes_the_names_of_a_running_servers_tasks(
    abmll: CommandLine, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_ABMLL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "abmll ask hi --task glo")
    monkeypatch.setenv("COMP_CWORD", "4")
    for url, expected in ((server.url, "global"), (f"http://127.0.0.1:{free_port()}", "")):
        monkeypatch.setenv("ABMLL_URL", url)
        ran = abmll()
        assert (ran.code, ran.out.strip(), ran.err) == (0, expected, "")


def test_the_version_and_the_exit_statuses_are_told(abmll: CommandLine) -> None:
    assert abmll("--version").out == f"abmll {version('abmll')}\n"
    assert "0 done, 1 failed, 2 wrong input, 130 interrupted" in abmll("--help").out


def test_a_host_that_leads_nowhere_and_a_name_that_no_task_gets_are_wrong_input(
    abmll: CommandLine, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.run.configure", lambda _: None)
    assert "there is no host nosuch.invalid" in abmll("serve", "--engine", "torch", "--host", "nosuch.invalid").refusal
    file = tmp_path / "films.jsonl"
    file.write_text('{"prompt": "p", "options": ["a", "b"], "answer": 0}\n')
    assert "is reserved" in abmll("teach", "global", file, "--url", server.url).refusal


def test_a_full_disk_is_one_line() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "server.cli", "config", "show", "--json"],
            stdout=stream, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("abmll: [Errno 28] No space left on device; free space")
    assert done.stderr.count("\n") == 1
