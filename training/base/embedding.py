"""Token embeddings from co-occurrence counts, a start for the small base model.

A positive pointwise mutual information matrix, factorized by SVD, holds much of the lexical meaning
that word2vec finds (Levy & Goldberg 2014; smoothing and weights from Levy, Goldberg & Dagan 2015).
Counting the whole corpus takes minutes where the language model sees only a part of it in an hour.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def cooccurrence(tokens: np.ndarray, vocabulary: int, window: int, chunk: int = 20_000_000) -> Tensor:
    """Counts token pairs at most ``window`` apart, weighted by 1 / distance.

    Args:
        tokens: Token ids, shape (n,).
        vocabulary: Number of token ids.
        window: Largest distance.
        chunk: Tokens counted at a time.

    Returns:
        Symmetric counts, shape (vocabulary, vocabulary), float32.
    """
    counts = np.zeros(vocabulary * vocabulary, dtype=np.float32)
    for start in range(0, len(tokens), chunk):
        piece = np.asarray(tokens[start : start + chunk], dtype=np.int64)
        for distance in range(1, window + 1):
            pairs = piece[:-distance] * vocabulary + piece[distance:]
            counts += np.bincount(pairs, minlength=vocabulary * vocabulary).astype(np.float32) / distance
    matrix = torch.from_numpy(counts.reshape(vocabulary, vocabulary))
    return matrix + matrix.T


def ppmi_embedding(counts: Tensor, width: int, *, smoothing: float = 0.75, seed: int = 0) -> Tensor:
    """Factorizes counts into embeddings.

    Args:
        counts: Symmetric co-occurrence counts, shape (v, v).
        width: Embedding width.
        smoothing: Exponent of the context distribution.
        seed: Seed of the randomized SVD.

    Returns:
        Embeddings with rows of unit norm, shape (v, width), float32.
    """
    row = counts.sum(1).clamp_min(1e-6)
    context = row**smoothing
    context = context / context.sum()
    ppmi = counts / row[:, None] / context[None, :]
    ppmi = ppmi.clamp_min_(1.0).log_()
    torch.manual_seed(seed)
    # The first directions mostly tell frequent from rare tokens; they are kept, but damped by the square root.
    u, s, _ = torch.svd_lowrank(ppmi, q=width + 16, niter=4)
    embedding = u[:, :width] * s[:width].sqrt()
    embedding = embedding - embedding.mean(0)
    return torch.nn.functional.normalize(embedding, dim=1)
