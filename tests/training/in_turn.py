"""Runs commands one after the other in this process: ``python -m tests.training.in_turn FILE``.

Reads them as JSON, and writes what came of them into the file. The hub's client reads the environment when it is
imported, so that each environment needs a process; an import takes seconds, so that each command has none of its own.
``load POSTERIOR`` is the notebook's ``abmll.load``, ``look MODEL [REVISION]`` what the doctor says of a model.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

from abmll.errors import AbmllError
from server.cli import main
from tests.command_line import Ran


def run(arguments: list[str]) -> Ran:
    """Runs a command as the shell would."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if arguments[0] == "load":
                from training.notebook import load

                print(load(arguments[1]))
            elif arguments[0] == "look":
                from server.service_checks import hub
                from server.settings import Settings

                (found,) = hub(Settings.model_validate(dict(zip(("model", "revision"), arguments[1:], strict=False))))
                print(found.status, found.detail)
            else:
                sys.argv = ["abmll", *arguments]
                main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except AbmllError as error:
            code = 2
            print(f"abmll: {error.message}", file=sys.stderr)
        except BaseException:
            code = 1
            traceback.print_exc()
    return Ran(code, out.getvalue(), err.getvalue())


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    target = sys.argv[1]
    told = [vars(run(arguments)) for arguments in json.load(sys.stdin)]
    Path(target).write_text(json.dumps(told))
