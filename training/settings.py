"""Settings from outside, read and checked: every error is one line that names the setting."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from abmll.errors import AbmllError

M = TypeVar("M", bound=BaseModel)
# Seeds lie below it: what a JSON number holds exactly.
SEED_LIMIT = 2**53
# Gradient steps of an adaptation, at most.
MAX_STEPS = 1000


def read_toml(path: Path | None) -> dict[str, Any]:
    """Reads a TOML file of settings; none for None.

    Raises:
        AbmllError: The file is missing or malformed.
    """
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not TOML, or not UTF-8
        raise AbmllError(f"cannot read settings from {path}: {error}", field="config") from error


def pop_table(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Takes a table out of settings that were read from a file; empty where there is none.

    Raises:
        AbmllError: It is no table.
    """
    table = values.pop(name, {})
    if not isinstance(table, dict):
        raise AbmllError(
            f"setting {name} is {table!r}; make it a table, [{name}], with settings of its own", field=name
        )
    return table


def checked(model: type[M], values: Mapping[str, Any]) -> M:
    """Returns settings of a model.

    Raises:
        AbmllError: A value is out of range or of the wrong type, or there is no such setting.
    """
    try:
        return model.model_validate(values, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, _names(model), n=1, cutoff=0.5)
            mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(_names(model))}"
            raise AbmllError(f"there is no setting {where}; {mend}", field=where) from error
        said = first["msg"].removeprefix("Value error, ")
        if not where:  # of several settings together, which it names
            raise AbmllError(f"these settings do not go together: {said}") from error
        raise AbmllError(f"setting {where}: {said} (got {first['input']!r})", field=where) from error


def _names(model: type[BaseModel]) -> list[str]:
    """Names of all settings, those of nested models with their table before a point."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            found += [f"{name}.{inner}" for inner in _names(nested)]
        else:
            found.append(name)
    return found


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
            torch.zeros((), device=wanted).item()  # some devices hold no numbers
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
