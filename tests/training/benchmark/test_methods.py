from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.distributions import Normal, kl_divergence

from abmll.examples import Example
from tests.training.conftest import rule_task
from training.base_model import BaseModel, load_base
from training.benchmark import bayesian
from training.benchmark.bayesian import Blob
from training.benchmark.catalogue import catalogue, choose, compared
from training.benchmark.lora import LoraNet
from training.benchmark.meta_learned import FirstOrderMaml, Maml, Reptile, descend, loss_of
from training.benchmark.method import META_RATE, Budget, Load, Method
from training.benchmark.point import Adapted, Lora, MultiTask, in_context, label_in_context
from training.benchmark.world import World
from training.episodes import EpisodeConfig

WORLD = World()
BUDGET = Budget(
    meta_steps=1,
    tasks_per_step=1,
    episodes=EpisodeConfig(shots=(4,), queries=4, max_chars=None),
    steps=2,
    draws=3,
    rank=8,
)
TASKS = WORLD.tasks(3, seed=0, items=40)
SUPPORT, QUERY = TASKS[0].examples[:4], TASKS[0].examples[10:15]


@pytest.fixture
def load(tiny_model_folder: Path) -> Load:
    return lambda: load_base(str(tiny_model_folder))


@pytest.mark.parametrize("method", catalogue(WORLD), ids=lambda method: method.name)
def test_a_method_scores_every_option_and_does_not_look_at_answers(method: Method, load: Load) -> None:
    learner = method.learn(load, TASKS, method.trials[0], BUDGET, seed=0)
    scores = learner.predict(SUPPORT, QUERY, seed=1)
    assert scores.shape[1:] == (5, 2)
    assert scores.isfinite().all()
    flipped = [replace(example, answer=1 - example.answer) for example in QUERY]
    assert torch.equal(learner.predict(SUPPORT, flipped, seed=1), scores)
    mixed = [QUERY[0], Example("which of three", ("red", "dog", "noon"), 2)]
    wide = learner.predict(SUPPORT, mixed, seed=1) if method.name != "exact bayes" else None
    assert wide is None or wide[0].isneginf().tolist() == [[False, False, True], [False, False, False]]


FITTED = [method for method in catalogue(None) if method.name not in {"zero-shot", "in-context"}]


@pytest.mark.parametrize("method", FITTED, ids=lambda method: method.name)
def test_steps_that_grow_with_the_examples_change_prediction_alone(method: Method, load: Load) -> None:
    budget = replace(BUDGET, batch=4)
    as_many, growing = (
        method.learn(load, TASKS, method.trials[0], replace(budget, growth=growth), seed=0) for growth in (0.0, 1.0)
    )
    few, more = SUPPORT, TASKS[0].examples[:8]
    assert torch.equal(as_many.predict(few, QUERY, seed=1), growing.predict(few, QUERY, seed=1))
    assert not torch.equal(as_many.predict(more, QUERY, seed=1), growing.predict(more, QUERY, seed=1))


def test_steps_grow_in_proportion_to_the_examples() -> None:
    growing = replace(BUDGET, batch=4, growth=1.0)
    assert [growing.steps_on(TASKS[0].examples[:size]) for size in (1, 4, 8, 14)] == [2, 2, 4, 7]
    assert BUDGET.steps_on(TASKS[0].examples[:30]) == 2


def test_an_ablation_of_blocks_has_fewer_parameters_the_fewer_they_are(load: Load) -> None:
    methods = compared(None, layers="all,last")
    names = ["abmll subspace", "abmll subspace last", "abmll kronecker", "abmll kronecker last"]
    assert [method.name for method in methods] == names
    whole, last = (method.learn(load, TASKS, method.trials[0], BUDGET, 0).parameters for method in methods[:2])
    assert whole == 2 * last  # the model has two blocks


def test_tuned_methods_have_as_many_trials_each() -> None:
    assert {len(method.trials) for method in catalogue(WORLD)} == {1, 3}  # 1: nothing to tune


def test_methods_are_chosen_by_name() -> None:
    assert [method.name for method in choose("lora, tfb", None)] == ["lora", "tfb"]
    assert "exact bayes" not in [method.name for method in choose(None, None)]
    with pytest.raises(Exception, match="there is no method 'lara'; methods: zero-shot"):
        choose("lara", None)


def test_lora_learns_a_rule_from_its_support_set(load: Load) -> None:
    task = rule_task(0)
    learner = Lora().learn(load, TASKS, {"rate": 1.5e-2}, replace(BUDGET, steps=30), seed=0)
    support = task.examples[:16]
    answers = torch.tensor([example.answer for example in support])
    right = learner.predict(support, support, seed=0)[0].argmax(-1) == answers
    assert right.double().mean() >= 0.8


def test_examples_in_the_prompt_read_like_the_template(load: Load) -> None:
    base = load()
    text = base.tokenizer.decode(in_context(base, SUPPORT[0]))
    assert text == f"{SUPPORT[0].prompt}\nAnswer: {SUPPORT[0].options[SUPPORT[0].answer]}\n"


def test_a_text_with_examples_begins_once(load: Load) -> None:
    base = load()
    tokenizer: Any = base.tokenizer
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    asked = label_in_context(base, SUPPORT[:3], QUERY[:1])[0].question
    shots = [token for example in SUPPORT[:3] for token in in_context(base, example)]
    own = base.tokenizer.encode(f"{QUERY[0].prompt}\nAnswer:", add_special_tokens=False)
    assert list(asked.prompt) == [tokenizer.eos_token_id, *shots, *own]


def test_rates_over_tasks_warm_up_and_fall_alike_for_any_number_of_gradients() -> None:
    budget = replace(BUDGET, meta_steps=100)
    rates = [budget.meta_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(META_RATE / 20, rel=0.01)
    assert max(rates) == max(rates[15:25]) > 0.9 * META_RATE
    assert rates[-1] < 0.06 * META_RATE
    assert [budget.meta_rate(13 * step, 13) for step in range(20, 100)] == pytest.approx(rates[20:])


@pytest.mark.parametrize("method", [MultiTask(), Reptile(), FirstOrderMaml(), Maml()], ids=lambda method: method.name)
def test_learning_over_tasks_takes_its_rate_from_the_budget(
    method: Method, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> dict[str, torch.Tensor]:
        learner = method.learn(load, TASKS, method.trials[0], BUDGET, seed=0)
        assert isinstance(learner, Adapted)
        return learner.start

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in other)

    untrained = LoraNet(load(), BUDGET, seed=0).state()
    assert not same(start(), untrained)
    monkeypatch.setattr(Budget, "meta_rate", lambda *_: 0.0)
    assert same(start(), untrained)


@pytest.fixture
def net(tiny_model_folder: Path) -> LoraNet:
    base: BaseModel = load_base(str(tiny_model_folder), dtype=torch.float64)
    net = LoraNet(base, BUDGET, seed=0)
    net.wrapped.double()
    generator = torch.Generator().manual_seed(0)
    net.load({n: 0.05 * torch.randn(w.shape, generator=generator).double() for n, w in net.weights.items()})
    return net


def test_the_gradient_of_maml_is_that_of_finite_differences(net: LoraNet) -> None:
    support, query = net.label(SUPPORT), net.label(QUERY)
    start = net.state()
    direction = {name: torch.randn(t.shape, dtype=torch.float64) for name, t in start.items()}

    def outer(step: float) -> torch.Tensor:
        leaves = {n: (t + step * direction[n]).requires_grad_() for n, t in start.items()}
        return loss_of(net, descend(net, leaves, support, 2, 0.1, 0, create_graph=True), query)

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    loss = loss_of(net, descend(net, leaves, support, 2, 0.1, 0, create_graph=True), query)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    along = sum((g * direction[n]).sum().item() for n, g in zip(leaves, gradients, strict=True))
    numeric = (outer(1e-5) - outer(-1e-5)).item() / 2e-5
    assert along == pytest.approx(numeric, rel=5e-3)  # the model's norms compute in float32
    adapted = descend(
        net, {n: t.requires_grad_() for n, t in net.state().items()}, support, 2, 0.1, 0, create_graph=False
    )
    adapted = {name: tensor.detach().requires_grad_() for name, tensor in adapted.items()}
    first = torch.autograd.grad(loss_of(net, adapted, query), list(adapted.values()))
    first_order = sum((g * direction[n]).sum().item() for n, g in zip(adapted, first, strict=True))
    assert first_order != pytest.approx(numeric, rel=2e-2)


def test_laplace_predicts_with_the_linearized_model(net: LoraNet) -> None:
    questions, at = net.label(QUERY), net.state()
    step = {name: torch.randn(t.shape, dtype=torch.float64) for name, t in at.items()}

    def gap(size: float) -> float:
        moved = {name: at[name] + size * step[name] for name in at}
        net.load(moved)
        exact = net.scores(questions)
        net.load(at)
        linear = bayesian.linearized(net, at, {name: size * t for name, t in step.items()}, questions)
        return (exact - linear).abs().max().item()

    # Second order in the step: ten times shorter, about a hundred times nearer.
    assert gap(0.0) < 1e-5
    assert gap(1e-3) < gap(1e-2) / 30


def test_the_noise_of_tfb_is_isotropic_in_the_update(net: LoraNet) -> None:
    trained = {name: tensor.float() for name, tensor in net.state().items()}
    a_name = next(name for name in trained if ".lora_A." in name)
    b = trained[a_name.replace(".lora_A.", ".lora_B.")]
    u, _, _ = torch.linalg.svd(b, full_matrices=False)
    changes = [
        u.T @ b @ (bayesian.noisy(trained, 0.3, torch.Generator().manual_seed(seed))[a_name] - trained[a_name])
        for seed in range(200)
    ]
    deviation = torch.stack(changes).std(dim=0)
    assert deviation.mean().item() == pytest.approx(0.3, rel=0.02)
    assert deviation.std().item() < 0.03


def test_the_kl_of_blob_is_that_of_gaussians() -> None:
    roots = {"x": 0.1 + torch.rand(3, 5)}
    weights = {"x": torch.randn(3, 5)}
    prior = Normal(0.0, Blob.prior_deviation)
    want = kl_divergence(Normal(weights["x"], roots["x"] ** 2), prior).sum().item()
    assert bayesian.blob_kl(weights, roots, Blob.prior_deviation).item() == pytest.approx(want, rel=1e-5)
