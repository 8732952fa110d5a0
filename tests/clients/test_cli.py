from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import clients.cli
from clients import connection
from clients.examples import read_examples
from server.cli import create_cli
from tests.clients.conftest import ANSWER, Scripted, job
from tests.command_line import CommandLine


def _run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(create_cli(), list(arguments), input=stdin, env={"COLUMNS": "100", "TERM": "dumb"})


def _body(content: object) -> bytes:
    return json.dumps(content).encode()


@pytest.fixture
def examples_file(tmp_path: Path) -> Path:
    path = tmp_path / "films.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "a delight", "options": ["good film", "bad"], "answer": "good film"},
        {"input": "two hours lost", "options": ["good film", "bad"], "answer": 1},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_ask_shows_answer_confidence_bars_and_both_kinds_of_doubt(scripted: Scripted):
    scripted.reply(200, _body(ANSWER))
    result = _run("ask", "A delight.", "-o", "good", "-o", "bad", "--task", "films", "--url", scripted.url)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "good   90.0 % confident"
    bars = [line for line in lines if "█" in line]
    assert [line.split()[0] for line in bars] == ["good", "bad"]
    assert [line.split()[-2] for line in bars] == ["90.0", "10.0"]
    assert bars[0].count("█") > 8 * bars[1].count("█")
    text = " ".join(result.output.split())
    assert "the model does not know 0.021 nats epistemic" in text
    assert "the question is open 0.304 nats aleatoric" in text
    assert "together 0.325 nats of 0.693 at most" in text
    assert "8 draws, ± 1.2 points of Monte Carlo error · films version 3 · 41 ms" in text


def test_ask_says_where_a_confidence_is_not_calibrated_and_which_options_remain(scripted: Scripted):
    scripted.reply(200, _body(ANSWER | {"calibrated": False, "prediction_set": ["good", "bad"]}))
    result = _run("ask", "A delight.", "-o", "good", "-o", "bad", "--url", scripted.url)
    assert "90.0 % confident, not calibrated" in result.output
    assert "prediction set: good, bad" in result.output


def test_options_that_look_like_markup_are_printed_as_they_are(scripted: Scripted):
    scripted.reply(200, _body(ANSWER | {"answer": "[red]x[/red]"}))
    result = _run("ask", "p", "-o", "[red]x[/red]", "-o", "[/bold]", "--url", scripted.url)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("[red]x[/red]   90.0 %")
    assert "[/bold]" in result.output


def test_a_free_text_answer_has_no_bars(scripted: Scripted):
    scripted.reply(200, _body(ANSWER | {"answer": "It was fine.", "probabilities": None}))
    result = _run("ask", "-", "--url", scripted.url, stdin="How was it?")
    assert result.exit_code == 0, result.output
    assert "It was fine." in result.output
    assert "█" not in result.output
    assert "Monte Carlo" not in result.output  # that of a text is of another number
    assert "cut" not in result.output
    assert json.loads(scripted.asked[0][2])["prompt"] == "How was it?"
    assert json.loads(scripted.asked[0][2])["options"] is None


TOKENS = [
    {
        "text": text,
        "probability": probability,
        "uncertainty": {"total": 0.9, "aleatoric": 0.8, "epistemic": epistemic},
        "likeliest": [{"text": " Rome", "probability": 0.5}, {"text": " Oslo", "probability": 0.1}],
    }
    for text, probability, epistemic in ((" It", 0.9, 0.01), (" was", 0.5, 0.02), (" Paris", 0.2, 0.3), ("", 0.99, 0.0))
]


@pytest.mark.parametrize("command", [["ask", "where?"], ["score", "where?", "It was Paris"]])
def test_a_free_text_shows_where_in_it_the_doubt_lies(scripted: Scripted, command: list[str]):
    scripted.reply(200, _body(ANSWER | {"answer": "It was Paris", "probabilities": None, "tokens": TOKENS}))
    result = _run(*command, "--url", scripted.url)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "It was Paris   90.0 % confident"
    row = next(line for line in lines if "' Paris'" in line)
    assert row.split() == ["'", "Paris'", "20.0", "%", "0.300", "nats", "'", "Rome'", "50.0", "%"]
    assert "(end)" in result.output


def test_a_text_that_was_cut_is_said_to_be_and_one_draw_tells_no_error(scripted: Scripted):
    cut = ANSWER | {"probabilities": None, "finish": "length", "calibrated": False, "draws": 1}
    scripted.reply(200, _body(cut))
    told = " ".join(_run("ask", "where?", "--url", scripted.url).output.split())
    assert "confident, a mean per token, not calibrated cut at the longest length, --max-tokens" in told
    assert "the model does not know one draw does not tell epistemic" in told


def test_what_is_not_all_is_never_shown_as_all(scripted: Scripted):
    scripted.reply(200, _body(ANSWER | {"confidence": 0.9997, "probabilities": [0.9997, 0.0003]}))
    result = _run("ask", "p", "-o", "good", "-o", "bad", "--url", scripted.url)
    assert result.output.startswith("good   >99.9 % confident")
    assert "<0.1 %" in result.output


def test_samples_show_what_else_might_have_been_said(scripted: Scripted):
    meanings = [{"answer": f"city {n}", "probability": 0.4 / 2**n, "samples": 7 - n} for n in range(7)]
    semantics = {"meanings": meanings, "unseen": 0.206, "answer_probability": 0.4, "consistency": 0.25,
                 "uncertainty": {"total": 0.9, "aleatoric": 0.8, "epistemic": 0.1}}  # fmt: skip
    scripted.reply(200, _body(ANSWER | {"answer": "city 0", "probabilities": None, "semantics": semantics}))
    sampling = ["--samples", "28", "--temperature", "0.7", "--top-p", "0.9"]
    result = _run("ask", "where?", *sampling, "--url", scripted.url)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["city", "0", "40.0", "%", "7"] in rows
    assert ["2", "more", "1.9", "%", "3"] in rows
    assert ["anything", "else", "20.6", "%"] in rows
    body = json.loads(scripted.asked[0][2])
    assert (body["samples"], body["temperature"], body["top_p"]) == (28, 0.7, 0.9)


def test_score_reads_a_long_answer_from_the_standard_input(scripted: Scripted):
    scripted.reply(200, _body(ANSWER | {"probabilities": None}))
    result = _run("score", "why?", "-", "--draws", "4", "--json", "--url", scripted.url, stdin="because")
    assert result.exit_code == 0, result.output
    method, path, body = scripted.asked[0]
    assert (method, path) == ("POST", "/score")
    assert (json.loads(body)["answer"], json.loads(body)["draws"]) == ("because", 4)


def test_ask_prints_the_reply_as_json(scripted: Scripted):
    scripted.reply(200, _body(ANSWER))
    result = _run("ask", "p", "-o", "good", "-o", "bad", "--draws", "4", "--seed", "9", "--json", "--url", scripted.url)
    assert ANSWER.items() <= json.loads(result.output).items()
    sent = json.loads(scripted.asked[0][2])
    assert (sent["draws"], sent["seed"]) == (4, 9)


@pytest.mark.parametrize("draws", ["0", "-1", "many", "2.5"])
def test_a_number_of_draws_that_is_none_is_a_usage_error(draws: str):
    result = _run("ask", "p", "--draws", draws)
    assert result.exit_code == 2
    assert "neither auto nor a number above 0" in " ".join(result.output.replace("│", " ").split())


def test_without_a_server_one_line_says_what_to_do(free_url: str):
    result = _run("ask", "p", "--url", free_url)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "start it with `make serve`" in result.output


def test_an_address_that_is_none_is_wrong_input():
    result = _run("tasks", "--url", "notaurl")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "is not a server's URL" in result.output
    assert "make serve" not in result.output


@pytest.mark.parametrize(
    ("status", "kind", "exit_code"),
    [(422, "InvalidRequest", 2), (404, "TaskNotFound", 2), (503, "EngineFailure", 1), (500, "InternalError", 1)],
)
def test_the_exit_status_tells_wrong_input_from_a_servers_failure(
    scripted: Scripted, status: int, kind: str, exit_code: int
):
    scripted.reply(status, _body({"error": {"type": kind, "message": "it is so", "field": None}}))
    result = _run("ask", "p", "--url", scripted.url)
    assert result.exit_code == exit_code
    assert result.output.startswith("abmll: it is so")
    assert result.output.count("\n") == 1


def test_tasks_are_a_table_and_json_alike(scripted: Scripted):
    rows: list[dict[str, Any]] = [
        {"task": "global", "status": "ready", "version": 1, "calibrated": True, "shots": None},
        {"task": "films", "status": "damaged", "error": "no posterior.json", "version": 2, "shots": 16},
    ]
    scripted.reply(200, _body(rows))
    table = _run("tasks", "--url", scripted.url).output.splitlines()
    assert table[1].split() == ["global", "ready", "1", "yes"]
    assert "damaged: no posterior.json" in table[2]
    assert json.loads(_run("tasks", "--json", "--url", scripted.url).output) == rows


def test_teach_follows_the_job_and_says_how_to_ask(scripted: Scripted, examples_file: Path):
    scripted.reply(202, _body(job("queued")))
    scripted.reply(200, _body(job("running", 0.5)))
    scripted.reply(200, _body(job("done", 1.0, posterior={"id": "5f", "version": 2, "task": "films"})))
    result = _run("teach", "films", str(examples_file), "--url", scripted.url)
    assert result.exit_code == 0, result.output
    assert "films (version 2) is taught from 2 examples" in result.output
    assert "abmll ask \"...\" --task films -o 'good film' -o bad" in result.output
    sent = json.loads(scripted.asked[0][2])
    assert [row["prompt"] for row in sent["examples"]] == ["a delight", "two hours lost"]
    assert [row["answer"] for row in sent["examples"]] == ["good film", 1]


def test_teach_prints_the_job_alone_as_json(scripted: Scripted, examples_file: Path):
    scripted.reply(202, _body(job("queued")))
    scripted.reply(200, _body(job("done", 1.0)))
    result = _run("teach", "films", str(examples_file), "--json", "--url", scripted.url)
    assert json.loads(result.stdout)["status"] == "done"
    assert "done" in result.stderr


def test_teach_tells_why_a_job_failed(scripted: Scripted, examples_file: Path):
    scripted.reply(202, _body(job("queued")))
    scripted.reply(200, _body(job("failed", error="the base model is gone")))
    result = _run("teach", "films", str(examples_file), "--url", scripted.url)
    assert result.exit_code == 1
    assert "the base model is gone" in result.output


def test_an_interrupt_leaves_the_job_running_and_says_so(
    scripted: Scripted, examples_file: Path, monkeypatch: pytest.MonkeyPatch
):
    scripted.reply(202, _body(job("queued")))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clients.cli, "_follow", interrupted)
    result = _run("teach", "films", str(examples_file), "--url", scripted.url)
    assert result.exit_code == 130
    assert "job j1 runs on at the server" in result.output
    assert f"curl -X DELETE {scripted.url}/adapt/j1" in result.output
    assert [method for method, _, _ in scripted.asked] == ["POST"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no examples"),
        ("{not json", "line 1"),
        ('{"prompt": "p", "options": ["a", "b"]}', "line 1: answer: Field required"),
        (
            '{"prompt": "p", "options": ["a", "b"], "answer": true}',
            "line 1: answer: must be an option's text or its index, not True",
        ),
        ('{"prompt": "p", "options": ["a", "b"], "answer": 1.0}', "line 1: answer: must be an option's text or its"),
        (
            '{"prompt": "p", "choices": ["a", "b"], "answer": "a"}',
            "line 1: 'choices' is no key of an example; name it 'options', or leave it out",
        ),
        ('{"prompt": "p", "input": "q", "answer": "a"}', "'prompt' and 'input' both give the question"),
        ('{"prompt": "p", "Options": ["a", "b"], "answer": "a"}', "'Options' is no key of an example"),
        ('{"input": "p", "options": ["a", "b"], "output": "a"}', "name it 'answer'"),
    ],
)
def test_a_file_of_examples_that_is_wrong_is_named_with_its_line(
    tmp_path: Path, free_url: str, content: str, words: str
):
    path = tmp_path / "wrong.jsonl"
    path.write_text(content, encoding="utf-8")
    result = _run("teach", "films", str(path), "--url", free_url)
    assert result.exit_code == 2
    assert "wrong.jsonl" in result.output
    assert words in result.output


def test_keys_that_an_example_does_not_need_do_no_harm(tmp_path: Path):
    path = tmp_path / "more.jsonl"
    path.write_text('{"id": 7, "input": "p", "text": "q", "options": ["a", "b"], "answer": 0, "label": 1}')
    (example,) = read_examples(path)
    assert (example.prompt, example.options, example.answer) == ("p", ["a", "b"], 0)


def test_nothing_that_a_server_says_steers_the_terminal(scripted: Scripted):
    escape = "\x1b[2Jgone\x9b1m"
    doubt = {"total": 0.3, "aleatoric": 0.2, "epistemic": 0.1}
    semantics = {
        "meanings": [{"answer": escape, "probability": 0.9, "samples": 3}], "unseen": 0.1, "answer_probability": 0.9,
        "consistency": 1.0, "uncertainty": doubt,
    }  # fmt: skip
    withheld = {"reason": escape, "threshold": 0.9, "candidates": [{"answer": escape, "probability": 0.4}]}
    told = ANSWER | {"task": escape, "answer": escape, "prediction_set": [escape], "semantics": semantics}
    scripted.reply(200, _body(told)).reply(200, _body(told | {"abstained": withheld, "probabilities": None}))
    scripted.reply(200, _body([{"task": escape, "status": "damaged", "error": escape}]))
    scripted.reply(422, _body({"error": {"type": "InvalidRequest", "message": escape}}))
    for command in (["ask", "p", "-o", escape, "-o", "a\u3000b"], ["ask", "p"], ["tasks"], ["tasks"]):
        shown = _run(*command, "--url", scripted.url).output
        assert "gone" in shown
        assert not {"\x1b", "\x9b"} & set(shown)
        assert ("a\u3000b" in shown) == ("-o" in command)  # a space of another script is one


def test_the_lines_that_look_after_a_job_carry_the_key(
    scripted: Scripted, examples_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ABMLL_KEY", "abmll-secret")
    monkeypatch.setattr(connection, "_PATIENCE_SECONDS", 0.0)
    scripted.reply(202, _body(job("queued"))).reply(503, b"")
    shown = _run("teach", "films", str(examples_file), "--url", scripted.url).output
    with_key = f'-H "Authorization: Bearer $ABMLL_KEY" {scripted.url}/adapt/j1'
    assert f"look:   curl {with_key}\n  cancel: curl -X DELETE {with_key}\n" in shown
    assert "secret" not in shown


def test_no_timeout_is_taken(scripted: Scripted):
    scripted.reply(200, b"[]")
    assert _run("tasks", "--json", "--timeout", "inf", "--url", scripted.url).output == "[]\n"


def test_what_was_counted_is_told_where_the_server_stops(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connection, "_PATIENCE_SECONDS", 0.0)
    rows = tmp_path / "held_out.jsonl"
    rows.write_text('{"prompt": "p", "options": ["good", "bad"], "answer": "good"}\n' * 5)
    wanted = ["measure", "films", str(rows), "--at-once", "1", "--json", "--url", scripted.url]
    busy = _body({"error": {"type": "RateLimited", "message": "the key has had its questions"}})

    def replies(answers: int) -> None:
        scripted.replies.clear()
        scripted.reply(200, _body({"task": "films"}))
        for _ in range(answers):
            scripted.reply(200, _body(ANSWER | {"answer_index": 0}))
        scripted.reply(429, busy, Retry_After="600")

    replies(2)
    some = _run(*wanted)
    assert some.exit_code == 1
    assert (json.loads(some.stdout)["questions"], json.loads(some.stdout)["accuracy"]) == (2, 1.0)
    assert "abmll: asked 2 of 5 questions" in some.stderr
    assert "the key has had its questions" in some.stderr
    replies(0)
    none = _run(*wanted)
    assert (none.exit_code, none.stdout) == (1, "")
    assert none.stderr == "abmll: the key has had its questions\n"


def test_a_file_of_settings_in_no_folder_is_wrong_input(tmp_path: Path, abmll: CommandLine):
    there = tmp_path / "nosuchdir" / "abmll.toml"
    assert f"there is no folder {there.parent}" in abmll("config", "init", there).refusal


def test_a_folder_of_a_posterior_has_no_versions(tmp_path: Path, abmll: CommandLine):
    (tmp_path / "posterior.json").write_text("{}")
    refusal = abmll("draws", tmp_path, "--version", 1, "--out", tmp_path / "out").refusal
    assert f"{tmp_path} is a folder of a posterior, which takes no --version" in refusal


def test_help_imports_neither_torch_nor_vllm_nor_httpx():
    code = (
        "import sys\n"
        "from server.cli import create_cli\n"
        "create_cli()(['ask', '--help'], standalone_mode=False)\n"
        "slow = {'torch', 'vllm', 'transformers', 'httpx', 'fastapi', 'limits', 'pydantic_settings'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command", ["serve", "ask", "tasks", "teach", "pretrain", "train", "adapt", "eval", "draws", "doctor"]
)
def test_every_command_has_help(command: str):
    result = _run(command, "--help")
    assert result.exit_code == 0
    assert command in result.output
    assert ("[client]" in result.output) == (command in ("ask", "tasks", "teach"))


def test_teach_names_the_job_when_the_server_does_not_come_back(
    scripted: Scripted, examples_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connection, "_PATIENCE_SECONDS", 0.9)
    scripted.reply(202, _body(job("queued")))
    scripted.reply(502, b"<html>Bad Gateway</html>")
    result = _run("teach", "films", str(examples_file), "--url", scripted.url)
    assert result.exit_code == 1
    assert "job j1 may run on at the server" in result.output
    assert f"look:   curl {scripted.url}/adapt/j1" in result.output
    assert "abmll: the server replied 502" in result.output
    assert len(scripted.asked) > 2
