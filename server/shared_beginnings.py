"""Tells how much of a prompt has been asked before, as the beginning of another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

# Beginnings are told apart in steps of so many tokens; shorter ones than LEAST are read as fast as kept.
STEP, LEAST = 32, 64


class SharedBeginnings:
    """The beginnings of the newest prompts, as hashes.

    Args:
        limit: Most beginnings to remember.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self.limit = limit
        self._seen: OrderedDict[int, None] = OrderedDict()

    def shared(self, scope: Hashable, prompt: Sequence[int]) -> int:
        """Returns how many of a prompt's first tokens an earlier prompt of the scope had too, and remembers the prompt.

        At least one token is not counted: the model must read it to go on.

        Args:
            scope: What keys and values depend on beside the tokens.
            prompt: The tokens.
        """
        found, chain = 0, hash(scope)
        for end in range(STEP, len(prompt), STEP):
            chain = hash((chain, *prompt[end - STEP : end]))
            if chain in self._seen:
                found = end
            self._seen[chain] = None
            self._seen.move_to_end(chain)
        while len(self._seen) > self.limit:
            self._seen.popitem(last=False)
        return found if found >= LEAST else 0
