"""A server over base weights in 4 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from abmll.errors import AbmllError
from server.run import check
from server.settings import Settings
from tests.server.conftest import Server
from tests.server.test_http import QUESTION, adapt


def test_a_server_over_weights_in_4_bits_answers_and_teaches(
    start_server: Callable[..., Server], server: Server, tmp_path: Path
) -> None:
    packed = start_server(tmp_path / "store", dtype="nf4")
    replies = [each.http.post("/generate", json=QUESTION).json() for each in (packed, server)]
    assert 0 < abs(replies[0]["confidence"] - replies[1]["confidence"]) < 0.3
    assert packed.wait_job(adapt(packed, "films")["job"])["status"] == "done"
    taught = packed.http.post("/generate", json=QUESTION | {"task": "films"}).json()
    assert taught["probabilities"] != pytest.approx(replies[0]["probabilities"], abs=1e-3)


def test_what_packs_the_weights_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(AbmllError, match=r"pip install 'abmll\[nf4\]'"):
        check(Settings(engine="torch", dtype="nf4"))
