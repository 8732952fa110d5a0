"""A cache bounded in bytes: what has not been used for longest goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

_K = TypeVar("_K")
_V = TypeVar("_V")
# What an entry takes beside its tensors, roughly.
_ENTRY = 1024


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors keep from being freed: of a view, those of all that it is a view of."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


class ByteCache(Generic[_K, _V]):
    """A least-recently-used cache that counts, callable from any thread.

    The newest entry stays even where it alone is larger than the limit: what is asked for is needed. An entry in
    use is not freed by going: whoever uses it holds it.

    Args:
        limit: Most bytes.
        size: Bytes of a value.

    Attributes:
        loads: Values made.
        hits: Values found.
        evictions: Values given up for others.
    """

    def __init__(self, limit: int, size: Callable[[_V], int]) -> None:
        self.limit, self.size = limit, size
        self.loads = self.hits = self.evictions = 0
        self.bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[_K, tuple[_V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def present(self) -> list[_K]:
        """The keys, the oldest first."""
        with self._lock:
            return list(self._entries)

    def find(self, key: _K) -> _V | None:
        """Returns a value, now the newest; None if it is not there."""
        with self._lock:
            if key not in self._entries:
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: _K, value: _V) -> None:
        """Adds a value, and gives up the oldest while there are too many bytes."""
        size = _ENTRY + self.size(value)
        with self._lock:
            self._remove(key)
            self._entries[key] = value, size
            self.bytes += size
            self.loads += 1
            while self.bytes > self.limit and len(self._entries) > 1:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed
                self.evictions += 1

    def get(self, key: _K, make: Callable[[], _V]) -> _V:
        """Returns a value, made if it is not there."""
        found = self.find(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def pop(self, key: _K) -> _V | None:
        """Takes a value out; None if it is not there."""
        with self._lock:
            return self._remove(key)

    def _remove(self, key: _K) -> _V | None:
        value, size = self._entries.pop(key, (None, 0))
        self.bytes -= size
        return value
