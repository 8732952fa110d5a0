from __future__ import annotations

import contextlib
import fcntl
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from abmll.adaptive import Scatter
from abmll.calibration import Calibration, ShotCalibration
from abmll.curves import curves
from abmll.layers import attach, init_posterior
from abmll.posterior import Posterior, PosteriorConfig, mixture
from abmll.store import Record, StoredPosterior, save_posterior
from abmll.text_calibration import TextCalibration
from server.settings import Settings
from tests.server.process import start
from training.base_model import BaseModel, load_base


@pytest.fixture(scope="session")
def base(tiny_model_folder: Path) -> BaseModel:
    """A copy of the model without anything attached: the tests' oracle."""
    return load_base(str(tiny_model_folder))


# Two that vLLM fuses with a third, and two that it does not.
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def random_posterior(
    folder: Path, seed: int, *, family: Any = "kronecker", noise: float = 0.05, layers: str = "all"
) -> Posterior:
    """A posterior whose mean and scales differ from their start; a ``mixture`` of two, as if it were a family."""
    if family == "mixture":
        one, two = (random_posterior(folder, seed + n, family="subspace", noise=noise, layers=layers) for n in (0, 100))
        shared = {key: tensor for key, tensor in one.tensors().items() if ".shared." in key}
        return mixture([one, two.with_tensors(two.tensors() | shared)])
    model = load_base(str(folder)).model
    config = PosteriorConfig(base_model=str(folder), targets=TARGETS, layers=layers, family=family, scale_init=0.02)
    posterior = init_posterior(attach(model, config.targets, layers), config, seed)
    generator = torch.Generator().manual_seed(seed)
    return posterior.map(lambda t: t + noise * torch.randn(t.shape, generator=generator))


def greedy(model: Any, prompt: Sequence[int], count: int, end: int) -> list[int]:
    """The likeliest tokens after a prompt, one pass a token; ``end`` ends them."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best == end:
                break
            ids.append(best)
    return ids[len(prompt) :]


@pytest.fixture(scope="session")
def global_posterior(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StoredPosterior]:
    entries = [
        ShotCalibration(
            shots=shots,
            temperature=t,
            spread=spread,
            conformal={"0.9": 0.95},
            risk={"0.20": 0.999, "0.50": 0.0},
            ece_before=0.1,
            ece_after=0.05,
            questions=100,
            scatter=Scatter(within=0.1, curvature=0.5),
            confidence=0.6,
            epistemic=0.05,
            curves=None if shots == 0 else curves(torch.linspace(0.3, 0.9, 50), torch.arange(50) % 3 > 0),
        )
        for shots, t, spread in ((0, 2.0, 0.0), (4, 1.5, 0.5), (16, 1.25, 0.5))
    ]
    texts = [
        TextCalibration(
            shots=shots, slope=0.25, offset=1.0, risk={"0.20": 0.999, "0.50": 0.0},
            accuracy=0.3, ece_before=0.1, ece_after=0.05, questions=100,
        )
        for shots in (0, 4)
    ]  # fmt: skip
    calibration = Calibration(by_shots=entries, texts=texts, fitted_on=["a", "b"], draws=8)
    inner = {"steps": 5, "learning_rate": 5e-3, "beta": 1e-5}
    record = Record(task="global", training={"inner": inner})
    folder = tmp_path_factory.mktemp("global") / "posterior"
    return folder, save_posterior(folder, random_posterior(tiny_model_folder, 1), record, calibration)


def all_processes(server: Server) -> list[psutil.Process]:
    """Processes that the server began, and those that these began."""
    return psutil.Process(server.process.pid).children(recursive=True)


def assert_ended(processes: list[psutil.Process], seconds: float) -> None:
    """Checks that processes end within some seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert alive == []


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """Where several processes share the tests, one of them at a time has a cluster of Ray."""
    with (Path(tempfile.gettempdir()) / "abmll-tests-ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


class Server:
    """A server in a process of its own."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.settings = settings
        self.url = f"http://127.0.0.1:{settings.port}"
        self.log = log
        self.process = start(settings, log)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def wait_ready(self, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/readyz").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready after {seconds} s: {self.log.read_text()}")

    def stop(self) -> int:
        self.http.close()
        self.process.terminate()
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def wait_job(self, job: str, seconds: float = 240) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            reply = self.http.get(f"/adapt/{job}").json()
            if reply["status"] not in ("queued", "running"):
                return reply
            time.sleep(0.1)
        raise AssertionError(f"job {job} is not done after {seconds} s: {self.log.read_text()}")


@contextmanager
def servers(
    model: Path, posterior: tuple[Path, StoredPosterior], folders: pytest.TempPathFactory
) -> Generator[Callable[..., Server], None, None]:
    """Yields what starts servers; ends them all after it."""
    started: list[Server] = []

    def start(store: Path | None = None, *, wait: bool = True, **options: Any) -> Server:
        settings = Settings(
            port=free_port(),
            engine="torch",
            model=str(model),
            posterior=posterior[0],
            store=store or folders.mktemp("server") / "store",
        ).model_copy(update=options)
        server = Server(settings, folders.mktemp("log") / "server.log")
        started.append(server)
        if wait:
            server.wait_ready()
        return server

    try:
        yield start
    finally:
        for server in started:
            server.http.close()
            if server.process.poll() is None:
                server.stop()


@pytest.fixture(scope="module")
def start_server(
    tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """Servers of one file of tests: with its worker each takes 0.7 GB, and vLLM's 4."""
    with servers(tiny_model_folder, global_posterior, tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def at_the_end() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Takes checks that are made after all tests: of what takes a while that nobody has to wait for."""
    checks: list[Callable[[], None]] = []
    yield checks.append
    for check in checks:
        check()


@pytest.fixture(scope="session")
def server(
    tiny_model_folder: Path, global_posterior: tuple[Path, StoredPosterior], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with servers(tiny_model_folder, global_posterior, tmp_path_factory) as start:
        yield start()
