"""Settings from outside: an option, the environment, a TOML file, else the default; in this order the first counts."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError, TomlConfigSettingsSource

from clients.errors import ClientError

FILE = Path("abmll.toml")
FILE_VARIABLE = "ABMLL_CONFIG"
# Tables of the file, and how the names of environment variables begin.
PREFIXES = {"serve": "ABMLL_", "client": "ABMLL_CLIENT_"}
DEFAULT, OPTION = "default", "option"

M = TypeVar("M", bound=BaseModel)


class InvalidSettings(ClientError):
    """Settings that cannot be used; the message names where they stand."""


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """Settings, and where they come from.

    Attributes:
        settings: The settings.
        origins: By field: ``option``, an environment variable's name, a file's path, or ``default``.
    """

    settings: M
    origins: Mapping[str, str]


def find_file(named: Path | None = None) -> Path | None:
    """Returns the settings' file: the one named, ``$ABMLL_CONFIG``, or ``abmll.toml`` here; None where there is none.

    Raises:
        InvalidSettings: One is named that is not there.
    """
    variable = os.environ.get(FILE_VARIABLE)
    chosen = named or (Path(variable) if variable else None)
    if chosen is None:
        return FILE if FILE.is_file() else None
    if not chosen.is_file():
        where = "--config" if named else FILE_VARIABLE
        raise InvalidSettings(f"there is no file {chosen} ({where}); `abmll config init` makes one")
    return chosen


def variables(model: type[BaseModel], table: str) -> dict[str, tuple[str, ...]]:
    """Names of the environment variables of each field, the usual one first."""
    names: dict[str, tuple[str, ...]] = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        own = (str(extra["variable"]),) if "variable" in extra else ()
        names[name] = (*own, PREFIXES[table] + name.upper())
    return names


def load(
    model: type[M],
    table: str,
    options: Mapping[str, Any],
    file: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Loaded[M]:
    """Reads settings.

    Args:
        model: What they are.
        table: Their table in the file.
        options: What the command line says; None: nothing.
        file: The file that the command line names.
        defaults: In place of the model's own.

    Raises:
        InvalidSettings: A key is unknown, or a value of the wrong type or out of range.
    """
    given = {key: value for key, value in options.items() if value is not None}
    path = find_file(file)
    environment = _Environment(model, table)
    layers = [(defaults or {}, dict.fromkeys(defaults or {}, DEFAULT))]
    if path is not None:
        values = _read(path, model, table)
        layers.append((values, dict.fromkeys(values, str(path))))
    layers.append((environment.read(), environment.found))
    layers.append((given, dict.fromkeys(given, OPTION)))
    merged: dict[str, Any] = {}
    origins = dict.fromkeys(model.model_fields, DEFAULT)
    for values, where in layers:
        merged |= values
        origins |= where
    try:
        return Loaded(model.model_validate(merged), origins)
    except ValidationError as error:
        raise InvalidSettings(_told(error, model, table, origins)) from error


class _Environment(EnvSettingsSource):
    """The environment's values, and which variables they stand in."""

    def __init__(self, model: type[BaseModel], table: str) -> None:
        super().__init__(_outside(model), case_sensitive=True, env_ignore_empty=True)
        self.names = variables(model, table)
        self.found: dict[str, str] = {}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        for name in self.names[field_name]:
            value = self.env_vars.get(name)
            if value is not None:
                self.found[field_name] = name
                return value, field_name, False
        return None, field_name, False

    def read(self) -> dict[str, Any]:
        try:
            return self()
        except SettingsError as error:
            name = list(self.found.values())[-1]
            raise InvalidSettings(f'{name} is no JSON; give an object, such as {{"seed": 1}}') from error


def _outside(model: type[BaseModel]) -> type[BaseSettings]:
    """The model as pydantic-settings' sources take it; it is never built."""
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in model.model_fields.items()}
    return create_model(model.__name__, __base__=BaseSettings, **fields)


def _read(path: Path, model: type[BaseModel], table: str) -> dict[str, Any]:
    try:
        tables: dict[str, Any] = TomlConfigSettingsSource(_outside(model), path).toml_data
    except (OSError, ValueError) as error:
        kind = "is no TOML" if isinstance(error, tomllib.TOMLDecodeError) else "cannot be read"
        raise InvalidSettings(f"{path} {kind}: {error}") from error
    known = " and ".join(f"[{name}]" for name in PREFIXES)
    for name, values in tables.items():
        if name not in PREFIXES:
            raise InvalidSettings(f"{path}: {name} stands at the top; there are the tables {known}")
        if not isinstance(values, dict):
            raise InvalidSettings(f"{path}: {name} is {values!r}; it must be a table, [{name}]")
    return tables.get(table, {})


def _told(error: ValidationError, model: type[BaseModel], table: str, origins: Mapping[str, str]) -> str:
    """Says in one line what is wrong, where it stands, and what would be right."""
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    if not first["loc"]:
        named = [name for name in origins if re.search(rf"\b{name}\b", said)]
        outside = [f"; {name} is from {origins[name]}" for name in named if origins[name] not in (DEFAULT, OPTION)]
        return said + "".join(outside)
    name = str(first["loc"][0])
    where = _source(name, table, origins.get(name, DEFAULT))
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, model.model_fields, n=1)
        return f"{where} is no setting; " + (
            f"did you mean {close[0]}?" if close else "`abmll config init FILE` lists all"
        )
    key = "".join(f".{part}" for part in first["loc"][1:] if isinstance(part, str))
    secret = "Secret" in str(model.model_fields[name].annotation)
    return f"{where}{key} is {'wrong' if secret else repr(first['input'])}: {said}"


def _source(name: str, table: str, origin: str) -> str:
    if origin == OPTION:
        return "--" + name.replace("_", "-")
    return name if origin == DEFAULT else origin if origin in os.environ else f"{origin}: [{table}] {name}"
