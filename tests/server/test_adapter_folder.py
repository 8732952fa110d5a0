"""Adapters in memory end with their process, however it ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from abmll.draws import save_adapter
from abmll.errors import EngineFailure
from server import adapters
from server.adapter_folder import AdapterFolder
from server.adapters import AdapterCache
from server.engine import Served
from tests.server.conftest import random_posterior

MAKE = """
from server.adapter_folder import AdapterFolder
folder = AdapterFolder()
(folder.path / "draw").mkdir()
(folder.path / "draw" / "adapter_model.safetensors").write_bytes(b"weights")
print(folder.path, flush=True)
input()
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.adapter_folder._MEMORY", tmp_path)
    mine = AdapterFolder()
    assert mine.path.parent == tmp_path
    for name in ("abmll-adapters-of-somebody", "other"):
        (tmp_path / name).mkdir()
    begin = f"import server.adapter_folder, pathlib; server.adapter_folder._MEMORY = pathlib.Path({str(tmp_path)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{begin}\n{MAKE}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        AdapterFolder().remove()
        assert (theirs / "draw" / "adapter_model.safetensors").exists()
        process.send_signal(signal.SIGKILL)
    AdapterFolder().remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["abmll-adapters-of-somebody", "other", mine.path.name]
    )
    mine.remove()
    assert not mine.path.exists()


def test_a_draw_that_comes_after_the_end_is_not_written(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.adapter_folder._MEMORY", tmp_path)
    folder = AdapterFolder()
    cache = AdapterCache(folder.path, 8, torch.float32, 1 << 20)

    async def ask() -> None:
        async with cache.holding(Served("key", random_posterior(tiny_model_folder, 1)), 0, [0]):
            pass

    asyncio.run(ask())
    folder.remove()
    folder.remove()
    cache = AdapterCache(folder.path, 8, torch.float32, 1 << 20)
    with pytest.raises(EngineFailure, match="cannot be written"):
        asyncio.run(ask())
    assert list(tmp_path.iterdir()) == []


def test_a_draw_whose_asker_is_gone_is_kept_count_of(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = AdapterCache(tmp_path, 8, torch.float32, 1 << 20)
    posterior = Served("key", random_posterior(tiny_model_folder, 1))
    writing, go_on = threading.Event(), threading.Event()

    def slowly(*given: Any, **named: Any) -> None:
        save_adapter(*given, **named)
        writing.set()
        go_on.wait(10)

    monkeypatch.setattr(adapters, "save_adapter", slowly)

    async def ask() -> None:
        async with cache.holding(posterior, 0, [0]):
            pass

    async def leave() -> None:
        asking = asyncio.create_task(ask())
        await asyncio.to_thread(writing.wait, 10)
        asking.cancel()
        await asyncio.wait([asking])
        go_on.set()
        await ask()
        assert (len(cache), cache.loads, len(list(tmp_path.iterdir()))) == (1, 1, 1)
        await cache.release("key")
        assert (len(cache), list(tmp_path.iterdir())) == (0, [])

    asyncio.run(leave())

    for error in (OSError(28, "No space left on device"), SafetensorError("No space left on device")):

        def full(*_: Any, wrong: Exception = error, **__: Any) -> None:
            raise wrong

        monkeypatch.setattr(adapters, "save_adapter", full)
        with pytest.raises(EngineFailure, match="No space left"):
            asyncio.run(ask())
        assert list(tmp_path.iterdir()) == []


def test_a_draw_is_not_given_up_before_who_asked_for_it_has_it(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = AdapterCache(tmp_path, 8, torch.float32, 0)
    posterior = Served("key", random_posterior(tiny_model_folder, 1))
    make = cache._make  # pyright: ignore[reportPrivateUsage]

    async def made_and_shrunk(*given: Any) -> None:
        await make(*given)
        await cache.release("another")  # gives up whatever nobody holds

    monkeypatch.setattr(cache, "_make", made_and_shrunk)

    async def ask() -> None:
        async with cache.holding(posterior, 0, range(3)) as held:
            assert all(adapter.path.is_dir() for adapter in held)

    asyncio.run(ask())
    assert (cache.loads, len(cache), list(tmp_path.iterdir())) == (3, 0, [])
