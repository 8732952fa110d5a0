"""Two processes that talk over gloo."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any


def environment_of(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells one of two processes of this machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


def start_two(work: Callable[..., None], *arguments: Any) -> list[tuple[ForkServerProcess, Any]]:
    """Starts ``work(pipe, *arguments, rank, port)`` in two processes; returns each with its pipe's other end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    started: list[tuple[ForkServerProcess, Any]] = []
    for rank in range(2):
        mine, other = context.Pipe()
        process = context.Process(target=work, args=(other, *arguments, rank, port))
        process.start()
        other.close()
        started.append((process, mine))
    return started


def results_of(started: list[tuple[ForkServerProcess, Any]]) -> list[Any]:
    """What each process sends, once all have ended."""
    told = [pipe.recv() for _, pipe in started]
    for process, _ in started:
        process.join()
    return told
