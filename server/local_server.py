"""A server of one's own, as a process of this machine: what the benchmark and the soak test ask."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

_READY_SECONDS = 300.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_below(pid: int, name: str = "") -> list[psutil.Process]:
    """The processes that a process has started, and those have, whose command lines hold a name."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
    return found


class LocalServer:
    """``abmll serve`` on a port of its own: started, ended, started again on the same store and port.

    Args:
        engine: vllm or torch.
        store: The store's folder.
        log: The file that its output is added to.
        extra: Further options of ``abmll serve``.

    Attributes:
        url: Its address.
    """

    def __init__(self, engine: str, store: Path, log: Path, extra: Sequence[str] = ()) -> None:
        port = free_port()
        self.url, self._log = f"http://127.0.0.1:{port}", log
        self._command = [sys.executable, "-m", "server.cli", "serve", "--engine", engine, "--port", str(port)]
        self._command += ["--store", str(store), *extra]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Starts the server; returns the seconds until it was ready.

        Raises:
            RuntimeError: It ended, or was not ready in five minutes.
        """
        begin = time.perf_counter()
        with self._log.open("ab") as stream:
            self._process = subprocess.Popen(
                self._command, stdout=stream, stderr=stream, env=os.environ | {"PYTHONUNBUFFERED": "1"}
            )
        while self._process.poll() is None and time.perf_counter() < begin + _READY_SECONDS:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return time.perf_counter() - begin
            time.sleep(0.05)
        raise RuntimeError(f"the server did not become ready:\n{self._log.read_text()[-3000:]}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends the server, by force if it has not ended after a minute; returns its exit status."""
        assert self._process is not None
        self._process.send_signal(how)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def child(self, name: str) -> psutil.Process | None:
        """A process below the server whose command line holds a name; None where there is none."""
        assert self._process is not None
        return next(iter(processes_below(self._process.pid, name)), None)

    def memory(self) -> float | None:
        """Resident memory of the server's own process, in MiB; None while there is none."""
        assert self._process is not None
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._process.pid).memory_info().rss / 2**20
        return None
