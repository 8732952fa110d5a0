"""What is said of a figure's origin."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from pathlib import Path

import pytest

from training import provenance


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_figures_name_day_and_commit_and_whether_files_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    assert provenance.provenance().endswith(f"{today}, commit {commit}")
    (tmp_path / "file").write_text("two")
    assert provenance.provenance().endswith(f"commit {commit}-dirty")


def test_code_outside_a_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.provenance().endswith("commit unknown")
