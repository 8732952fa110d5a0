"""A Ray cluster of two machines, as `ray start` begins them, both on this one: joined, looked at, and one lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from abmll.store import StoredPosterior
from server import service_checks
from server.findings import Finding
from server.settings import Settings
from tests.server.collector import Collector, told
from tests.server.conftest import Server, free_port, servers, wait_for
from tests.server.test_cluster import READY, ask
from tests.server.test_http import QUESTION, adapt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("one_ray")]

TOKEN = {"RAY_AUTH_MODE": "token"}


class Machine:
    """What ``ray start`` begins; ``kill`` is the machine's power switch."""

    def __init__(self, log: Path, *options: str, **environment: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
        # Else engines would wait for whatever else this machine does.
        environment |= {"RAY_worker_niceness": "0"}
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                command, env=os.environ | environment, stdout=stream, stderr=stream, start_new_session=True
            )
        self.log = log

    def wait(self) -> None:
        wait_for(lambda: "Ray runtime started" in self.log.read_text(), READY)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def begin(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Machine]]:
    """Begins the cluster's next machine: one with a CPU, then those with a CPU each that adaptation may use, too."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    machines: list[Machine] = []

    def begin_one() -> Machine:
        log = tmp_path / f"machine-{len(machines)}.log"
        if not machines:
            port = address.partition(":")[2]
            head = ("--head", "--port", port, "--num-cpus", "1", "--include-dashboard=false", "--temp-dir", folder)
            machine = Machine(log, *head)
        else:
            machine = Machine(log, "--address", address, "--num-cpus", "1", "--resources", '{"teach": 1}', **TOKEN)
        machines.append(machine)
        machine.wait()
        return machine

    # Its sockets' names would be too long in pytest's folder.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield begin_one
        for machine in reversed(machines):
            machine.kill()


@pytest.fixture
def start(
    begin: Callable[[], Machine],
    tiny_model_folder: Path,
    global_posterior: tuple[Path, StoredPosterior],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Server]]:
    """Servers, which end before the machines."""
    with servers(tiny_model_folder, global_posterior, tmp_path_factory) as start_one:
        yield start_one


def looked_at(**options: object) -> Finding:
    settings = Settings.model_validate({"engine": "torch", "threads": 1, **options})
    (finding,) = service_checks.cluster(settings, service_checks.start_cluster(settings))
    return finding


def test_a_cluster_that_loses_a_machine_answers_on_and_teaches_once_there_is_room(
    address: str, begin: Callable[[], Machine], start: Callable[..., Server]
) -> None:
    begin()
    resources = {"CPU": 0.0, "teach": 1.0}
    wanted = {"ray_address": address, "replicas": 2, "adapt_resources": resources}
    alone = looked_at(**wanted)
    assert (alone.status, alone.detail.rpartition(": ")[2]) == ("warn", "CPU 2, teach 1")
    other = begin()
    both = looked_at(**wanted)
    assert (both.status, both.detail.startswith("2 machines")) == ("ok", True)

    with closing(Collector()) as collector:
        server = start(wait=False, threads=1, otlp_endpoint=collector.endpoint, **wanted)
        server.wait_ready(READY)
        questions = [QUESTION | {"prompt": f"film {number}", "draws": 4, "seed": number} for number in range(150)]
        expected = [ask(server, question) for question in questions[:10]]
        with ThreadPoolExecutor(8) as pool:
            replies = pool.map(lambda question: ask(server, question), questions)
            time.sleep(0.5)
            other.kill()
            replied = list(replies)
        assert Counter(status for status, _ in replied) == {200: len(questions)}
        for (_, got), (_, before) in zip(replied, expected, strict=False):
            assert got == pytest.approx(before, abs=1e-4)

        job = adapt(server, "without-room")["job"]
        wait_for(lambda: f"job {job} waits in Ray for" in server.log.read_text(), READY)
        begin()
        assert server.wait_job(job, READY)["status"] == "done"
        assert told(collector.wait("adaptation job", **{"abmll.job": job}))["abmll.status"] == "done"


def test_servers_of_one_cluster_do_not_take_each_others_engines(
    address: str, begin: Callable[[], Machine], start: Callable[..., Server]
) -> None:
    begin()
    begin()
    own = {"wait": False, "threads": 1, "replicas": 1, "ray_address": address}
    first = start(**own)
    first.wait_ready(READY)
    expected = ask(first, QUESTION)
    second, beside = start(**own), start(**own, ray_application="beside")
    beside.wait_ready(READY)
    assert second.process.wait(READY) == 1
    last = second.log.read_text().strip().splitlines()[-1]
    assert f"process {first.process.pid}" in last
    assert "--ray-application" in last
    assert ask(first, QUESTION) == ask(beside, QUESTION) == expected
    assert beside.stop() == 0
    assert ask(first, QUESTION) == expected

    first.process.kill()
    heir = start(**own, context=48)
    heir.wait_ready(READY)
    assert ask(heir, QUESTION) == expected
    # By what it refuses it is seen that none of the dead server's engines answers.
    room = heir.http.post("/generate", json={"prompt": "a " * 60, "max_tokens": 1})
    assert (room.status_code, "room for 4" in room.text) == (413, True), room.text
