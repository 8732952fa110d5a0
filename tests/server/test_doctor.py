"""What the doctor finds on this machine, and where something is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from abmll.store import StoredPosterior
from server import machine_checks, service_checks
from server.findings import Finding, guarded
from server.keys import Keys
from server.settings import Settings
from tests.command_line import CommandLine
from tests.server.conftest import Server, free_port


def status(check: Callable[[Settings], Iterator[Finding]], **settings: object) -> tuple[str, str, str]:
    """The only finding of a check: its status, what was found, and what would mend it."""
    (found,) = check(Settings.model_validate(settings))
    assert (found.status == "ok") == (found.mend == ""), found
    return found.status, found.detail, found.mend


def test_a_machine_that_serves_has_nothing_that_fails(
    abmll: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = {row["name"]: row for row in abmll("doctor", "--port", free_port(), "--json").json}
    names = {"settings", "python", "packages", "builds", "memory", "shared memory", "store", "port", "keys", "model"}
    assert names | {"torch", "device", "vllm", "posterior"} <= found.keys()
    assert {row["status"] for row in found.values()} <= {"ok", "warn"}
    assert torch.__version__ in found["torch"]["detail"]
    assert "whole" in found["posterior"]["detail"]
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_told_with_how_to_mend_it_and_by_the_exit_status(
    abmll: CommandLine,
    global_posterior: tuple[Path, StoredPosterior],
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine_checks, "start_vllm", lambda: None)  # importing it takes ten seconds
    damaged = tmp_path / "damaged"
    shutil.copytree(global_posterior[0], damaged)
    (damaged / "calibration.json").write_text("{}")
    monkeypatch.setenv("ABMLL_PROT", "1")
    (tmp_path / "own.toml").write_text("")
    options = ("--posterior", damaged, "--keys", tmp_path / "none", "--config", tmp_path / "own.toml")
    ran = abmll("doctor", "--model", tiny_model_folder, *options)
    assert ran.code == 1
    lines = [line.rstrip().split(maxsplit=2) for line in ran.out.splitlines()]
    found = {words[1]: (words[0], words[2]) for words in lines if words[0] in ("ok", "warn", "fail")}
    assert found["posterior"][0] == found["keys"][0] == "fail"
    assert found["settings"][0] == "warn"
    assert f"file{tmp_path / 'own.toml'};ABMLL_PROT" in "".join(ran.out.split())
    assert found["model"][0] == "ok"
    assert ran.out.count("→") == sum(state != "ok" for state, _ in found.values())
    assert "\x1b" not in ran.out


def test_the_port_is_free_or_ours_or_anothers(server: Server) -> None:
    assert status(service_checks.port, port=free_port())[0] == "ok"
    state, detail, _ = status(service_checks.port, port=server.settings.port)
    assert (state, detail.startswith("abmll "), "answers at" in detail) == ("warn", True, True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        assert status(service_checks.port, port=other.getsockname()[1])[0] == "fail"
    assert status(service_checks.port, port=free_port(), host="nosuch.invalid")[0] == "fail"


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({}, [], "ok"),
        ({"device": "cuda"}, [], "fail"),
        ({"device": "cuda"}, ["a"], "ok"),
        ({"device": "cuda:1"}, ["a"], "fail"),
        ({"adapt_device": "cuda:3"}, ["a", "b"], "fail"),
        ({"adapt_device": "cuda:1"}, ["a", "b"], "ok"),
        ({"device": "mps"}, ["a"], "warn"),
    ],
)
def test_a_device_that_torch_does_not_see_is_told(settings: dict[str, str], gpus: list[str], expected: str) -> None:
    seen = json.dumps({"version": torch.__version__, "gpus": gpus, "threads": 1})
    probe = machine_checks.Child(["-S", "-c", f"print({seen!r})"])
    found = {each.name: each for each in machine_checks.engines(Settings.model_validate(settings), probe, None)}
    assert found["device"].status == expected


def test_a_store_is_looked_at_without_making_it(tmp_path: Path) -> None:
    state, detail, _ = status(service_checks.store, store=tmp_path / "a" / "b")
    assert (state, "will be made" in detail, list(tmp_path.iterdir())) == ("ok", True, [])
    (tmp_path / "file").write_text("")
    assert status(service_checks.store, store=tmp_path / "file" / "store")[0] == "fail"


def test_keys_that_others_can_read_and_a_server_without_any_are_told(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite3"
    Keys(path).add("ann", ["query"])
    assert status(service_checks.keys, keys=path)[0] == "ok"
    path.chmod(0o640)
    assert status(service_checks.keys, keys=path)[2] == f"`chmod 600 {path}`"
    assert status(service_checks.keys)[0] == "ok"
    assert status(service_checks.keys, host="0.0.0.0")[0] == "warn"


def test_a_model_that_cannot_be_had_offline_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    state, detail, mend = status(service_checks.hub, model="meta-llama/Meta-Llama-3-8B")
    assert (state, "not in the hub's cache" in detail, "HF_HUB_OFFLINE" in mend) == ("fail", True, True)
    assert status(service_checks.hub, model=str(tmp_path / "nowhere"))[0] == "fail"
    assert status(service_checks.hub, model=str(tmp_path))[0] == "fail"
    assert status(service_checks.hub)[0] == "ok"


def test_a_build_for_cuda_beside_torch_for_the_cpu_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in (("torch", "2.13.0+cpu"), ("torchvision", "0.28.0"), ("torchaudio", "2.13.0+cpu")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = [found for found in machine_checks.packages(Settings()) if found.name == "builds"]
    assert (found.status, found.mend) == ("fail", "`uv pip uninstall torchvision`")
    assert "torchaudio" not in found.detail


@pytest.mark.parametrize(
    ("settings", "missing", "mend"),
    [
        ({"dtype": "nf4"}, {"bitsandbytes"}, "abmll[nf4]"),
        ({"replicas": 2}, {"ray"}, "abmll[cluster]"),
        ({"replicas": 2, "dtype": "nf4"}, {"ray", "bitsandbytes"}, "abmll[nf4,cluster]"),
        ({"replicas": 2}, {"ray", "peft"}, "make install"),
        ({}, set[str](), ""),
    ],
)
def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    settings: dict[str, Any], missing: set[str], mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {each.name: each for each in machine_checks.packages(Settings.model_validate(settings))}["packages"]
    assert (found.status == "fail", mend in found.mend) == (bool(missing), True)
    assert all(name in found.detail.partition(" missing")[0] for name in missing)


@pytest.mark.parametrize(
    "files",
    [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ],
)
def test_of_the_memory_a_container_s_limit_counts_where_there_is_one(
    files: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_checks, "_CGROUPS", tmp_path)

    def told(limit: str) -> str:
        for name, text in zip(files, (limit, f"{700 << 20}\n", f"anon 1\ninactive_file {200 << 20}\n"), strict=True):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        (found,) = (each for each in machine_checks.machine(Settings(engine="torch")) if each.name == "memory")
        return f"{found.status}: {found.detail}"

    assert told(f"{1 << 30}\n") == "warn: 0.5 of 1.0 GiB available"
    assert told("max\n") == told("9223372036854771712\n")
    assert " of 1.0 GiB" not in told("max\n")


def test_a_process_that_dies_or_hangs_is_told_of() -> None:
    assert machine_checks.Child(["-c", "raise ImportError('no such library')"]).told() == (
        [],
        "ImportError: no such library",
    )
    told, why = machine_checks.Child(
        ["-S", "-c", "print('{\"a\": 1}', flush=True); import time; time.sleep(60)"], 5
    ).told()
    assert (told, why) == ([{"a": 1}], "no end after 5 s")


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("first", "ok", "")
        raise ZeroDivisionError("x\ny")

    (found,) = guarded("thing", broken)
    assert (found.name, found.status) == ("thing", "warn")
    assert "ZeroDivisionError: x y" in found.detail
