"""Command-line options that follow from settings: a field is an option, with its help, range and default."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_origin

import typer
from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from clients.command_line import is_typed
from server.settings import Settings

if TYPE_CHECKING:
    from clients.config import Loaded

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        show_default="$ABMLL_CONFIG, or abmll.toml here if there is one",
        help="TOML file of settings, as `abmll config init` makes it.",
    ),
]


def told(field: FieldInfo) -> tuple[str, str | None]:
    """Returns a field's description, and what to show as its default where the default itself says less."""
    text, _, default = (field.description or "").partition("; default: ")
    return text, default or None


def with_settings(run: Callable[..., None]) -> Callable[..., None]:
    """Makes a command of a function: its parameters, and an option for each setting of the server.

    Args:
        run: Takes what the options say, as a dictionary, before its own keyword parameters.
    """
    _, *own = inspect.signature(run, eval_str=True).parameters.values()
    names = [parameter.name for parameter in own]

    def command(ctx: typer.Context, **values: Any) -> None:
        mine = {name: values.pop(name) for name in names}
        run({name: value for name, value in values.items() if is_typed(ctx, name)}, **mine)

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *_parameters(), *own]
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__doc__ = run.__doc__
    return command


def load_settings(options: dict[str, Any], config: Path | None) -> Loaded[Settings]:
    """Reads the server's settings: from options, the environment, a file, else the defaults.

    Raises:
        InvalidSettings: A key is unknown, or a value of the wrong type or out of range.
        AbmllError: An option that takes NAME=VALUE has something else.
    """
    from clients.config import load

    for name, field in Settings.model_fields.items():
        if _several(field) and options.get(name) is not None:
            from server.vllm_setup import parse_options

            options = options | {name: parse_options(options[name], option_name(name, field))}
    engine = "torch" if importlib.util.find_spec("vllm") is None else "vllm"
    return load(Settings, "serve", options, config, {"engine": engine})


def _parameters() -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if _several(field) else field.default,
            annotation=Annotated[list[str] | None if _several(field) else field.annotation, _option(name, field)],
        )
        for name, field in Settings.model_fields.items()
    ]


def _several(field: FieldInfo) -> bool:
    """Says whether the option is given several times, NAME=VALUE each."""
    return get_origin(field.annotation) is dict


def option_name(name: str, field: FieldInfo) -> str:
    """How a setting is called on the command line."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return str(extra.get("option", "--" + name.replace("_", "-")))


def _option(name: str, field: FieldInfo) -> Any:
    text, default = told(field)
    option = option_name(name, field)
    several = _several(field)
    return typer.Option(
        f"{option}/--no-{option.removeprefix('--')}" if field.annotation is bool else option,
        help=text[:1].upper() + text[1:] + (", NAME=VALUE each; may be given several times." if several else "."),
        metavar="NAME=VALUE" if several else None,
        min=next((cast(float, bound.ge) for bound in field.metadata if isinstance(bound, Ge)), None),
        max=next((cast(float, bound.le) for bound in field.metadata if isinstance(bound, Le)), None),
        show_default=default or field.annotation is not bool,
    )
