"""What `abmll doctor` finds: a line a check, each check kept from breaking the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: ok; warn: it works, but see; fail: serving will not work.
        detail: What was found.
        mend: What to do; empty where it is ok.
    """

    name: str
    status: Status
    detail: str
    mend: str = ""


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Runs a check; whatever it raises is a finding too."""
    try:
        return list(check())
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return [Finding(name, "warn", f"could not be looked at ({what})", "look at it yourself")]
