"""The commands ``abmll pretrain``, ``train``, ``adapt``, ``calibrate``, ``eval`` and ``bench``.

Signatures stand in their modules; whatever needs torch is imported inside, so that ``--help`` stays quick.
"""

from __future__ import annotations

import typer

from training.benchmark.command import bench_command
from training.commands.adapt import adapt_command
from training.commands.calibrate import calibrate_command
from training.commands.evaluate import eval_command
from training.commands.pretrain import pretrain_command
from training.commands.train import train_command


def register(app: typer.Typer) -> None:
    """Adds the training commands to the command line."""
    app.command("pretrain")(pretrain_command)
    app.command("train")(train_command)
    app.command("adapt")(adapt_command)
    app.command("calibrate")(calibrate_command)
    app.command("eval")(eval_command)
    app.command("bench")(bench_command)
