"""What free text under draws costs beside plain greedy decoding, in the engine: ``python -m server.bench_text``."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Literal

from abmll.sampling import Sampling
from server.bench import DRAWS, prompts
from server.engine import Served
from server.loading import make_engine
from server.settings import Settings
from server.texts import LIKELY

# Tokens of a text; texts that warm up.
TOKENS, _WARM = 64, 3


async def measure(engine_name: Literal["torch", "vllm"], count: int) -> dict[str, float]:
    """Decodes ``count`` texts one after another, and scores each under ``DRAWS`` draws.

    Returns:
        ``rate``, tokens per second of decoding alone; ``scored``, what decoding and scoring take in units of decoding;
        ``told``, the same with the likeliest tokens in each place. Medians.
    """
    from abmll.scoring import tokenize
    from abmll.store import load_posterior
    from training.base_model import load_base
    from training.embedded import POSTERIOR, resolve

    stored, tokenizer = load_posterior(POSTERIOR), load_base(resolve(None)).tokenizer
    served = Served(stored.digest, stored.posterior)
    engine = make_engine(Settings.model_validate({"engine": engine_name}), stored.posterior.config)
    found: dict[str, list[float]] = {"rate": [], "scored": [], "told": []}
    await engine.start()
    try:
        for prompt in prompts(_WARM + count, seed=9):
            template = stored.posterior.config.template
            asked = tokenize(tokenizer, template, prompt, [], engine.context - TOKENS - 1).prompt
            begin = time.perf_counter()
            tokens = await engine.generate(served, asked, Sampling(TOKENS))
            plain = time.perf_counter() - begin
            found["rate"].append(len(tokens) / plain)
            for kind, others in (("scored", 0), ("told", LIKELY)):
                begin = time.perf_counter()
                await engine.score_tokens(served, asked, tokens, range(DRAWS), 0, others)
                found[kind].append(1 + (time.perf_counter() - begin) / plain)
    finally:
        await engine.close()
    return {kind: statistics.median(values[_WARM:]) for kind, values in found.items()}


def main() -> None:
    """Prints the table."""
    from training.provenance import provenance

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["torch", "vllm"], choices=["torch", "vllm"])
    parser.add_argument("--count", type=int, default=24, help="texts")
    arguments = parser.parse_args()
    print(provenance())
    print(f"\nFree text of {TOKENS} tokens, one client; with {DRAWS} draws, in units of plain greedy decoding")
    print("| engine | tokens/s, plain | scored | told token by token |")
    print("|---|---|---|---|")
    for engine in arguments.engines:
        row = asyncio.run(measure(engine, arguments.count))
        print(f"| {engine} | {row['rate']:.0f} | {row['scored']:.2f} | {row['told']:.2f} |")


if __name__ == "__main__":
    main()
