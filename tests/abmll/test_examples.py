from __future__ import annotations

import pytest

from abmll.errors import InvalidExamples, InvalidRequest
from abmll.examples import MAX_OPTIONS, Template, check_options, resolve_answer


def test_the_template_is_one_text_whatever_the_spaces_around() -> None:
    template = Template()
    assert template.prompt("Is it so? \n") + template.option(" yes ") == "Is it so?\nAnswer: yes"


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ([], "0 entries", "options"),
        (["a"], "1 entries", "options"),
        ([str(i) for i in range(MAX_OPTIONS + 1)], "65 entries", "options"),
        (["a", ""], r"options\[1\] is empty", "options[1]"),
        (["a", "b", "a "], r"options\[2\] repeats 'a'", "options[2]"),
    ],
)
def test_options_that_cannot_be_asked(options: list[str], message: str, field: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        check_options(options)
    assert caught.value.field == field


def test_an_answer_is_an_options_text_or_its_index() -> None:
    check_options(["no", "yes"])
    assert resolve_answer(1, ["no", "yes"], "answer") == 1
    assert resolve_answer(" yes", ["no", "yes "], "answer") == 1
    assert resolve_answer("1", ["1", "0"], "answer") == 0


@pytest.mark.parametrize("answer", [2, -1, "maybe", "", None, 1.0, True, ["yes"]])
def test_other_answers_are_refused(answer: object) -> None:
    with pytest.raises(InvalidExamples, match=r"examples\[3\].answer") as caught:
        resolve_answer(answer, ["no", "yes"], "examples[3].answer")
    assert caught.value.field == "examples[3].answer"
