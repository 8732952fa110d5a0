"""Pre-training of the small Llama-architecture base model that abmll carries for offline use."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from abmll.errors import AbmllError
from abmll.examples import Template
from abmll.store import replace_file, replaced
from training.base.card import model_card
from training.base.corpus import (
    corpus_digest,
    encode_books,
    in_pretraining,
    pretraining_tasks,
    task_document,
    task_items,
)
from training.base.embedding import cooccurrence, ppmi_embedding
from training.base.themes import IGNORED, Themes
from training.base.tokenizer import END, as_transformers, tokenizer_texts, train_tokenizer
from training.episodes import keep_items
from training.polarity import Polarity, label_names
from training.progress import Progress, track
from training.pseudo_tasks import kind_tasks, long_books, pseudo_tasks
from training.splits import Split
from training.tasks import Task

SNAPSHOT_SECONDS = 300.0
KINDS = ("books", "tasks", "themes", "polarity")
PARTS = ("books_nll", "tasks_nll", "answers_nll", "themes_nll", "polarity_nll")


class PretrainConfig(BaseModel, frozen=True):
    """Settings of pre-training; the defaults make the embedded default model."""

    vocabulary: int = Field(default=12288, ge=512, le=65535)
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 640
    context: int = 1024
    row_tokens: int = Field(default=384, description="tokens in a training row")
    batch_rows: int = Field(default=32, description="rows in a step")
    micro_rows: int = Field(default=8, description="rows in a forward pass; small ones stay in the cache")
    minutes: float = Field(default=60.0, gt=0, description="wall-clock budget; the rate falls to zero at its end")
    task_share: float = Field(default=0.5, ge=0, le=1, description="share of rows that hold task items")
    theme_share: float = Field(default=0.0, ge=0, le=1, description="share of rows of passages and their themes")
    polarity_share: float = Field(default=0.0, ge=0, le=1, description="share of rows of passages that praise or blame")
    theme_words: int = Field(default=5, ge=1, description="content words that are a passage's right answers, at most")
    theme_texts: float = Field(default=0.4, ge=0, le=1, description="share of passages from task texts, not books")
    answer_weight: float = Field(default=1.0, ge=1, description="weight of an answer's tokens in the loss")
    pseudo_tasks: int = Field(default=20, ge=0, description="tasks of each kind made from the books")
    permuted_share: float = Field(default=0.3, ge=0, le=1, description="share of task rows whose labels are permuted")
    learning_rate: float = Field(default=2e-3, description="Muon's, in AdamW's scale")
    embedding_rate: float = Field(default=1e-3, description="AdamW's, for embeddings and norms")
    loss_positions: float = Field(
        default=0.3, gt=0, le=1, description="share of positions whose loss is computed; an answer's always is"
    )
    window: int = Field(default=6, description="co-occurrence window of the embedding's start, in tokens")
    book_limit: int | None = None
    seed: int = 0

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """Shares of rows, in the order of ``KINDS``."""
        others = (self.task_share, self.theme_share, self.polarity_share)
        return (1.0 - sum(others), *others)

    @model_validator(mode="after")
    def _check_shares(self) -> PretrainConfig:
        if self.shares[0] < -1e-9:
            raise ValueError("task_share, theme_share and polarity_share add up to more than 1")
        return self


def _new_model(config: PretrainConfig, embedding: Tensor) -> Any:
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        # Unit rows times 0.8: an entry's root mean square is 0.05 at width 256, near the usual start.
        model.get_input_embeddings().weight.copy_(0.8 * embedding)
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * config.layers))
    return model


@dataclass
class _Row:
    """Token ids, which of them are an answer's, and what else would be right in an answer's place."""

    ids: list[int] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)
    others: list[list[int]] = field(default_factory=list)

    def add(self, ids: Sequence[int], is_answer: bool = False, others: Sequence[int] = ()) -> None:
        self.ids += ids
        self.answers += [is_answer] * len(ids)
        self.others += [list(others) for _ in ids]


class Rows:
    """An endless stream of training rows: book pieces, documents of items of one task, passages with their themes."""

    def __init__(
        self,
        config: PretrainConfig,
        tokenizer: Tokenizer,
        books: np.ndarray,
        tasks: Sequence[Task],
        template: Template,
        folder: Path,
    ) -> None:
        self.config, self.tokenizer, self.books, self.tasks, self.template = config, tokenizer, books, tasks, template
        self.folder = folder
        self.rng = random.Random(config.seed)
        self.weights = [len(task.examples) ** 0.5 for task in tasks]
        self.end: int = tokenizer.token_to_id(END) or 0
        self.suffix, self.newline = self._encode(template.suffix), self._encode("\n")

    @cached_property
    def themes(self) -> Themes:
        """Passages of the books and of the tasks' texts; made when the first row of them is."""
        texts = {e.prompt for task in self.tasks for e in task.examples}
        encoded = [self._encode(text) for text in sorted(texts)]
        return Themes(self.tokenizer, self.books, encoded, self.config.theme_words)

    @cached_property
    def polarity(self) -> Polarity:
        """Passages that praise or blame; made when the first row of them is."""
        return Polarity([text for _, text in long_books(self.folder)])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _task_row(self, length: int) -> _Row:
        row = _Row()
        while len(row.ids) < length:
            task = self.rng.choices(self.tasks, self.weights)[0]
            permute = self.rng.random() < self.config.permuted_share
            row.add([self.end])
            for prompt, answer in task_items(task, self.template, self.rng, items=24, permute=permute):
                # Prompt and answer apart, as they are when options are scored.
                row.add(self._encode(prompt))
                row.add(self._encode(answer), is_answer=True)
                if len(row.ids) >= length:
                    break
        return row

    def _polarity_row(self, length: int) -> _Row:
        row = _Row()
        row.add([self.end])
        names = label_names(self.rng.randrange(1_000))
        while len(row.ids) < length:
            label = self.rng.randrange(2)
            row.add(self._encode(self.template.prompt(self.polarity.draw(self.rng, label))))
            row.add(self._encode(self.template.option(names[label])), is_answer=True)
            row.add(self.newline)
        return row

    def _theme_row(self, length: int) -> _Row:
        row = _Row()
        row.add([self.end])
        while len(row.ids) < length:
            passage = self.themes.draw(self.rng, self.rng.random() < self.config.theme_texts)
            if not passage.themes:
                continue
            first, *others = passage.themes
            row.add([*passage.ids, *self.suffix])
            row.add([first], is_answer=True, others=others)
            row.add(self.newline)
        return row

    def _book_row(self, length: int) -> _Row:
        row = _Row()
        start = self.rng.randrange(len(self.books) - length)
        row.add([int(token) for token in self.books[start : start + length]])
        return row

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yields (ids, is_answer, kind, others).

        Shapes (rows, tokens + 1) int64 and bool, (rows,) int64, an index into ``KINDS``, and (rows, tokens + 1,
        theme_words - 1) int64: tokens that are as right as the one that stands there.
        """
        config = self.config
        makers = (self._book_row, self._task_row, self._theme_row, self._polarity_row)
        length = config.row_tokens + 1
        while True:
            kinds = self.rng.choices(range(len(KINDS)), config.shares, k=config.batch_rows)
            rows = [makers[kind](length) for kind in kinds]
            ids = torch.tensor([row.ids[:length] for row in rows])
            answers = torch.tensor([row.answers[:length] for row in rows])
            others = torch.full((*ids.shape, self.config.theme_words - 1), IGNORED)
            for number, row in enumerate(rows):
                for place, tokens in enumerate(row.others[:length]):
                    if tokens:
                        others[number, place, : len(tokens)] = torch.tensor(tokens)
            yield ids, answers, torch.tensor(kinds), others


def _loss(
    model: Any, ids: Tensor, is_answer: Tensor, kind: Tensor, others: Tensor, config: PretrainConfig, amp: bool
) -> tuple[Tensor, Tensor]:
    """Weighted mean loss, and its plain parts, in the order of ``PARTS``."""
    device_type = ids.device.type
    with torch.autocast(device_type, torch.bfloat16) if amp else nullcontext():
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        answer = is_answer[:, 1:]
        keep = (torch.rand(hidden.shape[:2], device=ids.device) < config.loss_positions) | answer
        logits = model.lm_head(hidden[keep])
    right = torch.cat([ids[:, 1:, None], others[:, 1:]], dim=-1)[keep]
    known = right != IGNORED
    each = logits.float().log_softmax(-1).gather(-1, right.where(known, 0))
    nll = -(each * known).sum(-1) / known.sum(-1)
    kind, answer = kind[:, None].expand_as(keep)[keep], answer[keep]
    tasks, themes, polarity = (kind == KINDS.index(name) for name in ("tasks", "themes", "polarity"))
    # Prompts' positions stand for all of theirs; answers' are all there.
    share = torch.where(answer, 1.0, 1.0 / config.loss_positions)
    groups = (~tasks & ~answer, tasks, tasks & answer, themes & answer, polarity & answer)
    parts = torch.stack([(nll[group] * share[group]).sum() / share[group].sum() for group in groups]).detach()
    weight = share * torch.where(answer, config.answer_weight, 1.0)
    return (nll * weight).sum() / weight.sum(), parts


def _earlier_runs(start: Path | None, chosen: Sequence[Task]) -> list[dict[str, Any]]:
    """Runs that made the model to go on from.

    Raises:
        AbmllError: It has read tasks that are not read now: their items would pass for unread, and the card would not
            name their licences.
    """
    path = None if start is None else start / "training.json"
    if path is None or not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    lacking = sorted(set(record["tasks"]) - {task.name for task in chosen})
    if lacking:
        raise AbmllError(
            f"{start} has read {len(lacking)} tasks that are not among the training families' here, such as "
            f"{lacking[0]}; go on with tasks and a split that have them",
            field="start",
        )
    return record["runs"]


def _tokenizer(
    books: Path, tasks: Sequence[Task], template: Template, config: PretrainConfig, cache: Path
) -> Tokenizer:
    if cache.is_file():
        return Tokenizer.from_file(str(cache))
    texts = tokenizer_texts(books, tasks, template, book_limit=config.book_limit or 1_000_000)
    tokenizer = train_tokenizer(texts, config.vocabulary)
    replace_file(cache, tokenizer.to_str().encode())
    return tokenizer


def _embedding(
    books: np.ndarray,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    template: Template,
    config: PretrainConfig,
    cache: Path,
) -> Tensor:
    if cache.is_file():
        return torch.load(cache, weights_only=True)
    rng = random.Random(config.seed)
    documents = [task_document(t, template, rng, len(t.examples), permute=False) for _ in range(3) for t in tasks]
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    extra = [np.asarray(encoding.ids, dtype=np.uint16) for encoding in encoded]
    counts = cooccurrence(np.concatenate([books, *extra]), config.vocabulary, config.window)
    embedding = ppmi_embedding(counts, config.width, seed=config.seed)
    written = BytesIO()
    torch.save(embedding, written)
    replace_file(cache, written.getvalue())
    return embedding


def _save(model: Any, tokenizer: Tokenizer, config: PretrainConfig, folder: Path) -> None:
    saved: Any = LlamaForCausalLM(model.config)
    saved = saved.to(torch.bfloat16)
    saved.load_state_dict(model.state_dict())
    saved.save_pretrained(folder)
    as_transformers(tokenizer, config.context).save_pretrained(folder)


def pretrain(
    books: Path,
    tasks: Sequence[Task],
    split: Split,
    out: Path,
    config: PretrainConfig,
    *,
    start: Path | None = None,
    device: str = "cpu",
    progress: Progress = track,
) -> Path:
    """Trains tokenizer and model and saves them as a transformers model folder.

    Args:
        books: Folder of book shards.
        tasks: All tasks; only those of training families are read, and of each only the half that
            ``in_pretraining`` selects.
        split: Says which families are for training.
        out: The model folder to make. Intermediate files lie in ``<out>.work`` and are reused.
        config: Settings; those of the architecture are the start's where there is one.
        start: A folder that ``pretrain`` made, to go on from with its tokenizer; from scratch if None.
        device: Where to train.
        progress: Shows progress.

    Returns:
        ``out``, holding model.safetensors (bf16), config, tokenizer and ``training.json``.
    """
    template = Template()
    chosen = pretraining_tasks(tasks, split)
    earlier = _earlier_runs(start, chosen)
    read = keep_items(chosen, in_pretraining)
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    digest = f"{corpus_digest(books, chosen)}-{config.vocabulary}"
    if config.book_limit is not None:
        digest += f"-{config.book_limit}"
    torch.manual_seed(config.seed)
    if start is None:
        tokenizer = _tokenizer(books, read, template, config, work / f"tokenizer-{digest}.json")
    else:
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
        tokenizer.post_processor = None
        digest += "-" + hashlib.sha256((start / "tokenizer.json").read_bytes()).hexdigest()[:8]
    tokens = encode_books(books, tokenizer, work / f"books-{digest}.npy", config.book_limit)
    if start is None:
        embedding_file = work / f"embedding-{digest}-{config.width}-{config.window}.pt"
        model = _new_model(config, _embedding(tokens, tokenizer, read, template, config, embedding_file)).to(device)
    else:
        loaded: Any = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        model = loaded.to(device)
    # Another seed than meta-training's, so that theta learns from pseudo-tasks that the model has not read.
    made = pseudo_tasks(books, config.pseudo_tasks, config.seed + 1) if config.pseudo_tasks else []
    made += kind_tasks(read, config.pseudo_tasks, config.seed + 1)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.embedding_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    # bf16 pays on a GPU; a CPU without matrix units runs it slower than fp32 (measured: 0.7 times).
    amp = device != "cpu"
    begin = time.monotonic()
    seconds = config.minutes * 60
    log: list[dict[str, float]] = []
    mean_parts = torch.full((len(PARTS),), math.nan)
    step, snapshot = 0, 1
    with progress("pretrain", total=seconds) as bar:
        for batch in Rows(config, tokenizer, tokens, [*read, *made], template, books):
            elapsed = time.monotonic() - begin
            if elapsed >= seconds:
                break
            # Warm-up over 2 % of the budget, then flat, then linear to zero over the last half.
            scale = min(1.0, elapsed / (0.02 * seconds) + 0.01, 2 * (1 - elapsed / seconds))
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * scale
            all_parts: list[Tensor] = []
            for rows in torch.arange(config.batch_rows).split(config.micro_rows):
                part = (tensor[rows].to(device) for tensor in batch)
                loss, parts = _loss(model, *part, config=config, amp=amp)
                (loss * len(rows) / config.batch_rows).backward()
                all_parts.append(parts)
            parts = torch.stack(all_parts).nanmean(0)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            parts = parts.cpu()
            # A step may have no row of a kind: its mean stays.
            smooth = torch.where(mean_parts.isnan(), parts, 0.95 * mean_parts + 0.05 * parts)
            mean_parts = torch.where(parts.isnan(), mean_parts, smooth)
            row = {
                "step": step,
                "seconds": round(elapsed, 1),
                "tokens": step * config.batch_rows * config.row_tokens,
            } | {
                name: round(part, 4)
                for name, part in zip(PARTS, mean_parts.tolist(), strict=True)
                if not math.isnan(part)
            }
            bar.update(elapsed, row)
            if step % 20 == 0:
                log.append(row)
            if elapsed > snapshot * SNAPSHOT_SECONDS:
                snapshot += 1
                with replaced(work / "snapshot") as snapshot_folder:
                    _save(model, tokenizer, config, snapshot_folder)
    _save(model, tokenizer, config, out)
    runs = [*earlier, {"config": config.model_dump(), "log": log}]
    record = {"tasks": [task.name for task in chosen], "runs": runs}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (out / "README.md").write_text(model_card(chosen, parameters, runs), encoding="utf-8")
    return out
