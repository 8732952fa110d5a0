"""The model card of a base model that ``abmll pretrain`` made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from training.tasks import Task


def _sources(tasks: Sequence[Task]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for task in tasks:
        groups.setdefault((task.source or "not stated", task.licence or "not stated"), []).append(task.name)
    lines = ["| source | licence | tasks |", "|---|---|---|"]
    return lines + [
        f"| {source} | {licence} | {', '.join(names)} |" for (source, licence), names in sorted(groups.items())
    ]


def model_card(
    tasks: Sequence[Task], parameters: int, settings: Mapping[str, object], last: Mapping[str, float]
) -> str:
    """Returns the card as Markdown.

    Args:
        tasks: The tasks whose items the model read.
        parameters: Number of the model's parameters.
        settings: Settings of pre-training.
        last: Last line of its log.
    """
    lines = [
        "---",
        "language: en",
        "license: cc-by-sa-4.0",
        "library_name: transformers",
        "---",
        "",
        "# abmll-small",
        "",
        f"A Llama-architecture causal language model of {parameters / 1e6:.1f} million parameters, trained from",
        "scratch so that abmll can be tried, tested and measured where no model can be downloaded.",
        "",
        "## What it is good for, and what not",
        "",
        "It tells short English texts apart (requests, topics) after a few labelled examples, through a posterior.",
        "It has no knowledge to speak of: questions of fact, logic, arithmetic and reading comprehension stay near",
        "chance, and text that it writes is grammatical at best. It reads lower case only. Its prose comes from books",
        "of the nineteenth and early twentieth century, with their views; some task texts are offensive on purpose,",
        "being examples for hate-speech detection. Do not let it decide anything about people.",
        "",
        "## How it was made",
        "",
        f"- settings: {', '.join(f'{key} {value}' for key, value in settings.items())}",
        "- embeddings start from a factorized co-occurrence matrix of the whole corpus (PPMI and SVD); then next-token",
        f"  training on {last.get('tokens', 0) / 1e6:.1f} million tokens in {last.get('seconds', 0) / 60:.0f} minutes",
        f"- last running losses: {last.get('books_nll', 0):.2f} nats a token on books, "
        f"{last.get('tasks_nll', 0):.2f} on task items",
        "- of each task, a hash picks the half of the items that was read with its answers; the other half is kept for",
        "  meta-training. BIG-bench and BIG-bench Hard are excluded, as their authors ask.",
        "",
        "## Data and licences",
        "",
        "Public-domain English books, and the items of these tasks. Some are share-alike, hence the model's licence.",
        "",
        *_sources(tasks),
    ]
    return "\n".join(lines) + "\n"
