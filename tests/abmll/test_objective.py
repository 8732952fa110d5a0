from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from abmll.kl import kl
from abmll.layers import Attached, attach
from abmll.objective import Labelled, data_loss, micro_batches, task_gradient
from abmll.posterior import Family, Normalize, Posterior
from abmll.scoring import Question
from tests.abmll.conftest import random_posterior, tiny_model

# Llama's norms compute in float32 whatever the dtype; GPT-NeoX's are float64 when the model is.
TARGETS = ("query_key_value", "dense")
DATA = [
    Labelled(Question((5, 9, 33), ((2,), (7, 8))), 1),
    Labelled(Question((71, 14, 3, 6, 20), ((2,), (7, 8), (40, 41, 42))), 0),
    Labelled(Question((11, 12, 13), ((2,), (7, 8))), 0),
]


@pytest.fixture(scope="module")
def model() -> Attached:
    return attach(tiny_model("gpt_neox", torch.float64), TARGETS)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def central(value: Callable[[Posterior], Tensor], at: Posterior, along: dict[str, Tensor], step: float) -> float:
    ends = [at.with_tensors({k: t + sign * step * along[k] for k, t in at.tensors().items()}) for sign in (1, -1)]
    with torch.no_grad():
        return (value(ends[0]) - value(ends[1])).item() / (2 * step)


def test_gradients_of_the_objective_are_its_finite_differences(model: Attached, family: Family) -> None:
    q, p = (random_posterior(model, family, TARGETS, seed) for seed in (1, 2))
    beta = 0.01
    result = task_gradient(model, q, p, DATA, beta=beta, generator=generator())

    noise = torch.Generator().manual_seed(0)
    # The group order and so the signs are those of the lengths; one group holds all here.
    assert len(micro_batches(DATA, 4096)) == 1
    ordered = micro_batches(DATA, 4096)[0]
    for _ in range(4):
        along = {k: torch.randn(t.shape, generator=noise, dtype=torch.float64) for k, t in q.tensors().items()}
        expected = central(lambda phi: data_loss(model, phi, ordered, generator()) / len(DATA), q, along, 1e-5)
        assert inner(result.data, along) == pytest.approx(expected, rel=1e-5)
        of_q = central(lambda phi: beta * kl(phi, p) / len(DATA), q, along, 1e-6)
        assert inner(result.kl_q, along) == pytest.approx(of_q, rel=1e-5)
        of_p = central(lambda theta: beta * kl(q, theta) / len(DATA), p, along, 1e-6)
        assert inner(result.kl_p, along) == pytest.approx(of_p, rel=1e-5)
    assert result.kl_nats == pytest.approx((beta * kl(q, p) / len(DATA)).item())


def inner(gradient: dict[str, Tensor], along: dict[str, Tensor]) -> float:
    return sum((gradient[key] * along[key]).sum().item() for key in along)


def test_parts_of_a_batch_add_up_to_the_whole(model: Attached, family: Family) -> None:
    q, p = (random_posterior(model, family, TARGETS, seed) for seed in (1, 2))
    whole, parts = (task_gradient(model, q, p, DATA, beta=0.1, generator=None, max_tokens=limit) for limit in (4096, 6))
    assert len(micro_batches(DATA, 6)) == 3
    assert parts.data_nats == pytest.approx(whole.data_nats)
    for key, gradient in whole.data.items():
        torch.testing.assert_close(parts.data[key], gradient)


def test_the_data_term_is_the_likelihood_among_the_options(model: Attached) -> None:
    q = random_posterior(model, "kronecker", TARGETS, 1)
    with model.using(q) as used, torch.no_grad():
        expected = torch.zeros(())
        for item in DATA:
            scores: list[Tensor] = []
            for option in item.question.options:
                ids = torch.tensor([[*item.question.prompt, *option]])
                logs = used(input_ids=ids).logits.log_softmax(-1)[0, len(item.question.prompt) - 1 : -1]
                scores.append(logs.gather(1, torch.tensor(option)[:, None]).mean())
            expected = expected - torch.stack(scores).log_softmax(0)[item.answer]
        torch.testing.assert_close(data_loss(model, q, DATA, None), expected)


def test_the_kl_term_moves_the_optimum(model: Attached, family: Family) -> None:
    p = random_posterior(model, family, TARGETS, 2)
    distances: list[float] = []
    fits: list[float] = []
    for beta in (0.0, 1e-3, 1e-1):
        leaves = {key: tensor.clone() for key, tensor in p.tensors().items()}
        optimizer = torch.optim.Adam(list(leaves.values()), lr=0.02)
        for step in range(60):
            signs = torch.Generator().manual_seed(step)
            q = p.with_tensors(leaves)
            result = task_gradient(model, q, p, DATA, beta=beta, generator=signs)
            for key, leaf in leaves.items():
                leaf.grad = result.data[key] + result.kl_q[key]
            optimizer.step()
        with torch.no_grad():
            distances.append(kl(p.with_tensors(leaves), p).item())
            fits.append(data_loss(model, p.with_tensors(leaves), DATA, None).item())
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0
    assert fits[0] < fits[2]


@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_a_free_texts_likelihood_is_that_of_its_tokens_among_all_texts(model: Attached, normalize: Normalize) -> None:
    posterior = random_posterior(model, "kronecker", TARGETS, 0)
    posterior = replace(posterior, config=posterior.config.model_copy(update={"normalize": normalize}))
    prompt, text = (5, 9, 33), (7, 8, 2)
    with model.using(posterior) as net, torch.no_grad():
        logits = net(torch.tensor([[*prompt, *text]])).logits[0]
    log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(text)[:, None])
    alone = Labelled(Question(prompt, (text,)), 0)
    assert data_loss(model, posterior, [alone], None).item() == pytest.approx(-log_probs.sum().item(), rel=1e-6)
    both = data_loss(model, posterior, [alone, DATA[0]], None) - data_loss(model, posterior, [DATA[0]], None)
    assert both.item() == pytest.approx(-log_probs.sum().item(), rel=1e-6)
