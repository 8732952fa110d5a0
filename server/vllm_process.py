"""Ends vLLM's processes with the server that began them, however it ends: vLLM itself leaves them behind ``kill -9``.

vLLM loads this as a plugin in each of its processes (entry point ``vllm.general_plugins`` in pyproject.toml).
"""

from __future__ import annotations

import os
import select
import signal
import threading

# The server's process; its children inherit the environment.
_OWNER = "ABMLL_VLLM_OWNER"


def own() -> None:
    """Makes vLLM's processes that are begun from now on this process's own."""
    os.environ[_OWNER] = str(os.getpid())


def end_with_owner() -> None:
    """Waits in a thread for the owner's end, and ends this process then; without an owner, or in it, does nothing."""
    owner = int(os.environ.get(_OWNER, os.getpid()))
    if owner == os.getpid() or not hasattr(os, "pidfd_open"):  # the latter is Linux's
        return
    try:
        handle = os.pidfd_open(owner)
    except ProcessLookupError:
        _end()
    else:
        threading.Thread(target=_wait, args=(handle,), name="owner", daemon=True).start()


def _wait(handle: int) -> None:
    select.select([handle], [], [])
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
