"""The small base model and global posterior that abmll carries, for places without a download."""

from __future__ import annotations

from pathlib import Path

NAME = "abmll-small"
BASE = Path(__file__).parent / "base"
POSTERIOR = Path(__file__).parent / "posterior"


def resolve(model: str | None) -> str:
    """Returns where to load a base model from: the embedded one's folder for None or its name."""
    return str(BASE) if model in (None, NAME) else model
