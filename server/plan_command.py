"""The command ``abmll plan``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from abmll.posterior import PosteriorConfig
    from server.serving_plan import ServingPlan
    from training.plan import TrainingPlan

# What the server's engine takes of itself.
_SLOTS, _UTILIZATION = 33, 0.92
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
    episode: Annotated[
        int | None, typer.Option(min=1, show_default="train's", help="Examples of an episode, support and query.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of an adaptation.")] = 10,
    members: Annotated[
        int, typer.Option(min=1, max=32, help="Gaussians that a task's posterior is a mixture of (train's --members).")
    ] = 1,
    components: Annotated[
        int,
        typer.Option(min=0, help="Training tasks whose posteriors a task's prior is made of (train's --components)."),
    ] = 0,
    draws: Annotated[int, typer.Option(min=1, help="Draws of a question.")] = 8,
    slots: Annotated[int, typer.Option(min=1, help="Draws that run in one step of vLLM.")] = _SLOTS,
    gpu: Annotated[str, typer.Option(help="GPU: h100, h200, a100-80gb, l4, ...")] = "h100",
    utilization: Annotated[float, typer.Option(min=0.05, max=1, help="Part of the GPU that vLLM takes.")] = (
        _UTILIZATION
    ),
    reached: Annotated[float, typer.Option(min=0.01, max=1, help="Part of the GPU's speed that is reached.")] = (
        _REACHED
    ),
    dtype: Annotated[
        Literal["bfloat16", "float32", "nf4"],
        typer.Option(help="Of the base weights in training; nf4: in 4 bits. vLLM has bfloat16."),
    ] = "bfloat16",
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Activations are computed again in the backward pass.")
    ] = False,
    shards: Annotated[
        int, typer.Option(min=1, help="GPUs that hold the base model together in training (train's --shard-base).")
    ] = 1,
    parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="GPUs that hold the model together in serving.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON document.")] = False,
) -> None:
    """Say what training and serving take, from the model's configuration alone: memory, operations, time."""
    from abmll.draws import for_all_members
    from abmll.posterior import PosteriorConfig
    from server.gpus import find_gpu
    from server.serving_plan import plan_serving
    from training.adaptation import AdaptConfig, check_family, grown
    from training.base_model import context_of, weights_dtype
    from training.components import MOST_EXAMPLES, check_components, settings_of_one
    from training.embedded import NAME, resolve
    from training.evaluation import EvalConfig
    from training.folds import FOLDS
    from training.plan import EPISODE, plan_training, read_config
    from training.settings import checked

    chosen, name = find_gpu(gpu), model or NAME
    config = read_config(resolve(model), revision)
    given = {
        "base_model": name, "base_revision": revision, "family": family, "targets": tuple(targets.split(",")),
        "layers": layers,
    }  # fmt: skip
    posterior = checked(PosteriorConfig, given | ({} if rank is None else {"rank": rank}))
    inner = checked(AdaptConfig, {"steps": steps, "batch": rows, "members": members})
    check_family(inner, posterior.family)
    check_components(components, posterior.family)
    draws, calibration_draws = (for_all_members(count, members) for count in (draws, EvalConfig().draws))
    training = plan_training(
        config, posterior, rows=rows, tokens=tokens, episode=episode or EPISODE, dtype=weights_dtype(dtype),
        checkpointing=checkpointing, shards=shards,
    )  # fmt: skip
    # In bf16, whatever adaptation holds the base weights in: vLLM is told nothing of that.
    serving = plan_serving(
        config,
        posterior,
        draws=draws,
        slots=slots,
        tokens=tokens,
        memory=chosen.memory,
        utilization=utilization,
        parallel=parallel,
    )
    seconds = training.step_flops / (reached * (chosen.flops_float32 if dtype == "float32" else chosen.flops))
    of_one, of_pass = settings_of_one(inner), 3 if checkpointing else 2
    to_one = grown(steps, of_one.growth, MOST_EXAMPLES, rows)
    # Each fold of the temperature is begun anew. Without gradients a pass takes about half of a step, or a third where
    # activations are computed again; and it is not divided among processes.
    times = {
        "step_seconds": seconds,
        "adaptation_seconds": members * (1 + FOLDS) * steps * seconds,
        "weighing_seconds": components * shards * seconds / of_pass,
        "components_seconds": components * to_one * seconds,
    }
    commands = _commands(
        posterior,
        members,
        components,
        calibration_draws,
        draws,
        slots,
        utilization,
        dtype,
        checkpointing,
        shards,
        parallel,
    )
    if as_json:
        document = {
            "model": name,
            "posterior": posterior.model_dump(),
            "gpu": {"name": gpu} | chosen.model_dump(),
            "training": training.model_dump() | {"peak": training.peak, "adaptation": training.adaptation} | times,
            "serving": serving.model_dump(),
            "commands": commands,
        }
        typer.echo(json.dumps(document, indent=2))
        return
    work = f"{steps} steps" if members == 1 else f"{steps} steps of each of {members} members"
    durations = [
        (f"training: a step on one {gpu}, at the speed of plain LoRA", times["step_seconds"]),
        (f"adaptation: {work}, and four times that for the task's temperature", times["adaptation_seconds"]),
    ]
    if components:
        durations += [
            (f"adaptation: {components} components weighed by {rows} examples", times["weighing_seconds"]),
            (f"training: {components} components, once, after its steps", times["components_seconds"]),
        ]
    _print(name, posterior, training, serving, gpu, durations)
    if tokens > context_of(config):
        typer.echo(f"{name} reads {context_of(config):,} tokens at most, not {tokens:,}: plan with fewer --tokens")
    if training.peak > chosen.memory:
        where = f"one {gpu}" if shards == 1 else f"each {gpu}"
        fewer = "--episode (train's episodes.shots and episodes.queries)" if training.objective_leads else "--rows"
        typer.echo(
            f"training does not fit on {where} ({_size(chosen.memory)}): plan it with --gradient-checkpointing, with "
            f"fewer {fewer}, or with the base model on more GPUs (--shards {2 * shards})"
        )
    if serving.kv_tokens < tokens:
        taken = _size(utilization * chosen.memory)
        where = f"one {gpu} ({taken} of it)" if parallel == 1 else f"{parallel} {gpu} ({taken} of each)"
        more = "" if parallel > 1 else ": plan it on several with --tensor-parallel"
        typer.echo(f"serving does not fit on {where}: there is no room for a question's tokens{more}")
    typer.echo("\n".join(commands))


def _print(
    name: str,
    posterior: PosteriorConfig,
    training: TrainingPlan,
    serving: ServingPlan,
    gpu: str,
    durations: Sequence[tuple[str, float]],
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}, {posterior.family} posterior over {', '.join(posterior.targets)}, one {gpu}"
                  + (f"; training on each of {training.shards}" if training.shards > 1 else "")
                  + (f"; serving on each of {serving.parallel}" if serving.parallel > 1 else ""),
                  title_justify="left")  # fmt: skip
    table.add_column("what")
    table.add_column("takes", justify="right")
    base = [("training: base weights", _size(training.base))]
    if training.shards > 1:
        base = [
            ("training: base weights, a share", _size(training.base)),
            ("training: base weights gathered beside it", _size(training.gathered)),
        ]
    rows = [
        ("base model, parameters", f"{training.base_parameters:,}"),
        ("posterior, parameters", f"{training.posterior_parameters:,}"),
        None,
        *base,
        ("training: global posterior, gradient, optimizer", _size(training.theta)),
        ("training: task posterior, gradient, optimizer", _size(training.phi)),
        ("training: activations, gradients and KL of a step", _size(training.step)),
        ("training: the same of the objective, support and query", _size(training.objective)),
        ("training: together, at its peak", _size(training.peak)),
        ("adaptation: together, at its peak", _size(training.adaptation)),
        ("training: a step", f"{training.step_flops / 1e12:,.2f} TFLOP"),
        *((what, _time(seconds)) for what, seconds in durations),
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
    Console(highlight=False).print(table)


def _commands(
    posterior: PosteriorConfig,
    members: int,
    components: int,
    calibration_draws: int,
    draws: int,
    slots: int,
    utilization: float,
    dtype: str,
    checkpointing: bool,
    shards: int,
    parallel: int,
) -> list[str]:
    from server.settings import Settings
    from training.evaluation import EvalConfig

    base = ["--model", posterior.base_model]
    base += [] if posterior.base_revision is None else ["--revision", posterior.base_revision]
    alone = ["abmll"] if shards == 1 else ["torchrun", "--nproc-per-node", str(shards), "-m", "server.cli"]
    train = [*alone, "train", "--tasks", "TASKS", *base, "--family", posterior.family, "--dtype", dtype]
    train += ["--targets", ",".join(posterior.targets), "--rank", str(posterior.rank)]
    train += [] if posterior.layers == "all" else ["--layers", posterior.layers]
    train += ["--members", str(members)] if members > 1 else []
    train += ["--calibration-draws", str(calibration_draws)] if calibration_draws != EvalConfig().draws else []
    train += ["--components", str(components)] if components else []
    train += ["--gradient-checkpointing"] if checkpointing else []
    train += ["--shard-base"] if shards > 1 else []
    serve = ["abmll", "serve", *base, "--posterior", "posterior", "--dtype", dtype, "--draws", str(draws)]
    serve += ["--max-draws", str(draws)] if draws > Settings().max_draws else []
    options = [] if utilization == _UTILIZATION else [f"gpu_memory_utilization={utilization}"]
    options += [] if slots == _SLOTS else [f"max_loras={slots}", f"max_cpu_loras={4 * slots}"]
    options += [] if parallel == 1 else [f"tensor_parallel_size={parallel}"]
    serve += ["--engine", "vllm"] if options else []
    for option in options:
        serve += ["--vllm-option", option]
    return [shlex.join([*train, "--out", "posterior"]), shlex.join(serve)]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"
