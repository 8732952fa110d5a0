"""Names in a store: of a version's folder, of the file that says which versions answer."""

from __future__ import annotations

import re

SERVING = "serving.json"
_VERSION = re.compile(r"^v(\d{4,})$")


def version_name(number: int) -> str:
    """Name of a version's folder."""
    return f"v{number:04d}"


def version_number(name: str) -> int | None:
    """Number of the version that a folder's name stands for; None for another folder."""
    match = _VERSION.match(name)
    return int(match[1]) if match else None
