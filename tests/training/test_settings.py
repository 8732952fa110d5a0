from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abmll.errors import AbmllError
from tests.command_line import CommandLine
from training.evaluation import EvalConfig
from training.meta import MetaConfig
from training.settings import checked


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"task_per_step": 8}, "there is no setting task_per_step; did you mean tasks_per_step?"),
        ({"inner": {"lerning_rate": 3}}, "there is no setting inner.lerning_rate; did you mean inner.learning_rate?"),
        ({"beta": 0.5}, "there is no setting beta; did you mean inner.beta?"),
        ({"qqqq": 0.5}, "there is no setting qqqq; there are steps, tasks_per_step, "),
        ({"minutes": 0}, "setting minutes: Input should be greater than 0 (got 0)"),
    ],
)
def test_what_is_no_setting_is_told(values: dict[str, Any], told: str) -> None:
    with pytest.raises(AbmllError) as refused:
        checked(MetaConfig, values)
    assert refused.value.message.startswith(told)


def test_shots_are_counted_from_none() -> None:
    with pytest.raises(AbmllError, match="greater than or equal to 0"):
        checked(EvalConfig, {"shots": (-1, 4)})


def test_the_quick_benchmark_takes_no_sizes(abmll: CommandLine, tmp_path: Path) -> None:
    ran = abmll("bench", "--quick", "--test-tasks", 40, "--out", tmp_path / "out")
    assert "--quick has test_tasks of its own; leave --test-tasks out" in ran.refusal
    assert not (tmp_path / "out").exists()
