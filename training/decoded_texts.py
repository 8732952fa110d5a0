"""Free-text answers of many questions: decoded under the mean, scored under draws, compared with the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abmll.decoding import decode, with_end
from abmll.draw_scores import score_draws
from abmll.examples import Example
from abmll.layers import Attached
from abmll.meanings import normalized
from abmll.posterior import Posterior
from abmll.sampling import Sampling
from abmll.scoring import Question, tokenize
from abmll.text_calibration import JudgedTexts, text_logits
from training.base_model import BaseModel as Base

# The longest answer that is decoded: what is longer is an essay, which is not right or wrong as a whole.
MAX_TOKENS = 32
_AT_ONCE = 32


@dataclass(frozen=True)
class Texts:
    """Decoded answers.

    Attributes:
        texts: The answers.
        asked: The tokenized questions, each with its answer's tokens as the one option, with the one that ended it
            where it came to an end.
        log_probs: Of the whole answers under each draw, shape (draws, n), nats.
        ended: Whether each came to an end.
    """

    texts: tuple[str, ...]
    asked: tuple[Question, ...]
    log_probs: Tensor
    ended: tuple[bool, ...]

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """The answers' tokens."""
        return tuple(question.options[0] for question in self.asked)


@dataclass(frozen=True)
class DecodedTexts(Texts):
    """Decoded answers that were compared with the right ones.

    Attributes:
        correct: Whether they are right, shape (n,), bool: whole, and the same as the right answer once normalized.
    """

    correct: Tensor

    @property
    def judged(self) -> JudgedTexts:
        """What calibration takes."""
        return JudgedTexts(text_logits(self.log_probs), self.correct)


def decode_texts(
    base: Base, attached: Attached, posterior: Posterior, examples: Sequence[Example], draws: int, seed: int
) -> DecodedTexts:
    """Answers questions whose right answers are known, see ``answer_texts``.

    An answer that comes to no end is wrong, and its probability is that of what there is of it; a server says of such
    a one that its confidence is not calibrated.
    """
    found = answer_texts(base, attached, posterior, [example.prompt for example in examples], draws, seed)
    right = [
        ended and normalized(text) == normalized(example.text)
        for text, ended, example in zip(found.texts, found.ended, examples, strict=True)
    ]
    return DecodedTexts(found.texts, found.asked, found.log_probs, found.ended, torch.tensor(right))


@torch.inference_mode()
def answer_texts(
    base: Base,
    attached: Attached,
    posterior: Posterior,
    prompts: Sequence[str],
    draws: int,
    seed: int,
    max_tokens: int = MAX_TOKENS,
) -> Texts:
    """Answers questions in free text as a server does: greedily under the mean; draws score.

    Args:
        base: Model and tokenizer.
        attached: The same model, attached.
        posterior: On the model's device.
        prompts: The questions.
        draws: How many draws score.
        seed: Their seed.
        max_tokens: Of an answer, at most.

    Raises:
        PromptTooLong: A question leaves no room for an answer.
    """
    room = base.context - 1
    questions = [tokenize(base.tokenizer, posterior.config.template, prompt, (), room) for prompt in prompts]
    order = sorted(range(len(questions)), key=lambda at: len(questions[at].prompt))
    # Where a question leaves less room than the others, its answer alone is shorter.
    roomy = [at for at in order if len(questions[at].prompt) + max_tokens <= base.context]
    groups = [roomy[start : start + _AT_ONCE] for start in range(0, len(roomy), _AT_ONCE)]
    groups += [[at] for at in order[len(roomy) :]]
    texts = [""] * len(prompts)
    tokens: list[tuple[int, ...]] = [()] * len(prompts)
    ended = [False] * len(prompts)
    for some in groups:
        sampling = Sampling(min(max_tokens, base.context - len(questions[some[-1]].prompt)))
        with attached.using(posterior):
            found = decode(base.model, base.tokenizer, [questions[at].prompt for at in some], sampling)
        for at, decoded in zip(some, found, strict=True):
            texts[at] = base.tokenizer.decode(decoded, skip_special_tokens=True).strip()
            tokens[at] = tuple(with_end(decoded, base.tokenizer, sampling))
            ended[at] = len(decoded) < sampling.max_tokens
    asked = tuple(replace(question, options=(answer,)) for question, answer in zip(questions, tokens, strict=True))
    log_probs = score_draws(attached, posterior, asked, range(draws), seed, normalize="sum")[..., 0]
    return Texts(tuple(texts), asked, log_probs, tuple(ended))
