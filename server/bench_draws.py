"""What draws cost beside vLLM alone, over HTTP: ``python -m server.bench_draws``.

The same base model behind vLLM's own server, asked without an adapter and with one, and behind ``abmll serve --engine
vllm`` with more and more draws. Every question is new, so that no prefix cache helps either. The model must not end its
texts before they have all their tokens, as one of ``training.random_model`` does not: vLLM can be told to go on, abmll
cannot.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.bench import adaptation_seconds, prompts, running_server
from server.local_server import free_port

OPTIONS = ["music", "weather", "train", "bank"]
_READY_SECONDS = 600.0


@contextmanager
def vllm_server(
    model: str, adapter: Path, rank: int, targets: Sequence[str], extra: Sequence[str]
) -> Generator[str, None, None]:
    """Starts vLLM's own server with one adapter, named ``draw``; yields its address.

    Raises:
        RuntimeError: It ended, or was not ready in ten minutes.
    """
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "base", "--enable-lora", "--max-loras", "1"]
    command += ["--max-lora-rank", str(rank), "--lora-target-modules", *targets, "--lora-modules", f"draw={adapter}"]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen([*command, *extra], stdout=log, stderr=log, env=os.environ)
        try:
            end = time.perf_counter() + _READY_SECONDS
            while process.poll() is None and time.perf_counter() < end:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                        break
                time.sleep(0.2)
            else:
                raise RuntimeError(f"vLLM did not become ready:\n{Path(log.name).read_text()[-5000:]}")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()


async def _load(url: str, path: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[float]]:
    """Sends all bodies; seconds altogether, and of each.

    The first ``clients`` of them are sent before and not counted: they open the connections.
    """
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def work(queue: list[dict[str, Any]], seconds: list[float]) -> None:
            while queue:
                begin = time.perf_counter()
                (await client.post(path, json=queue.pop())).raise_for_status()
                seconds.append(time.perf_counter() - begin)

        async def send(queue: list[dict[str, Any]]) -> list[float]:
            seconds: list[float] = []
            await asyncio.gather(*(work(queue, seconds) for _ in range(clients)))
            return seconds

        await send(list(bodies[:clients]))
        begin = time.perf_counter()
        seconds = await send(list(bodies[clients:]))
        return time.perf_counter() - begin, seconds


class Measured:
    """Rows of the two tables, texts and questions with options, as they are measured.

    Args:
        clients: How many ask at a time.
        each: Requests of each client.
        tokens: Of a text.
        words: Of a prompt.
    """

    def __init__(self, clients: Sequence[int], each: int, tokens: int, words: int) -> None:
        self.clients, self.each, self.tokens, self.words = clients, each, tokens, words
        self.rows: list[dict[str, Any]] = []
        self._seed = 0

    def _prompts(self, count: int) -> list[str]:
        self._seed += 1
        return prompts(count, self._seed, self.words)

    def measure(self, name: str, url: str, path: str, body: dict[str, Any], kind: str, work: int) -> None:
        """Measures one kind of request for each number of clients; ``work`` is what one request counts for."""
        for clients in self.clients:
            count = clients * self.each
            bodies = [body | {"prompt": p} for p in self._prompts(clients + count)]
            total, seconds = asyncio.run(_load(url, path, bodies, clients))
            p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
            row = {"kind": kind, "name": name, "clients": clients, "rate": work * count / total, "p95": 1000 * p95}
            self.rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)

    def vllm(self, name: str, url: str, model: str) -> None:
        """Measures vLLM's own server: texts, and one token of a question with options."""
        text = {"model": model, "temperature": 0.0, "max_tokens": self.tokens, "ignore_eos": True}
        self.measure(name, url, "/v1/completions", text, "text", self.tokens)
        one = {"model": model, "temperature": 0.0, "max_tokens": 1, "logprobs": len(OPTIONS)}
        self.measure(name, url, "/v1/completions", one, "options", 1)

    def ours(self, url: str, draws: int) -> None:
        """Measures ``/generate`` with a number of draws."""
        name = f"abmll, {draws} draw{'s' if draws > 1 else ''}"
        text = {"max_tokens": self.tokens, "draws": draws}
        self.measure(name, url, "/generate", text, "text", self.tokens)
        self.measure(name, url, "/generate", {"options": OPTIONS, "draws": draws}, "options", 1)

    def print(self) -> None:
        """Prints both tables; ``factor`` is what it costs in units of vLLM with one adapter."""
        for kind, unit in (("text", "tokens/s"), ("options", "answers/s")):
            print(f"\n{f'free text of {self.tokens} tokens' if kind == 'text' else 'one of four options'}")
            heads = "".join(f" {unit}, {n} client{'s' if n > 1 else ''} | p95 ms | factor |" for n in self.clients)
            print(f"| asked |{heads}\n|---|{'---|' * 3 * len(self.clients)}")
            rows = [row for row in self.rows if row["kind"] == kind]
            reference = {row["clients"]: row["rate"] for row in rows if row["name"] == "vLLM, one adapter"}
            for name in dict.fromkeys(row["name"] for row in rows):
                cells = [
                    f" {row['rate']:.1f} | {row['p95']:.0f} | {reference[row['clients']] / row['rate']:.2f} |"
                    for row in rows
                    if row["name"] == name
                ]
                print(f"| {name} |{''.join(cells)}")


def main() -> None:
    """Prints the tables."""
    from abmll.draws import draw, save_adapter
    from abmll.store import load_posterior
    from server.vllm_setup import adapter_rank, fused, parse_options, set_environment
    from training.provenance import provenance

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="base model, such as training.random_model makes")
    parser.add_argument("--posterior", type=Path, required=True, help="its global posterior")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--each", type=int, default=4, help="requests of each client")
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--words", type=int, default=60, help="of a prompt, about")
    parser.add_argument("--vllm", nargs="*", default=[], metavar="NAME=VALUE", help="numbers for both engines")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="the rest: options of abmll serve")
    given = parser.parse_args()
    set_environment()
    model, posterior = given.model, load_posterior(given.posterior).posterior
    measured = Measured(given.clients, given.each, given.tokens, given.words)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "draw"
        save_adapter(draw(posterior, 0, 0), posterior, adapter)
        targets = sorted({fused(target) for target in posterior.config.targets})
        extra = [f"--{name.replace('_', '-')}={json.dumps(value)}" for name, value in parse_options(given.vllm).items()]
        with vllm_server(model, adapter, adapter_rank(posterior.config.draw_rank), targets, extra) as url:
            measured.vllm("vLLM, no adapter", url, "base")
            measured.vllm("vLLM, one adapter", url, "draw")
    options = [f"--vllm-option={text}" for text in given.vllm]
    options += ["--model", model, "--posterior", str(given.posterior), "--concurrency", str(max(given.clients))]
    with running_server("vllm", [*options, *given.serve]) as (url, ready):
        for draws in given.draws:
            measured.ours(url, draws)
        adapted = [adaptation_seconds(url), adaptation_seconds(url)]
    print(f"{provenance()}; ready after {ready:.0f} s")
    measured.print()
    print(f"\n/adapt with 16 examples, request to first answer: {adapted[0]:.1f} s, again: {adapted[1]:.1f} s")


if __name__ == "__main__":
    main()
