"""The command ``abmll plan``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from abmll.posterior import PosteriorConfig
    from server.gpus import Gpu
    from server.serving_plan import ServingPlan
    from training.plan import TrainingPlan

# Of what the maker says: a LoRA step of Llama-3-8B's shape took 163 ms on an H100 for 57 TFLOP.
_REACHED = 0.35


def plan_command(
    model: Annotated[
        str | None,
        typer.Option(help="Base model: hub name, or a folder with its config.json. Default: the embedded small one."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or tag of the base model on the hub.")] = None,
    family: Annotated[
        Literal["kronecker", "lowrank", "subspace"], typer.Option(help="Family of the posterior.")
    ] = "kronecker",
    targets: Annotated[str, typer.Option(help="Modules whose weights are Gaussian, joined by commas.")] = (
        "q_proj,v_proj"
    ),
    rank: Annotated[
        int | None, typer.Option(min=1, max=256, show_default="the family's", help="Rank of the mean.")
    ] = None,
    layers: Annotated[str, typer.Option(help="Blocks that are Gaussian: all, last, or such as top-25%.")] = "all",
    rows: Annotated[int, typer.Option(min=1, help="Examples in a gradient step.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each, and of a question with its answer.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of an adaptation.")] = 10,
    draws: Annotated[int, typer.Option(min=1, help="Draws of a question.")] = 8,
    slots: Annotated[int, typer.Option(min=1, help="Draws that run in one step of vLLM.")] = 33,
    gpu: Annotated[str, typer.Option(help="GPU: h100, h200, a100-80gb, l4, ...")] = "h100",
    utilization: Annotated[float, typer.Option(min=0.05, max=1, help="Part of the GPU that vLLM takes.")] = 0.9,
    reached: Annotated[float, typer.Option(min=0.01, max=1, help="Part of the GPU's speed that is reached.")] = (
        _REACHED
    ),
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the base weights.")] = "bfloat16",
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Activations are computed again in the backward pass.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON document.")] = False,
) -> None:
    """Say what training and serving take, from the model's configuration alone: memory, operations, time."""
    import torch

    from abmll.posterior import PosteriorConfig
    from server.gpus import find_gpu
    from server.serving_plan import plan_serving
    from training.embedded import NAME, resolve
    from training.plan import plan_training, read_config
    from training.settings import checked

    chosen, name = find_gpu(gpu), model or NAME
    config = read_config(resolve(model), revision)
    given = {"base_model": name, "family": family, "targets": tuple(targets.split(",")), "layers": layers}
    posterior = checked(PosteriorConfig, given | ({} if rank is None else {"rank": rank}))
    weights: torch.dtype = getattr(torch, dtype)
    training = plan_training(config, posterior, rows=rows, tokens=tokens, dtype=weights, checkpointing=checkpointing)
    serving = plan_serving(
        config, posterior, draws=draws, slots=slots, tokens=tokens, memory=chosen.memory, utilization=utilization,
        dtype=weights,
    )  # fmt: skip
    seconds = training.step_flops / (reached * chosen.flops)
    if as_json:
        document = {
            "model": name,
            "posterior": posterior.model_dump(),
            "gpu": {"name": gpu} | chosen.model_dump(),
            "training": training.model_dump() | {"peak": training.peak, "step_seconds": seconds},
            "serving": serving.model_dump(),
            "commands": _commands(name, posterior, draws, dtype, checkpointing),
        }
        typer.echo(json.dumps(document, indent=2))
        return
    _print(name, posterior, training, serving, gpu, chosen, seconds, steps)
    typer.echo("\n".join(_commands(name, posterior, draws, dtype, checkpointing)))


def _print(
    name: str,
    posterior: PosteriorConfig,
    training: TrainingPlan,
    serving: ServingPlan,
    gpu: str,
    chosen: Gpu,
    seconds: float,
    steps: int,
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}, {posterior.family} posterior over {', '.join(posterior.targets)}, one {gpu}",
                  title_justify="left")  # fmt: skip
    table.add_column("what")
    table.add_column("takes", justify="right")
    rows = [
        ("base model, parameters", f"{training.base_parameters:,}"),
        ("posterior, parameters", f"{training.posterior_parameters:,}"),
        None,
        ("training: base weights", _size(training.base)),
        ("training: global posterior, gradient, optimizer", _size(training.theta)),
        ("training: task posterior, optimizer", _size(training.phi)),
        ("training: activations, gradients and KL of a step", _size(training.step)),
        ("training: together, at its peak", _size(training.peak)),
        ("training: a step", f"{training.step_flops / 1e12:,.2f} TFLOP"),
        (f"training: a step on one {gpu}, at the speed of plain LoRA", _time(seconds)),
        (f"adaptation: {steps} steps, and four times that for the task's temperature", _time(5 * steps * seconds)),
        None,
        ("serving: base weights", _size(serving.weights)),
        ("serving: one draw", _size(serving.adapter)),
        ("serving: draws that run in one step", _size(serving.slots)),
        ("serving: keys and values of a token", _size(serving.kv_token)),
        ("serving: room for keys and values", _size(serving.kv_room)),
        ("serving: questions at a time, all draws of each", f"{serving.questions:,}"),
    ]
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    for what, taken in (("training", training.peak), ("serving", serving.weights + serving.slots)):
        if taken > chosen.memory:
            console.print(f"{what} does not fit on one {gpu} ({_size(chosen.memory)})", markup=False)


def _commands(name: str, posterior: PosteriorConfig, draws: int, dtype: str, checkpointing: bool) -> list[str]:
    trained = f"abmll train --tasks TASKS --model {name} --family {posterior.family} --dtype {dtype}"
    trained += f" --targets {','.join(posterior.targets)} --rank {posterior.rank}"
    trained += " --gradient-checkpointing" if checkpointing else ""
    return [
        f"{trained} --out posterior",
        f"abmll serve --model {name} --posterior posterior --dtype {dtype} --draws {draws}",
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"
