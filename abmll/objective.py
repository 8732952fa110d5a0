"""The variational objective of one task: expected data loss plus tempered KL to the prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abmll.draws import Signs
from abmll.kl import kl
from abmll.layers import Attached
from abmll.posterior import Posterior
from abmll.predictive import option_log_probs
from abmll.scoring import Question, option_scores, pack


def row_signs(posterior: Posterior, rows: int, generator: torch.Generator) -> dict[str, Signs]:
    """Returns fresh random signs for every batch row and layer."""
    shapes = [layer.noise_shape for layer in posterior.layers.values()]
    like = next(iter(posterior.layers.values())).a
    # Bytes, drawn at once: a large model has millions of signs a step, and a GPU would wait for them.
    flips = torch.randint(0, 2, (rows * sum(map(sum, shapes)),), generator=generator, dtype=torch.int8)
    parts = (flips.to(like.device).to(like.dtype) * 2 - 1).split([rows * size for shape in shapes for size in shape])
    signs = iter([part.view(rows, -1) for part in parts])
    return {name: Signs(next(signs), next(signs)) for name in posterior.layers}


@dataclass(frozen=True)
class Labelled:
    """A tokenized question with its right option, or with a free text as its one option.

    Attributes:
        question: The tokenized question; a free text's tokens with the one that ends texts.
        answer: Index of the right option.
    """

    question: Question
    answer: int

    @property
    def is_free_text(self) -> bool:
        """Whether its answer is one of all texts."""
        return len(self.question.options) == 1


def micro_batches(data: Sequence[Labelled], max_tokens: int) -> list[list[Labelled]]:
    """Groups examples of similar length into passes of at most ``max_tokens`` padded tokens each."""
    groups: list[list[Labelled]] = []
    for item in sorted(data, key=lambda item: item.question.packed):
        if groups and (len(groups[-1]) + 1) * item.question.packed <= max_tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def data_loss(
    attached: Attached,
    posterior: Posterior,
    data: Sequence[Labelled],
    generator: torch.Generator | None,
) -> Tensor:
    """-sum log p(y | x, phi) over the data in nats, with phi drawn afresh for each example.

    A one-sample estimate of -E_q log p(D | phi) (arXiv 2508.14285, eq. 4, the data term). y is one of the question's
    options, or, of a question with one option, that one of all texts.

    Args:
        attached: The model.
        posterior: q, on the model's device.
        data: The examples, scored in one pass.
        generator: Source of the signs; None takes the posterior mean.

    Returns:
        A scalar, differentiable in the posterior's parameters.
    """
    signs = None if generator is None else row_signs(posterior, len(data), generator)
    with attached.using(posterior, signs) as model:
        return _negative_log_likelihood(model, posterior, data)


def _negative_log_likelihood(model: nn.Module, posterior: Posterior, data: Sequence[Labelled]) -> Tensor:
    device = next(model.parameters()).device
    batch = pack([item.question for item in data]).to(device)
    normalize = posterior.config.normalize
    scores = option_scores(model, batch, normalize)
    answers = torch.tensor([item.answer for item in data], device=device)[:, None]
    of_options = option_log_probs(scores).gather(-1, answers)
    own = scores.gather(-1, answers)
    of_texts = own * batch.lengths.gather(-1, answers) if normalize == "mean" else own
    free = torch.tensor([item.is_free_text for item in data], device=device)[:, None]
    return -torch.where(free, of_texts, of_options).sum()


@dataclass(frozen=True)
class TaskGradient:
    """Gradients of one task's objective, per data point, and the parts of its value.

    Attributes:
        data: d(data term)/d phi, by parameter name.
        kl_q: d(beta KL)/d phi.
        kl_p: d(beta KL)/d theta.
        data_nats: Data term in nats per data point.
        kl_nats: beta KL in nats per data point.
    """

    data: dict[str, Tensor]
    kl_q: dict[str, Tensor]
    kl_p: dict[str, Tensor]
    data_nats: float
    kl_nats: float


def backward_data(
    attached: Attached,
    phi: Posterior,
    data: Sequence[Labelled],
    generator: torch.Generator | None,
    max_tokens: int = 4096,
) -> Tensor:
    """Adds the gradient of ``data_loss`` per data point to the parameters of phi, pass by pass; returns its value.

    Of processes that hold the model together each adds, and returns, what its rows contribute.
    """
    total = torch.zeros(())
    for group in micro_batches(data, max_tokens):
        signs = None if generator is None else row_signs(phi, len(group), generator)
        weight = 1.0
        if attached.together is not None:
            rows, weight = attached.together.part(len(group))
            group = [group[row] for row in rows]
            signs = signs and {name: of.map(lambda tensor, rows=rows: tensor[rows]) for name, of in signs.items()}
        with attached.using(phi, signs) as model:
            loss = weight * _negative_log_likelihood(model, phi, group) / len(data)
            loss.backward()  # in here: gradient checkpointing runs the layers again, under the same posterior
        total = total + loss.detach().cpu()
    return total


def task_gradient(
    attached: Attached,
    q: Posterior,
    p: Posterior,
    data: Sequence[Labelled],
    *,
    beta: float,
    generator: torch.Generator | None,
    max_tokens: int = 4096,
) -> TaskGradient:
    """Gradients of [ -E_q log p(D | phi) + beta KL(q || p) ] / |D| in phi and theta.

    The data term is a sum over data points and KL a sum over weights; both are divided by |D| here, in
    one place, so that rates do not depend on the number of data points.

    Args:
        attached: The model.
        q: The task's posterior phi, float32.
        p: The prior, theta.
        data: The examples.
        beta: Weight of KL.
        generator: Source of the signs; None takes means.
        max_tokens: Padded tokens in one forward pass.
    """
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in q.tensors().items()}
    total = backward_data(attached, q.with_tensors(leaves), data, generator, max_tokens)
    data_gradient = {key: _gradient(leaf) for key, leaf in leaves.items()}
    if attached.together is not None:
        total = total.to(next(iter(data_gradient.values())).device)
        attached.together.add_up([*data_gradient.values(), total])
    q_leaves = {key: tensor.detach().requires_grad_() for key, tensor in q.tensors().items()}
    p_leaves = {key: tensor.detach().requires_grad_() for key, tensor in p.tensors().items()}
    penalty = beta * kl(q.with_tensors(q_leaves), p.with_tensors(p_leaves)) / len(data)
    penalty.backward()
    return TaskGradient(
        data_gradient,
        {key: _gradient(leaf) for key, leaf in q_leaves.items()},
        {key: _gradient(leaf) for key, leaf in p_leaves.items()},
        total.item(),
        penalty.item(),
    )


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
