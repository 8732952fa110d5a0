"""Two processes that talk over gloo."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

from tests.server.conftest import free_port


def start_two(work: Callable[..., None], *arguments: Any) -> list[tuple[ForkServerProcess, Any]]:
    """Starts ``work(pipe, *arguments)`` in two processes, as torchrun would; returns each with its pipe's other end."""
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    started: list[tuple[ForkServerProcess, Any]] = []
    for rank in range(2):
        mine, other = context.Pipe()
        process = context.Process(target=_run, args=(rank, port, work, other, *arguments))
        process.start()
        other.close()
        started.append((process, mine))
    return started


def _run(rank: int, port: int, work: Callable[..., None], pipe: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    work(pipe, *arguments)


def results_of(started: list[tuple[ForkServerProcess, Any]]) -> list[Any]:
    """What each process sends, once all have ended."""
    told = [pipe.recv() for _, pipe in started]
    for process, _ in started:
        process.join()
    return told
