"""Scores of lm-polygraph's own estimators, run by the Python of an environment that has it: JSON in, JSON out.

Not imported by the rest: ``training.benchmark.texts`` runs this file, since lm-polygraph wants other versions than we.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Reads statistics of answers from the standard input, writes each estimator's uncertainties."""
    import numpy as np
    from lm_polygraph.estimators import (  # pyright: ignore[reportMissingImports] -- in its own environment
        LexicalSimilarity,
        MaximumSequenceProbability,
        MeanTokenEntropy,
        MonteCarloSequenceEntropy,
        Perplexity,
    )

    told: dict[str, list[Any]] = json.load(sys.stdin)
    stats = {name: [np.array(each) for each in told[name]] for name in ("greedy_log_likelihoods", "entropy")}
    stats |= {name: told[name] for name in ("sample_texts", "sample_log_probs")}
    estimators = (
        MaximumSequenceProbability(),
        Perplexity(),
        MeanTokenEntropy(),
        MonteCarloSequenceEntropy(),
        LexicalSimilarity("rougeL"),
    )
    json.dump({str(each): np.asarray(each(stats)).tolist() for each in estimators}, sys.stdout)


if __name__ == "__main__":
    main()
