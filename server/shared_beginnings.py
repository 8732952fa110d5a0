"""Tells how much of a prompt other prompts begin with too: instructions, a document, labelled examples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

# Beginnings are told apart in steps of so many tokens; shorter ones than LEAST are read as fast as kept.
STEP, LEAST = 32, 64


class SharedBeginnings:
    """The beginnings of the newest prompts, as hashes, and where prompts part.

    A prompt that is asked again is no shared beginning: to keep it would take memory for nothing.

    Args:
        limit: Most beginnings to remember.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self.limit = limit
        # A beginning to how it went on; None where it has gone on in several ways.
        self._seen: OrderedDict[int, int | None] = OrderedDict()

    def shared(self, scope: Hashable, prompt: Sequence[int]) -> int:
        """Returns how many of a prompt's first tokens others had too that went on differently; remembers the prompt.

        At least one token is not counted: the model must read it to go on.

        Args:
            scope: What keys and values depend on beside the tokens.
            prompt: The tokens.
        """
        found, chain = 0, hash(scope)
        for end in range(STEP, len(prompt), STEP):
            chain = hash((chain, *prompt[end - STEP : end]))
            onward = hash(tuple(prompt[end : end + STEP]))
            if chain in self._seen and self._seen[chain] != onward:
                found, self._seen[chain] = end, None
            else:
                self._seen[chain] = onward
            self._seen.move_to_end(chain)
        while len(self._seen) > self.limit:
            self._seen.popitem(last=False)
        return found if found >= LEAST else 0
