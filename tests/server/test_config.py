"""Settings from options, environment and file, and the commands that show them."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from clients.config import load
from clients.settings import ClientSettings
from server.options import option_name
from server.settings import Settings
from tests.command_line import CommandLine


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("ABMLL_"):
            monkeypatch.delenv(name)
    return tmp_path


def shown(abmll: CommandLine, *options: object) -> dict[str, tuple[Any, str]]:
    """Value and origin of each setting."""
    rows = abmll("config", "show", "--json", *options).json
    return {f"{row['table']}.{row['name']}": (row["value"], row["from"]) for row in rows}


def test_an_option_comes_before_the_environment_and_that_before_the_file(
    abmll: CommandLine, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "abmll.toml").write_text("[serve]\nport = 1\ndraws = 2\nqueue = 3\n[client]\ntimeout = 4\n")
    monkeypatch.setenv("ABMLL_PORT", "11")
    monkeypatch.setenv("ABMLL_DRAWS", "12")
    rows = shown(abmll, "--port", 21)
    assert rows["serve.port"] == (21, "option")
    assert rows["serve.draws"] == (12, "ABMLL_DRAWS")
    assert rows["serve.queue"] == (3, "abmll.toml")
    assert rows["serve.cache"] == (Settings().cache, "default")
    assert rows["client.timeout"] == (4.0, "abmll.toml")


def test_an_option_with_the_defaults_value_still_counts(abmll: CommandLine, here: Path) -> None:
    (here / "abmll.toml").write_text("[serve]\nport = 1\nlog_prompts = true\n")
    rows = shown(abmll, "--port", Settings().port, "--no-log-prompts")
    assert rows["serve.port"] == (Settings().port, "option")
    assert rows["serve.log_prompts"] == (False, "option")


def test_the_variables_that_were_there_before_still_count(abmll: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABMLL_STORE", "kept")
    monkeypatch.setenv("ABMLL_KEY_FILE", "keys.sqlite3")
    monkeypatch.setenv("ABMLL_URL", "http://there:1")
    rows = shown(abmll)
    assert rows["serve.store"] == ("kept", "ABMLL_STORE")
    assert rows["serve.keys"] == ("keys.sqlite3", "ABMLL_KEY_FILE")
    assert rows["client.url"] == ("http://there:1", "ABMLL_URL")


def test_arguments_of_vllm_come_from_everywhere(
    abmll: CommandLine, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "other.toml").write_text("[serve.vllm_options]\ngpu_memory_utilization = 0.5\n")
    monkeypatch.setenv("ABMLL_CONFIG", "other.toml")
    assert shown(abmll)["serve.vllm_options"] == ({"gpu_memory_utilization": 0.5}, "other.toml")
    monkeypatch.setenv("ABMLL_VLLM_OPTIONS", '{"a": {"b": 1}}')
    assert shown(abmll)["serve.vllm_options"] == ({"a": {"b": 1}}, "ABMLL_VLLM_OPTIONS")
    assert shown(abmll, "--vllm-option", "c=2")["serve.vllm_options"] == ({"c": 2}, "option")


def test_settings_built_in_code_read_neither_environment_nor_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "abmll.toml").write_text("[serve]\nport = 1\n[client]\ntimeout = 1\n")
    plain = Settings()
    monkeypatch.setenv("ABMLL_PORT", "11")
    monkeypatch.setenv("ABMLL_KEY", "abmll_x")
    assert Settings() == plain
    assert ClientSettings().key is None
    assert load(ClientSettings, "client", {}).settings.timeout == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[serve]\nprot = 9\n", "abmll.toml: [serve] prot is no setting; did you mean port?"),
        ("[serve]\nport = 99999\n", "abmll.toml: [serve] port is 99999: input should be less than or equal to 65535"),
        ("[serve]\nport = 'x'\n", "abmll.toml: [serve] port is 'x': input should be a valid integer"),
        ("[serve]\nlog_level = 'loud'\n", "[serve] log_level is 'loud': input should be 'debug', 'info'"),
        ("[serve]\ndraws = 100\n", "draws is 100, above max_draws 64; draws is from abmll.toml"),
        ("[server]\nport = 9\n", "abmll.toml: server stands at the top; there are the tables [serve] and [client]"),
        ("serve = 9\n", "abmll.toml: serve is 9; it must be a table"),
        ("[serve\n", "abmll.toml is no TOML"),
        ("[client]\ntimeout = 0\n", "abmll.toml: [client] timeout is 0: input should be greater than 0"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_key_and_what_would_be_right(
    abmll: CommandLine, here: Path, content: str, words: str
) -> None:
    (here / "abmll.toml").write_text(content)
    assert words in abmll("config", "show").refusal
    assert words in abmll(*(("ask", "hi") if "[client]" in content else ("serve",))).refusal


def test_a_wrong_variable_or_option_is_named(abmll: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "draws is 8, above max_draws 4" in abmll("serve", "--draws", 8, "--max-draws", 4).refusal
    assert "--device is 'gpu': give auto, cpu, cuda" in abmll("serve", "--device", "gpu").refusal
    assert "--adapt-device is 'auto': give cpu, cuda" in abmll("serve", "--adapt-device", "auto").refusal
    assert "there is no file no.toml (--config)" in abmll("serve", "--config", "no.toml").refusal
    monkeypatch.setenv("ABMLL_PORT", "x")
    assert "ABMLL_PORT is 'x': input should be a valid integer" in abmll("serve").refusal
    monkeypatch.setenv("ABMLL_VLLM_OPTIONS", "{")
    assert "ABMLL_VLLM_OPTIONS is no JSON; give an object" in abmll("serve").refusal
    monkeypatch.setenv("ABMLL_CONFIG", "no.toml")
    assert "there is no file no.toml (ABMLL_CONFIG)" in abmll("tasks").refusal


def test_secrets_are_not_shown(abmll: CommandLine, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "abmll.toml").write_text("[client]\nkey = ['hush']\n")
    refused = abmll("tasks")
    assert (refused.code, "hush" in refused.err) == (2, False)
    assert "abmll.toml: [client] key is wrong" in refused.err
    (here / "abmll.toml").unlink()
    monkeypatch.setenv("ABMLL_KEY", "abmll_hush")
    monkeypatch.setenv("ABMLL_URL", "http://ann:hush@there:1")
    for form in ([], ["--json"]):
        printed = abmll("config", "show", "--vllm-option", "hf_token=hush", *form)
        assert (printed.code, "hush" in printed.out) == (0, False)
        assert "ABMLL_KEY" in printed.out
        assert "@there:1" in printed.out


def test_every_setting_is_an_option_with_its_own_help_and_range(abmll: CommandLine) -> None:
    text = " ".join(abmll("serve", "--help").out.replace("│", " ").split())
    for name in Settings.model_fields:
        assert f"{option_name(name, Settings.model_fields[name])} " in text
    assert "[x>=1048576]" in text
    assert "default: (vllm where it is installed)" in text
    assert f"default: {Settings().max_draws}]" in text


def test_a_begun_file_changes_nothing_and_is_never_overwritten(abmll: CommandLine, here: Path) -> None:
    before = shown(abmll)
    assert abmll("config", "path").code == 2
    assert abmll("config", "init").code == 0
    text = (here / "abmll.toml").read_text()
    assert tomllib.loads(text) == {"serve": {}, "client": {}}
    assert "# engine = ..." in text  # what counts follows from what is installed
    assert all(f"# {name} = " in text for name in (*Settings.model_fields, *ClientSettings.model_fields))
    assert {name: value for name, (value, _) in shown(abmll).items()} == {n: v for n, (v, _) in before.items()}
    assert abmll("config", "path").out.strip() == str(here / "abmll.toml")
    (here / "abmll.toml").write_text("[serve]\nport = 1\n")
    assert "there already" in abmll("config", "init").refusal
    assert shown(abmll)["serve.port"] == (1, "abmll.toml")


def test_keys_are_made_listed_and_revoked_as_json_in_the_file_that_the_settings_name(
    abmll: CommandLine, here: Path
) -> None:
    (here / "abmll.toml").write_text("[serve]\nkeys = 'own.sqlite3'\n")
    made = abmll("keys", "add", "ann", "--rights", "query,adapt", "--rate", "9/minute", "--json").json
    assert made["key"].startswith("abmll_")
    assert stat.S_IMODE((here / "own.sqlite3").stat().st_mode) == 0o600
    (listed,) = abmll("keys", "list", "--json").json
    assert (listed["name"], listed["rights"], listed["rate"]) == ("ann", ["adapt", "query"], "9/minute")
    assert made["key"] not in json.dumps(listed)
    assert abmll("keys", "revoke", "ann", "--json").json == {"revoked": "ann"}
    assert "there is no key 'ann'" in abmll("keys", "revoke", "ann").refusal
