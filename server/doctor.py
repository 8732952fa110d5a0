"""The command ``abmll doctor``: whether a server would run here, and what to mend."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.options import ConfigFile, load_settings, with_settings
from server.settings import Settings

if TYPE_CHECKING:
    from server.findings import Finding

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def register(app: typer.Typer) -> None:
    """Adds ``abmll doctor`` to the command line."""
    app.command("doctor")(with_settings(doctor_command))


def doctor_command(
    options: dict[str, Any],
    *,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Check whether a server would run here; status 1 if something fails.

    Takes the options of `abmll serve`, and looks at what they name.
    """
    findings = examine(options, config)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        _print(findings)
    raise typer.Exit(int(any(finding.status == "fail" for finding in findings)))


def examine(options: dict[str, Any], config: Path | None) -> list[Finding]:
    """Looks at everything; the slow imports go on beside the rest."""
    from abmll.errors import AbmllError
    from clients.config import InvalidSettings
    from server import machine_checks, service_checks
    from server.findings import Finding, guarded

    findings: list[Finding] = []
    try:
        settings = load_settings(options, config).settings
    except (InvalidSettings, AbmllError) as error:
        findings.append(Finding("settings", "fail", str(error), "mend it; what follows is for the defaults"))
        settings = Settings()
    probe = service_checks.start_probe(settings)
    vllm = machine_checks.start_vllm()
    cluster = service_checks.start_cluster(settings)
    try:
        checks: dict[str, Callable[[], Iterable[Finding]]] = {
            "environment": partial(service_checks.environment, config) if not findings else list,
            "packages": partial(machine_checks.packages, settings),
            "machine": partial(machine_checks.machine, settings),
            "store": partial(service_checks.store, settings),
            "port": partial(service_checks.port, settings),
            "keys": partial(service_checks.keys, settings),
            "model": partial(service_checks.hub, settings),
            "engines": partial(machine_checks.engines, settings, probe, vllm),
            "posterior": partial(service_checks.posterior, settings, probe),
            "cluster": partial(service_checks.cluster, settings, cluster),
        }
        for name, check in checks.items():
            findings += guarded(name, check)
    finally:
        for child in (probe, vllm, cluster):
            if child is not None:
                child.end()
    return findings


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in findings:
        told = Text(finding.detail)
        if finding.mend:
            told.append(f"\n→ {finding.mend}", "bold")
        grid.add_row(Text(finding.status, _STYLES[finding.status]), Text(finding.name), told)
    Console(highlight=False).print(grid)
