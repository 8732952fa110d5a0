from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from abmll.store import Record, StoredPosterior
from server.cache import ByteCache, tensor_bytes
from server.store import TaskStore
from tests.server.conftest import random_posterior


def test_the_oldest_go_once_there_are_too_many_bytes() -> None:
    cache: ByteCache[str, int] = ByteCache(10 * 1024, lambda size: size)
    for key in "abc":
        assert cache.get(key, lambda: 2 * 1024) == 2048
    assert cache.get("a", lambda: pytest.fail("it is there")) == 2048
    cache.get("d", lambda: 2 * 1024)
    assert cache.present() == ["c", "a", "d"]
    assert (cache.bytes, cache.loads, cache.hits, cache.evictions) == (9 * 1024, 4, 1, 1)
    cache.get("huge", lambda: 1 << 20)
    assert cache.present() == ["huge"]
    assert cache.pop("huge") == 1 << 20
    assert (cache.pop("huge"), cache.bytes, len(cache)) == (None, 0, 0)


def test_bytes_are_right_however_many_threads_use_it() -> None:
    cache: ByteCache[int, int] = ByteCache(20 * 1024, lambda size: size)

    def use(seed: int) -> None:
        for step in range(2000):
            key = (seed * 7 + step * 13) % 40
            if step % 5:
                cache.get(key, lambda: 1024)
            else:
                cache.pop(key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert cache.bytes == 2048 * len(cache)
    assert cache.bytes <= 20 * 1024


def test_a_view_counts_what_it_keeps_from_being_freed() -> None:
    whole = torch.zeros(1000, dtype=torch.float32)
    assert tensor_bytes([whole[:2], whole[5:7]]) == 4000
    assert tensor_bytes([whole[:2].clone(), whole]) == 4008


def test_a_store_keeps_only_so_many_bytes_and_serves_all(
    tmp_path: Path, tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior]
) -> None:
    size = 4 * sum(tensor.numel() for tensor in global_posterior[1].posterior.tensors().values())
    store = TaskStore(tmp_path, global_posterior[1], cache_bytes=3 * (size + 2048))
    digests: list[str] = []
    for i in range(5):
        posterior = random_posterior(tiny_model_folder, i)
        digests.append(store.add(f"t{i}", posterior, None, lambda n: Record(task="t", version=n)).digest)
    for _ in range(2):
        assert [store.current(f"t{i}").digest for i in range(5)] == digests
    assert len(store._loaded) == 3  # pyright: ignore[reportPrivateUsage]


def test_versions_added_at_once_get_numbers_of_their_own(
    tmp_path: Path, tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior]
) -> None:
    store = TaskStore(tmp_path, global_posterior[1])
    posteriors = [random_posterior(tiny_model_folder, i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda p: store.add("t", p, None, lambda n: Record(task="t", version=n)), posteriors))
    assert sorted(stored.record.version for stored in made) == [1, 2, 3, 4]
    assert {version.stored.digest for version in store.versions("t") if version.stored} == {s.digest for s in made}
