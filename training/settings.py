"""Settings from outside, read and checked: every error is one line that names the setting."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from abmll.errors import AbmllError

M = TypeVar("M", bound=BaseModel)


def read_toml(path: Path | None) -> dict[str, Any]:
    """Reads a TOML file of settings; none for None.

    Raises:
        AbmllError: The file is missing or malformed.
    """
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise AbmllError(f"cannot read settings from {path}: {error}", field="config") from error


def checked(model: type[M], values: Mapping[str, Any]) -> M:
    """Returns settings of a model.

    Raises:
        AbmllError: A value is out of range or of the wrong type.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AbmllError(f"setting {where}: {first['msg']} (got {first['input']!r})", field=where) from error


def choose_device(wanted: str | None) -> str:
    """Returns a device, a GPU if there is one by default, and sets the allocator up for passes on the CPU.

    Raises:
        AbmllError: The device cannot be used.
    """
    import torch

    from training.allocator import keep_freed_memory

    keep_freed_memory()
    if wanted is not None:
        try:
            torch.empty(0, device=wanted)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise AbmllError(f"device {wanted!r} cannot be used: {reason}", field="device") from error
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def numbers(text: str, name: str) -> tuple[int, ...]:
    """Reads whole numbers joined by commas, sorted, each once.

    Raises:
        AbmllError: It is something else.
    """
    try:
        return tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError as error:
        raise AbmllError(f"--{name} {text!r} must be whole numbers joined by commas, such as 0,4,16") from error
