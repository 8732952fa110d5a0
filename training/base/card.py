"""The model card of a base model that ``abmll pretrain`` made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.tasks import Task


def _sources(tasks: Sequence[Task]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for task in tasks:
        groups.setdefault((task.source or "not stated", task.licence or "not stated"), []).append(task.name)
    lines = ["| source | licence | tasks |", "|---|---|---|"]
    return lines + [
        f"| {source} | {licence} | {', '.join(names)} |" for (source, licence), names in sorted(groups.items())
    ]


def _run(number: int, run: Mapping[str, Any]) -> str:
    last: Mapping[str, float] = run["log"][-1] if run["log"] else {}
    settings = ", ".join(f"{key} {value}" for key, value in run["config"].items())
    return (
        f"- run {number}: {last.get('tokens', 0) / 1e6:.1f} million tokens in {last.get('seconds', 0) / 60:.0f} "
        f"minutes; last running losses {last.get('books_nll', 0):.2f} nats a token on books, "
        f"{last.get('tasks_nll', 0):.2f} on task items; settings: {settings}"
    )


def model_card(tasks: Sequence[Task], parameters: int, runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns the card as Markdown.

    Args:
        tasks: The tasks whose items the model read.
        parameters: Number of the model's parameters.
        runs: ``config`` and ``log`` of each run of pre-training, in order.
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
        "- embeddings start from a factorized co-occurrence matrix of the whole corpus (PPMI and SVD); then next-token",
        "  training on books, on items of tasks, several of one task in a row, and on tasks made from the books: which",
        "  word is missing, which word is the theme, which book a passage is from, whether it praises or blames; in",
        "  runs with theme_share also on passages whose content words are the right answers, some of them cut out, and",
        "  on which task of its family an item is from; in runs with polarity_share on passages that VADER (MIT)",
        "  finds to praise or to blame, some with other words of its list put in, and on words of the list alone; runs",
        "  without it told praise by a short word list of ours",
        *(_run(number, run) for number, run in enumerate(runs, 1)),
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
