"""The command ``abmll``: where the packages' commands come together.

Signatures stand here; whatever needs torch or vLLM is imported inside, so that ``--help`` stays quick.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import clients.cli
import server.keys
import training.cli
from abmll.errors import AbmllError, EngineFailure


def serve_command(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    engine: Annotated[
        Literal["vllm", "torch"] | None,
        typer.Option(show_default="vllm where it is installed", help="What runs the model."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(show_default="the embedded one", help="Base model: hub name or folder.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or tag of the base model on the hub.")] = None,
    posterior: Annotated[
        Path | None, typer.Option(show_default="the embedded one", help="Folder of the global posterior.")
    ] = None,
    store: Annotated[
        Path, typer.Option(envvar="ABMLL_STORE", help="Folder of task posteriors and adaptation jobs.")
    ] = Path("abmll-store"),
    draws: Annotated[int, typer.Option(min=1, help="Draws of a question that says none.")] = 8,
    max_draws: Annotated[int, typer.Option(min=1, help="Most draws that a question may ask for.")] = 64,
    context: Annotated[
        int | None,
        typer.Option(min=16, show_default="the model's limit", help="Longest prompt and answer, in tokens."),
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the torch engine; auto: a GPU if there is one.")] = "auto",
    adapt_device: Annotated[
        str, typer.Option(help="Device of adaptation, such as cuda:1; vLLM takes the whole of its own GPU.")
    ] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Base weights of the torch engine and of adaptation."),
    ] = "float32",
    vllm_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An argument of vLLM's engine, such as gpu_memory_utilization=0.5; may be given several times.",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions in the engine at a time.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Questions that may wait for it; 429 past that.")] = 512,
    job_queue: Annotated[int, typer.Option(min=1, help="Adaptation jobs that may wait; 429 past that.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a question is given up; 504.")] = 60.0,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest body of a request, in bytes.")] = 16 << 20,
    cache: Annotated[
        int, typer.Option(min=1 << 20, help="Bytes of posteriors to keep in memory, and as many of draws.")
    ] = 1 << 30,
    feedback_kept: Annotated[int, typer.Option(min=1, help="Newest answers that feedback can be given on.")] = 200_000,
    keys: Annotated[
        Path | None,
        typer.Option(
            envvar="ABMLL_KEY_FILE",
            show_default="everybody may do everything",
            help="File of API keys, as `abmll keys add` makes it.",
        ),
    ] = None,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="Least severe log.")] = "info",
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Lines for people, or one JSON object each.")
    ] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write the questions into the log.")] = False,
) -> None:
    """Serve the model over HTTP."""
    from pydantic import ValidationError

    from server.run import run
    from server.settings import Settings
    from server.vllm_setup import parse_options

    try:
        settings = Settings.model_validate(
            {
                "host": host,
                "port": port,
                "engine": engine or _installed_engine(),
                "model": model,
                "revision": revision,
                "posterior": posterior,
                "store": store,
                "draws": draws,
                "max_draws": max_draws,
                "context": context,
                "device": device,
                "adapt_device": adapt_device,
                "dtype": dtype,
                "vllm_options": parse_options(vllm_option or []),
                "concurrency": concurrency,
                "queue": queue,
                "job_queue": job_queue,
                "timeout": timeout,
                "max_body": max_body,
                "cache": cache,
                "feedback_kept": feedback_kept,
                "keys": keys,
                "log_level": log_level,
                "log_format": log_format,
                "log_prompts": log_prompts,
            }
        )
    except ValidationError as error:
        raise typer.BadParameter("; ".join(problem["msg"] for problem in error.errors())) from error
    raise typer.Exit(run(settings))


def create_cli() -> typer.Typer:
    """Returns the command line with all commands."""
    app = typer.Typer(
        name="abmll",
        help="Language-model answers with a calibrated confidence.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.command("serve")(serve_command)
    clients.cli.register(app)
    training.cli.register(app)
    server.keys.register(app)
    return app


def main() -> None:
    """Runs the command line; an error of ours is one line, with status 1 (the engine's) or 2 (the input's)."""
    try:
        create_cli()()
    except AbmllError as error:
        print(f"abmll: {error.message}", file=sys.stderr)
        sys.exit(1 if isinstance(error, EngineFailure) else 2)
    except BrokenPipeError:  # `abmll ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _installed_engine() -> Literal["vllm", "torch"]:
    return "torch" if importlib.util.find_spec("vllm") is None else "vllm"


if __name__ == "__main__":
    main()
