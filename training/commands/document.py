"""Results as one JSON document on stdout."""

from __future__ import annotations

from typing import Any

import typer
from pydantic_core import to_json


def print_json(document: Any) -> None:
    """Prints a document; what is not a number, as the AUROC of answers that are all right, is null."""
    typer.echo(to_json(document, indent=2, inf_nan_mode="null").decode())
