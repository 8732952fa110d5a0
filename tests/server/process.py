"""A server in a process of its own, forked from one that has imported everything: imports are most of a start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from server.settings import Settings

ROOT = Path(__file__).parents[2]
_FORKS = multiprocessing.get_context("forkserver")


def _serve(settings: str, log: str, environment: dict[str, str]) -> None:
    """What the process does; without threads until here, it is as one that was started by itself."""
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(environment)  # that of the process it is forked from may be older
    os.environ["OMP_NUM_THREADS"] = "1"  # for the worker
    import torch

    from server.run import run

    torch.set_num_threads(1)
    sys.exit(run(Settings.model_validate_json(settings)))


def start(settings: Settings, log: Path) -> ServerProcess | subprocess.Popen[bytes]:
    """Starts a server; one of vLLM or Ray, which make processes of their own, as a program.

    Args:
        settings: The server's.
        log: File for what it writes.
    """
    log.touch()
    if settings.engine != "vllm" and settings.replicas is None:
        return ServerProcess(settings.model_dump_json(), log)
    code = "import sys; from server.run import run; from server.settings import Settings; "
    code += "sys.exit(run(Settings.model_validate_json(sys.argv[1])))"
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", code, settings.model_dump_json()],
            cwd=ROOT,
            stdout=stream,
            stderr=stream,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


class ServerProcess:
    """What ``subprocess.Popen`` offers, of a forked server.

    Args:
        settings: The server's, as JSON.
        log: File for what it writes.
    """

    def __init__(self, settings: str, log: Path) -> None:
        self._process: ForkServerProcess = _FORKS.Process(target=_serve, args=(settings, str(log), dict(os.environ)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the server", timeout or 0)
        return self._process.exitcode

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)
