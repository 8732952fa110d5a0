"""Names of tasks."""

from __future__ import annotations

import re

from abmll.errors import InvalidRequest

GLOBAL = "global"
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"


def check_name(name: str, field: str = "task") -> None:
    """Checks that a task of this name can be made or changed.

    Raises:
        InvalidRequest: Not a task name, or the reserved one.
    """
    if not is_name(name):
        raise InvalidRequest(
            f"{name[:80]!r} is no task name; use 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit",
            field=field,
        )
    if name == GLOBAL:
        raise InvalidRequest("the task name 'global' is reserved for the global posterior; choose another", field=field)


def is_name(name: str) -> bool:
    """Whether a task can have this name."""
    return re.fullmatch(NAME_PATTERN, name) is not None
