"""How a free text is decoded: which token comes next, and where the text ends."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

# As vLLM has it: colder ones overflow.
COLDEST = 0.01


@dataclass(frozen=True)
class Sampling:
    """How a text is decoded.

    Attributes:
        max_tokens: The text ends after so many tokens at the latest.
        stop: It ends at the token whose text holds (the end of) one of these strings.
        temperature: Divides the logits; 0 takes the likeliest token, and what lies between is taken for ``COLDEST``.
        top_p: Only the likeliest tokens that together have this probability are chosen from (Holtzman et al. 2020).
        seed: Of the choice; the same seed makes the same text, as far as rounding goes.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def seed_of(self, draw: int | None) -> int:
        """Seed of the text under one draw, or under the mean."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{draw}".encode()).digest()[:7], "big")
