"""Episodes of meta-training: a support and a query set of one task, and variations of tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, Field

from abmll.errors import InvalidExamples, PromptTooLong
from abmll.examples import Example, Template
from abmll.objective import Labelled
from abmll.scoring import Question, tokenize
from training.base_model import BaseModel as Base
from training.tasks import Task

# Tokens that a tokenizer adds, at most, and to spare.
_SPECIAL = 8


class EpisodeConfig(BaseModel, frozen=True, allow_inf_nan=False):
    """How episodes are drawn."""

    shots: tuple[int, ...] = Field(
        default=(0, 1, 2, 4, 8, 16, 16), description="sizes of the support set, one drawn an episode"
    )
    queries: int = Field(default=16, ge=1, description="items of the query set")
    subset: float = Field(default=0.5, ge=0, le=1, description="chance that a task keeps only some of its labels")
    max_chars: int | None = Field(default=None, ge=1, description="leave out items with longer text, to save time")
    permute: float = Field(default=0.3, ge=0, le=1, description="chance that a task's labels swap their meanings")
    free_text: float = Field(default=0.0, ge=0, le=1, description="chance that an episode has no options")


@dataclass(frozen=True)
class Episode:
    """Support and query examples of one task, or of a variation of it."""

    task: str
    support: tuple[Example, ...]
    query: tuple[Example, ...]


def draw_support(task: Task, shots: int, rng: random.Random) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Splits a task's examples at random into ``shots`` for support and the rest.

    Raises:
        InvalidExamples: The task has too few examples.
    """
    if shots >= len(task.examples):
        raise InvalidExamples(f"task {task.name} has {len(task.examples)} examples, too few for {shots} shots")
    shuffled = list(task.examples)
    rng.shuffle(shuffled)
    return tuple(shuffled[:shots]), tuple(shuffled[shots:])


def what_is_asked(item: Example | Question) -> Hashable:
    """What two examples have in common where one's answer tells the other's."""
    return item.prompt, frozenset(item.options)


def without_twins(examples: Sequence[Example], taught: Sequence[Example]) -> tuple[Example, ...]:
    """Returns the examples that do not ask what one of ``taught`` asks: their answers have been told."""
    told = {what_is_asked(example) for example in taught}
    return tuple(example for example in examples if what_is_asked(example) not in told)


def _vary(task: Task, config: EpisodeConfig, rng: random.Random) -> Task:
    """Perhaps keeps some labels only, perhaps permutes their texts.

    Tasks whose labels contradict each other cannot be memorized by theta, so adaptation must be learned
    (Yin et al. 2020, meta-learning without memorization).
    """
    if not task.fixed_labels:
        return task
    options = list(task.examples[0].options)
    kept = list(range(len(options)))
    if len(options) > 2 and rng.random() < config.subset:
        kept = sorted(rng.sample(kept, rng.randint(2, len(options))))
    texts = [options[i] for i in kept]
    if rng.random() < config.permute:
        rng.shuffle(texts)
    place = {label: position for position, label in enumerate(kept)}
    examples = tuple(
        Example(example.prompt, tuple(texts), place[example.answer])
        for example in task.examples
        if example.answer in place
    )
    return replace(task, examples=examples) if len(examples) >= 8 else task


def by_family(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Groups tasks by family."""
    families: dict[str, list[Task]] = {}
    for task in tasks:
        families.setdefault(task.family, []).append(task)
    return families


def sample_episode(tasks: Sequence[Task], config: EpisodeConfig, rng: random.Random) -> Episode:
    """Draws an episode: a family by the root of its number of tasks, a task of it, a variation, items."""
    families = by_family(tasks)
    names = sorted(families)
    family = rng.choices(names, [len(families[name]) ** 0.5 for name in names])[0]
    task = _vary(rng.choice(families[family]), config, rng)
    shots = min(rng.choice(config.shots), len(task.examples) // 2)
    support, rest = draw_support(task, shots, rng)
    query = rest[: config.queries]
    if config.free_text and rng.random() < config.free_text:
        support, query = (tuple(example.as_free_text() for example in part) for part in (support, query))
    return Episode(task.name, support, query)


def relabelled(tasks: Sequence[Task], per_family: int, items: int, max_chars: int, seed: int) -> list[Task]:
    """Returns tasks of each family, the labels of those with fixed ones in another order by chance.

    Tasks whose labels are not fixed stay as they are, and so do two labels half the time.

    Args:
        tasks: The tasks.
        per_family: At most so many of each family.
        items: Tasks with fewer are left out.
        max_chars: Items with longer text are left out.
        seed: Seed of the choice and of the permutations.
    """
    families = by_family(short_items(tasks, max_chars))
    rng, config = random.Random(seed), EpisodeConfig(subset=0.0, permute=1.0)
    made: list[Task] = []
    for family in sorted(families):
        for task in rng.sample(families[family], min(per_family, len(families[family]))):
            varied = _vary(task, config, rng)
            if len(varied.examples) >= items:
                made.append(varied)
    return made


def keep_items(tasks: Sequence[Task], keep: Callable[[Task, Example], bool]) -> list[Task]:
    """Returns the tasks with only the items that ``keep`` accepts; tasks left with under 8 are dropped."""
    kept = [replace(task, examples=tuple(e for e in task.examples if keep(task, e))) for task in tasks]
    return [task for task in kept if len(task.examples) >= 8]


def short_items(tasks: Sequence[Task], max_chars: int) -> list[Task]:
    """Returns the tasks with only the items whose prompt and options together have at most ``max_chars``."""
    return keep_items(tasks, lambda _, example: len(example.prompt) + sum(map(len, example.options)) <= max_chars)


def minibatch(support: Sequence[Labelled], size: int, rng: random.Random) -> Sequence[Labelled]:
    """Returns all examples, or ``size`` random ones where there are more."""
    return support if len(support) <= size else rng.sample(support, size)


def fits(base: Base, template: Template, example: Example) -> bool:
    """Whether an item, as free text too, is short enough for the model."""
    longest = max(len(template.option(option).encode()) for option in example.options)
    if len(template.prompt(example.prompt).encode()) + longest + _SPECIAL <= base.context:
        return True  # no token is shorter than a byte
    try:
        tokenize(base.tokenizer, template, example.prompt, example.options, base.context - 1)
    except PromptTooLong:
        return False
    return True


def label(base: Base, template: Template, examples: Sequence[Example]) -> list[Labelled]:
    """Tokenizes examples; a free text ends with the token that ends texts, where the tokenizer has one.

    Raises:
        PromptTooLong: An example exceeds the model's context; the field says which.
    """
    end: int | None = base.tokenizer.eos_token_id
    labelled: list[Labelled] = []
    for number, example in enumerate(examples):
        ended = example.is_free_text and end is not None
        room = base.context - ended
        try:
            question = tokenize(base.tokenizer, template, example.prompt, example.options, room)
        except PromptTooLong as error:
            where = f"examples[{number}]"
            raise PromptTooLong(f"{where}: {error.message}", field=f"{where}.{error.field}") from error
        if ended:
            question = replace(question, options=((*question.options[0], end),))
        labelled.append(Labelled(question, example.answer))
    return labelled
