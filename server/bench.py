"""Speed of the real server over HTTP, beside a loop over PEFT adapters: ``python -m server.bench``."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.local_server import LocalServer

DRAWS, CLIENTS = 8, 16
_TEXT = (
    "please tell me when the next train leaves for the city and whether i can still buy a ticket at the station "
    "because my friend wants to bring her music and a small dog while the weather may turn cold before evening "
    "so we would rather book a table at the hotel pay with a card and listen to the news about the bank"
)
_WORDS = _TEXT.split()
# Options of one token each, and of several, in the embedded model's vocabulary.
WORKLOADS = {
    "labels": ["music", "weather", "train", "bank"],
    "phrases": ["play some music", "ask for the weather", "buy a train ticket", "pay the bank"],
}


def prompts(count: int, seed: int, words: int = 60) -> list[str]:
    """Returns made-up questions, of about 64 tokens by default; only their length matters here."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=words)) for _ in range(count)]


def zipf(names: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Draws ``count`` names by Zipf's law: the r-th is drawn 1/r as often as the first."""
    return rng.choices(names, [1 / rank for rank in range(1, len(names) + 1)], k=count)


@contextmanager
def running_server(
    engine: str, extra: Sequence[str], fill: Callable[[Path], None] = lambda _: None
) -> Generator[tuple[str, float], None, None]:
    """Starts ``abmll serve`` on a free port; yields its address and the seconds until it was ready.

    Args:
        engine: vllm or torch.
        extra: Further options.
        fill: Called with the store's folder before the start.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        fill(store)
        server = LocalServer(engine, store, Path(folder) / "log", extra)
        try:
            yield server.url, server.start()
        finally:
            server.stop()


def _body(prompt: str, options: list[str]) -> dict[str, Any]:
    return {"prompt": prompt, "options": options, "draws": DRAWS, "seed": 0}


def latency(url: str, options: list[str], count: int) -> dict[str, float]:
    """Milliseconds of one client asking ``count`` questions in turn: p50, p95, and outside the engine."""
    with httpx.Client(base_url=url, timeout=60) as client:
        totals: list[float] = []
        outside: list[float] = []
        for number, prompt in enumerate(prompts(count + 5, seed=1)):
            begin = time.perf_counter()
            reply = client.post("/generate", json=_body(prompt, options)).raise_for_status().json()
            elapsed = 1000 * (time.perf_counter() - begin)
            if number >= 5:
                totals.append(elapsed)
                outside.append(elapsed - reply["timing"]["engine_ms"])
    cuts = statistics.quantiles(totals, n=20)
    return {"p50": statistics.median(totals), "p95": cuts[-1], "outside": statistics.median(outside)}


def repeats(url: str, rounds: int = 12) -> dict[str, float]:
    """Milliseconds (medians) of a long new question, two more with the same beginning, and the first one again."""
    rng = random.Random(11)
    found: dict[str, list[float]] = {"new": [], "second": [], "third": [], "again": []}
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(rounds):
            beginning = " ".join(rng.choices(_WORDS, k=280))
            first, second, third = (f"{beginning} {' '.join(rng.choices(_WORDS, k=20))}" for _ in range(3))
            for kind, prompt in zip(found, (first, second, third, first), strict=True):
                begin = time.perf_counter()
                client.post("/generate", json=_body(prompt, WORKLOADS["labels"])).raise_for_status()
                if number:
                    found[kind].append(1000 * (time.perf_counter() - begin))
    return {kind: statistics.median(values) for kind, values in found.items()}


async def _ask_all(url: str, questions: Sequence[str], options: list[str]) -> float:
    queue = list(questions)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def work() -> None:
            while queue:
                reply = await client.post("/generate", json=_body(queue.pop(), options))
                reply.raise_for_status()

        begin = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(CLIENTS)))
        return len(questions) / (time.perf_counter() - begin)


class PeftLoop:
    """The usual way: load the draws as PEFT adapters, switch between them, prompts in batches."""

    def __init__(self, posterior_folder: Path, model: str) -> None:
        import torch
        from peft import PeftModel

        from abmll.draws import draw, save_adapter
        from abmll.store import load_posterior
        from training.base_model import load_base

        posterior = load_posterior(posterior_folder).posterior
        self.torch, self.template = torch, posterior.config.template
        base = load_base(model)
        self.tokenizer = base.tokenizer
        with tempfile.TemporaryDirectory() as folder:
            for index in range(DRAWS):
                save_adapter(draw(posterior, 0, index), posterior, Path(folder) / str(index))
            lora: Any = PeftModel.from_pretrained(base.model, str(Path(folder) / "0"), adapter_name="0")
            for index in range(1, DRAWS):
                lora.load_adapter(str(Path(folder) / str(index)), adapter_name=str(index))
        self.model = lora.eval()

    def answer(self, questions: Sequence[str], options: list[str]) -> Any:
        """Option log-probabilities, shape (draws, questions, options)."""
        torch = self.torch
        encoded = [self.tokenizer.encode(self.template.option(o), add_special_tokens=False) for o in options]
        single = all(len(option) == 1 for option in encoded)
        rows: list[list[int]] = []
        starts: list[int] = []
        for question in questions:
            prompt = self.tokenizer.encode(self.template.prompt(question))
            for option in [[]] if single else encoded:
                rows.append(prompt + option)
                starts.append(len(prompt))
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        results: list[Any] = []
        with torch.inference_mode():
            for index in range(DRAWS):
                self.model.set_adapter(str(index))
                logits = self.model(input_ids=ids, attention_mask=mask).logits
                if single:
                    last = torch.tensor(starts) - 1
                    picked = logits[torch.arange(len(rows)), last].log_softmax(-1)
                    results.append(picked[:, [option[0] for option in encoded]])
                    continue
                scores: list[Any] = []
                for row, start in enumerate(starts):
                    option = encoded[row % len(encoded)]
                    log_probs = logits[row, start - 1 : start - 1 + len(option)].log_softmax(-1)
                    scores.append(log_probs[torch.arange(len(option)), torch.tensor(option)].sum())
                results.append(torch.stack(scores).view(len(questions), len(encoded)))
        return torch.stack(results)

    def rate(self, questions: Sequence[str], options: list[str]) -> float:
        """Answers per second, in batches of as many prompts as the server has clients."""
        begin = time.perf_counter()
        for start in range(0, len(questions), CLIENTS):
            self.answer(questions[start : start + CLIENTS], options)
        return len(questions) / (time.perf_counter() - begin)


def throughput(url: str, loop: PeftLoop, options: list[str], count: int, rounds: int) -> tuple[float, float]:
    """Answers per second of server and PEFT loop over the same new prompts: medians of alternating rounds."""
    served: list[float] = []
    looped: list[float] = []
    for number in range(rounds + 1):
        questions = prompts(count, seed=100 + number)
        one, other = asyncio.run(_ask_all(url, questions, options)), loop.rate(questions, options)
        if number:
            served.append(one)
            looped.append(other)
    return statistics.median(served), statistics.median(looped)


def _store_of(tasks: int) -> Callable[[Path], None]:
    """Writes tasks whose weights differ; what they say does not matter here."""

    def fill(store: Path) -> None:
        import torch

        from abmll.store import Record, load_posterior
        from server.store import TaskStore
        from training.embedded import POSTERIOR

        prior = load_posterior(POSTERIOR)
        kept = TaskStore(store, prior)
        for number in range(tasks):
            noise = torch.Generator().manual_seed(number)
            posterior = prior.posterior.map(lambda t, g=noise: t + 1e-3 * torch.randn(t.shape, generator=g))
            record = Record(task=f"task-{number}", version=1, shots=16)
            kept.add(f"task-{number}", posterior, prior.calibration, lambda _, record=record: record)

    return fill


async def _zipf(url: str, tasks: int, count: int, seed: int) -> list[float]:
    """Seconds of each of ``count`` questions of as many clients as elsewhere; the r-th task is asked 1/r as often."""
    rng, options = random.Random(seed), WORKLOADS["labels"]
    names = [f"task-{number}" for number in range(tasks)]
    queue = list(zip(prompts(count, seed), zipf(names, count, rng), strict=True))
    seconds: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def work() -> None:
            while queue:
                prompt, task = queue.pop()
                begin = time.perf_counter()
                reply = await client.post("/generate", json=_body(prompt, options) | {"task": task})
                reply.raise_for_status()
                seconds.append(time.perf_counter() - begin)

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return seconds


def many_tasks(engine: str, counts: Sequence[int], questions: int) -> list[dict[str, float]]:
    """Answers per second and p95 in ms with each number of tasks, Zipf traffic; after as many warm-up questions."""
    rows: list[dict[str, float]] = []
    with running_server(engine, [], _store_of(max(counts))) as (url, _):
        for tasks in counts:
            asyncio.run(_zipf(url, tasks, questions, seed=1))
            begin = time.perf_counter()
            seconds = asyncio.run(_zipf(url, tasks, questions, seed=2))
            rate = questions / (time.perf_counter() - begin)
            p95 = 1000 * statistics.quantiles(seconds, n=20)[-1]
            rows.append({"tasks": tasks, "rate": rate, "p50": 1000 * statistics.median(seconds), "p95": p95})
    return rows


def _over(layers: str, folder: Path) -> Path:
    """Writes a posterior of the embedded one's shape over some of the blocks; what it says does not matter here."""
    from abmll.layers import attach, init_posterior
    from abmll.store import Record, load_posterior, save_posterior
    from training.base_model import load_base
    from training.embedded import POSTERIOR, resolve

    config = load_posterior(POSTERIOR).posterior.config.model_copy(update={"layers": layers})
    base = load_base(resolve(None))
    save_posterior(folder, init_posterior(attach(base.model, config.targets, layers), config, 0), Record())
    return folder


def trunks(choices: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Milliseconds (medians, one client) of new questions with 1 and with ``DRAWS`` draws, torch engine.

    Each choice of blocks has a server of its own, all at the same time; they are asked in turn.
    """
    with ExitStack() as stack:
        clients: list[httpx.Client] = []
        for layers in choices:
            folder = _over(layers, Path(stack.enter_context(tempfile.TemporaryDirectory())) / "posterior")
            url, _ = stack.enter_context(running_server("torch", ["--posterior", str(folder)]))
            clients.append(stack.enter_context(httpx.Client(base_url=url, timeout=60)))
        seconds: dict[tuple[str, int], list[float]] = {}
        for prompt in prompts(count, seed=5):
            for layers, client in zip(choices, clients, strict=True):
                for draws in (1, DRAWS):
                    body = _body(prompt, WORKLOADS["labels"]) | {"draws": draws}
                    begin = time.perf_counter()
                    client.post("/generate", json=body).raise_for_status()
                    seconds.setdefault((layers, draws), []).append(time.perf_counter() - begin)
    median = {key: 1000 * statistics.median(values[5:]) for key, values in seconds.items()}
    return [{"layers": layers, "one": median[layers, 1], "all": median[layers, DRAWS]} for layers in choices]


def adaptation_seconds(url: str) -> float:
    """Seconds from POST /adapt with 16 examples until the task can be asked."""
    options = WORKLOADS["labels"]
    examples = [
        {"prompt": prompt, "options": options, "answer": number % 4} for number, prompt in enumerate(prompts(16, 7))
    ]
    with httpx.Client(base_url=url, timeout=60) as client:
        begin = time.perf_counter()
        reply = client.post("/adapt", json={"task": f"bench-{int(begin)}", "examples": examples})
        job = reply.raise_for_status().json()["job"]
        while (state := client.get(f"/adapt/{job}").json())["status"] not in ("done", "failed", "cancelled"):
            time.sleep(0.05)
        if state["status"] != "done":
            raise RuntimeError(f"adaptation ended {state['status']}: {state['error']}")
        client.post("/generate", json=_body("now", options) | {"task": state["task"]}).raise_for_status()
        return time.perf_counter() - begin


def _timed(function: Callable[[], float]) -> list[float]:
    return [function(), function()]


def _speed(engines: Sequence[str], count: int, rounds: int) -> None:
    from training.embedded import POSTERIOR, resolve

    loop = PeftLoop(POSTERIOR, resolve(None))
    results: dict[str, dict[str, Any]] = {}
    for engine in engines:
        with running_server(engine, []) as (url, ready):
            row: dict[str, Any] = {"ready_s": ready}
            for name, options in WORKLOADS.items():
                row[f"latency_{name}"] = latency(url, options, 60)
                row[f"rate_{name}"] = throughput(url, loop, options, count, rounds)
            row["repeats"] = repeats(url)
            row["adapt_s"] = _timed(lambda url=url: adaptation_seconds(url))
        results[engine] = row
    print(f"\n/generate over HTTP, embedded model, {DRAWS} draws, 4 options; ms for one client")
    print("| engine | ready s | options | p50 | p95 | outside the engine | answers/s, 16 clients | PEFT loop | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for engine, row in results.items():
        for name in WORKLOADS:
            lat, (served, looped) = row[f"latency_{name}"], row[f"rate_{name}"]
            print(
                f"| {engine} | {row['ready_s']:.1f} | {name} | {lat['p50']:.0f} | {lat['p95']:.0f} | "
                f"{lat['outside']:.1f} | {served:.1f} | {looped:.1f} | {served / looped:.2f} |"
            )
    print("\nA question of 300 words, one client, ms: new; a second, a third with its first 280 words; the first again")
    for engine, row in results.items():
        print(f"- {engine}: " + ", ".join(f"{value:.0f}" for value in row["repeats"].values()))
    print("\n/adapt with 16 examples, request to first answer, seconds (first, second)")
    for engine, row in results.items():
        print(f"- {engine}: " + ", ".join(f"{value:.1f}" for value in row["adapt_s"]))
    print(json.dumps(results), file=sys.stderr)


def _tasks(engines: Sequence[str], counts: Sequence[int], questions: int) -> None:
    print(f"\nMany tasks under Zipf traffic, {CLIENTS} clients, {DRAWS} draws, 4 options of one token")
    print("| engine | tasks | answers/s | p50 ms | p95 ms |")
    print("|---|---|---|---|---|")
    for engine in engines:
        for row in many_tasks(engine, counts, questions):
            print(f"| {engine} | {row['tasks']} | {row['rate']:.1f} | {row['p50']:.0f} | {row['p95']:.0f} |")


def main() -> None:
    """Prints the tables."""
    from training.provenance import provenance

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["torch", "vllm"])
    parser.add_argument("--count", type=int, default=96, help="questions in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100], help="numbers of tasks asked at once")
    parts = ["speed", "tasks", "trunk"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help="what to measure")
    arguments = parser.parse_args()
    print(provenance())
    if "speed" in arguments.parts:
        _speed(arguments.engines, arguments.count, arguments.rounds)
    if "tasks" in arguments.parts:
        _tasks(arguments.engines, arguments.tasks, 4 * arguments.count)
    if "trunk" in arguments.parts:
        print(f"\nPosteriors over some of the blocks, torch engine, one client, ms: 1 draw, {DRAWS} draws")
        print(f"| layers | 1 draw | {DRAWS} draws | ratio |")
        print("|---|---|---|---|")
        for row in trunks(["all", "top-50%", "last"], arguments.count):
            print(f"| {row['layers']} | {row['one']:.1f} | {row['all']:.1f} | {row['all'] / row['one']:.2f} |")


if __name__ == "__main__":
    main()
