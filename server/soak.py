"""Mixed traffic for minutes, with real faults in between, and what came of it: ``python -m server.soak``.

Faults: ``kill -9`` of the server, of its adaptation process and of vLLM's engine process, a full disk (where a
file system can be mounted), an orderly restart. A job counts as acknowledged with its 202. At the end every one must
be done, its version readable and answering, or failed with a reason; anything else is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from scipy.stats import theilslopes

from server.bench import WORKLOADS, prompts, zipf
from server.local_server import LocalServer
from training.provenance import provenance

CLIENTS = 8
# Seconds between faults, between new tasks, and that a full disk lasts.
FAULT_SECONDS, ADAPT_SECONDS, FULL_SECONDS = 45.0, 15.0, 10.0
_STORE_MIB = 256
_OPTIONS = WORKLOADS["labels"]


@dataclass
class Tally:
    """What happened.

    Attributes:
        outcomes: Requests by what they were and how they ended.
        wrong: Replies that no reply may be, such as a 500; told one by one.
        seconds: Of each answered question.
        acknowledged: Task by job, for each job that was answered with 202.
        answers: Probabilities of a fixed question by posterior: the same for ever.
        faults: Faults by kind.
        memory: (seconds, MiB) of the server's process in each of its lives.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    wrong: list[str] = field(default_factory=list[str])
    seconds: list[float] = field(default_factory=list[float])
    acknowledged: dict[str, str] = field(default_factory=dict[str, str])
    answers: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    faults: Counter[str] = field(default_factory=Counter[str])
    memory: list[list[tuple[float, float]]] = field(default_factory=lambda: [[]])

    def count(self, what: str, reply: httpx.Response | None, allowed: Sequence[int]) -> None:
        """Counts a request's end; None: the connection failed."""
        if reply is None:
            self.outcomes[what, "no connection"] += 1
            return
        kind = str(reply.status_code)
        if reply.status_code >= 400:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                kind += " " + reply.json()["error"]["type"]
        self.outcomes[what, kind] += 1
        patient = reply.status_code in (429, 503) and "Retry-After" in reply.headers
        if reply.status_code not in allowed and not patient:
            self.wrong.append(f"{what}: {reply.status_code} {reply.text[:300]}")


@contextmanager
def disk() -> Generator[tuple[Path, bool]]:
    """A folder, on a file system of its own where one can be mounted; and whether it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_STORE_MIB}m", "tmpfs", str(folder)]
        mounted = hasattr(os, "geteuid") and os.geteuid() == 0 and not subprocess.run(mount, stderr=-3).returncode
        try:
            yield folder, mounted
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _fill(folder: Path) -> Path:
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    return filler


class Soak:
    """The traffic and the faults.

    Args:
        subject: The server.
        engine: Its engine.
        folder: Where its store's disk is mounted.
        seed: Of what is asked, and of which fault comes when.
        can_fill: Whether the store has a disk of its own.
    """

    def __init__(self, subject: LocalServer, engine: str, folder: Path, seed: int, can_fill: bool) -> None:
        self.subject, self.engine, self.folder = subject, engine, folder
        self.random, self.can_fill = random.Random(seed), can_fill
        self.tally = Tally()
        self.questions = prompts(200, seed)
        self.ending = asyncio.Event()
        self.tasks = ["global"]

    async def _send(self, client: httpx.AsyncClient, what: str, allowed: Sequence[int], method: str, path: str,
                    **body: Any) -> httpx.Response | None:  # fmt: skip
        try:
            reply = await client.request(method, path, json=body or None)
        except httpx.HTTPError:
            reply = None
        self.tally.count(what, reply, allowed)
        if reply is None or reply.status_code in (429, 503):
            await asyncio.sleep(0.5)
        return reply

    async def ask(self, client: httpx.AsyncClient) -> None:
        """Sends one request: most are questions, some are wrong, some are given up."""
        dice, task = self.random.random(), self._task()
        question = {"prompt": self.random.choice(self.questions), "options": _OPTIONS, "task": task}
        if dice < 0.80:
            begun = time.perf_counter()
            reply = await self._send(client, "question", (200,), "POST", "/generate", **question)
            if reply is not None and reply.status_code == 200:
                self.tally.seconds.append(time.perf_counter() - begun)
        elif dice < 0.86:
            reply = await self._send(
                client, "same question", (200,), "POST", "/generate",
                **question | {"prompt": self.questions[0], "draws": 4},
            )  # fmt: skip
            if reply is not None and reply.status_code == 200:
                self._compare(reply.json())
        elif dice < 0.88:
            free = {"prompt": question["prompt"], "task": task, "max_tokens": 8, "draws": 2, "tokens": True}
            await self._send(client, "free text", (200,), "POST", "/generate", **free)
        elif dice < 0.90:
            given = {"prompt": question["prompt"], "task": task, "answer": self.random.choice(_OPTIONS), "draws": 2}
            await self._send(client, "score", (200,), "POST", "/score", **given)
        elif dice < 0.93:
            wrong = self.random.choice(
                [{"task": "nowhere"}, {"options": ["same", "same"]}, {"draws": 0}, {"prompt": ""}]
            )
            await self._send(client, "wrong question", (404, 422), "POST", "/generate", **question | wrong)
        elif dice < 0.96:
            with contextlib.suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(0.01):
                    await client.post("/generate", json=question | {"draws": 64})
            self.tally.outcomes["question", "given up by the client"] += 1
        else:
            path = self.random.choice(["/tasks", f"/tasks/{task}", "/adapt", "/metrics", "/healthz"])
            await self._send(client, "look", (200,), "GET", path)

    def _task(self) -> str:
        return zipf(self.tasks, 1, self.random)[0]

    def _compare(self, reply: dict[str, Any]) -> None:
        before = self.tally.answers.setdefault(reply["posterior"]["id"], reply["probabilities"])
        if max(abs(a - b) for a, b in zip(before, reply["probabilities"], strict=True)) > 1e-3:
            self.tally.wrong.append(f"another answer to the same question: {before}, now {reply['probabilities']}")

    async def _until_end(self, pause: float, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while not self.ending.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ending.wait(), pause)
            if not self.ending.is_set():
                await act()

    async def clients(self) -> None:
        """Clients that ask one request after another."""

        async def one() -> None:
            async with self._client() as client:
                while not self.ending.is_set():
                    await self.ask(client)

        await asyncio.gather(*(one() for _ in range(CLIENTS)))

    @asynccontextmanager
    async def _client(self) -> AsyncGenerator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=self.subject.url, timeout=90) as client:
            yield client

    async def teach(self) -> None:
        """Submits a job; one in three is a new version of a task."""
        known = self.tasks[1:]
        again = bool(known) and self.random.random() < 1 / 3
        task = self.random.choice(known) if again else f"task-{len(self.tally.acknowledged)}"
        examples = [
            {"prompt": prompt, "options": _OPTIONS, "answer": self.random.randrange(4)}
            for prompt in self.random.sample(self.questions, 8)
        ]
        async with self._client() as client:
            reply = await self._send(
                client, "adapt", (202, 409), "POST", "/adapt", task=task, examples=examples, steps=8
            )
            if reply is not None and reply.status_code == 202:
                self.tally.acknowledged[reply.json()["job"]] = task
            listed = await self._send(client, "look", (200,), "GET", "/tasks")
            if listed is not None and listed.status_code == 200:
                self.tasks = [row["task"] for row in listed.json()]

    async def fault(self) -> None:
        """Injects one fault."""
        subject = self.subject
        kinds = ["server killed", "adaptation process killed", "orderly restart"]
        kinds += ["engine process killed"] * (self.engine == "vllm") + ["full disk"] * self.can_fill
        kind = min(kinds, key=lambda name: (self.tally.faults[name], self.random.random()))
        self.tally.faults[kind] += 1
        print(f"  {kind}", file=sys.stderr, flush=True)
        if kind == "full disk":
            filler = await asyncio.to_thread(_fill, self.folder)
            await asyncio.sleep(FULL_SECONDS)
            filler.unlink(missing_ok=True)
        elif kind in ("server killed", "orderly restart"):
            how = signal.SIGKILL if kind == "server killed" else signal.SIGTERM
            status = await asyncio.to_thread(subject.stop, how)
            if how == signal.SIGTERM and status != 0:
                self.tally.wrong.append(f"an orderly stop ended with status {status}")
            self.tally.memory.append([])
            await asyncio.to_thread(subject.start)
        else:
            process = subject.child("server.worker" if kind.startswith("adaptation") else "EngineCore")
            if process is None:
                self.tally.faults[kind] -= 1
                self.tally.faults[f"{kind}: there was none"] += 1
            else:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    async def weigh(self) -> None:
        """Writes the server's memory down."""
        memory = self.subject.memory()
        if memory is not None:
            self.tally.memory[-1].append((time.monotonic(), memory))

    async def run(self, minutes: float) -> Sequence[str]:
        """Runs; returns the acknowledged jobs that are lost, each with the reason."""
        await asyncio.to_thread(self.subject.start)
        # The last third is without faults, so that one life is long enough to tell growth, and without new tasks, whose
        # posteriors are rightly kept.
        quiet = asyncio.get_running_loop().time() + 60 * minutes * 2 / 3

        async def before_quiet(act: Callable[[], Coroutine[Any, Any, None]]) -> None:
            if asyncio.get_running_loop().time() < quiet:
                await act()

        work = asyncio.gather(
            self.clients(),
            self._until_end(ADAPT_SECONDS, lambda: before_quiet(self.teach)),
            self._until_end(FAULT_SECONDS, lambda: before_quiet(self.fault)),
            self._until_end(2.0, self.weigh),
        )
        ender = asyncio.get_running_loop().call_later(60 * minutes, self.ending.set)
        try:
            await work
        finally:
            ender.cancel()
        return await self.lost()

    async def lost(self) -> list[str]:
        """Waits for every acknowledged job, restarts the server, and looks for each once more."""
        lost: list[str] = []
        async with self._client() as client:
            for job in self.tally.acknowledged:
                for _ in range(600):
                    reply = await client.get(f"/adapt/{job}")
                    if reply.status_code != 200 or reply.json()["status"] not in ("queued", "running"):
                        break
                    await asyncio.sleep(0.5)
        await asyncio.to_thread(self.subject.stop, signal.SIGKILL)
        await asyncio.to_thread(self.subject.start)
        async with self._client() as client:
            for job, task in self.tally.acknowledged.items():
                reply = await client.get(f"/adapt/{job}")
                state: dict[str, Any] = reply.json() if reply.status_code == 200 else {}
                if state.get("status") == "failed" and state["error"]:
                    self.tally.outcomes["job", "failed: " + state["error"][:60]] += 1
                elif state.get("status") != "done":
                    lost.append(f"{job}: {reply.status_code} {reply.text[:200]}")
                else:
                    self.tally.outcomes["job", "done"] += 1
                    made = state["posterior"]
                    body = {"prompt": self.questions[0], "options": _OPTIONS, "draws": 4}
                    reply = await client.post("/generate", json=body | {"task": task, "version": made["version"]})
                    if reply.status_code != 200 or reply.json()["posterior"]["id"] != made["id"]:
                        lost.append(f"{job}: version {made['version']} of {task} does not answer: {reply.text[:200]}")
                    else:
                        self._compare(reply.json())
        return lost


def report(tally: Tally, lost: Sequence[str], minutes: float, engine: str) -> str:
    """The tables."""
    lines = [f"{provenance()}; engine {engine}, {minutes:g} minutes, {CLIENTS} clients", ""]
    lines += ["| request | outcome | count |", "|---|---|---|"]
    lines += [f"| {what} | {kind} | {count:,} |" for (what, kind), count in sorted(tally.outcomes.items())]
    lines += ["", "| fault | times |", "|---|---|"]
    lines += [f"| {kind} | {count} |" for kind, count in sorted(tally.faults.items()) if count]
    cuts = statistics.quantiles(tally.seconds, n=100)
    p50, p95, p99 = (1000 * cuts[i - 1] for i in (50, 95, 99))
    life = max(tally.memory, key=lambda points: points[-1][0] - points[0][0] if len(points) > 1 else 0.0)
    settled = [(when, size) for when, size in life if when > life[0][0] + 60]
    lines += ["", f"questions: p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms"]
    if len(settled) > 10:
        slope, _, low, high = theilslopes([size for _, size in settled], [when / 3600 for when, _ in settled])
        length = (settled[-1][0] - settled[0][0]) / 60
        lines.append(
            f"memory of the server's process: {settled[-1][1]:.0f} MiB at the end; growth {slope:.1f} MiB per hour "
            f"({low:.1f} to {high:.1f}; longest life without its first minute, {length:.1f} minutes)"
        )
    lines += [f"wrong replies: {len(tally.wrong)}", *(f"  {text}" for text in tally.wrong[:20])]
    lines += [f"acknowledged jobs: {len(tally.acknowledged)}, lost: {len(lost)}", *(f"  {text}" for text in lost)]
    return "\n".join(lines)


def main() -> None:
    """Runs, prints the tables, and ends with status 1 where a reply was wrong or a job is lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, nargs="?", default=15.0)
    parser.add_argument("--engine", choices=["torch", "vllm"], default="torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the server's log in this file")
    arguments = parser.parse_args()
    with disk() as (folder, mounted):
        if not mounted:
            print("no file system can be mounted (needs root): the disk is not filled", file=sys.stderr)
        log: Path = arguments.log or folder.parent / "log"
        subject = LocalServer(arguments.engine, folder / "store", log)
        soak = Soak(subject, arguments.engine, folder, arguments.seed, mounted)
        try:
            lost = asyncio.run(soak.run(arguments.minutes))
        finally:
            with contextlib.suppress(Exception):
                subject.stop()
    print(report(soak.tally, lost, arguments.minutes, arguments.engine))
    sys.exit(1 if lost or soak.tally.wrong else 0)


if __name__ == "__main__":
    main()
