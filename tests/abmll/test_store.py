"""What is written is what is read, or an error that says what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from abmll.calibration import Calibration, ShotCalibration
from abmll.errors import AbmllError, InvalidPosterior
from abmll.layers import Attached
from abmll.posterior import Family, Posterior
from abmll.store import Record, load_posterior, save_posterior
from tests.abmll.conftest import random_posterior

CALIBRATION = Calibration(
    by_shots=[
        ShotCalibration(shots=0, temperature=2, conformal={"0.9": 0.9}, ece_before=0.2, ece_after=0.1, questions=9)
    ],
    fitted_on=["a"],
    draws=8,
)


def posterior_of(attached: Attached, family: Family = "kronecker", seed: int = 1) -> Posterior:
    return random_posterior(attached, family, ("q_proj", "v_proj"), seed)


def test_a_posterior_comes_back_as_it_was(llama: Attached, family: Family, tmp_path: Path) -> None:
    posterior = posterior_of(llama, family)
    record = Record(task="films", version=3, parent="abc", shots=16, training={"inner": {"steps": 8}})
    stored = save_posterior(tmp_path / "p", posterior, record, CALIBRATION)
    loaded = load_posterior(tmp_path / "p")
    assert loaded.record == record
    assert loaded.calibration == CALIBRATION
    assert loaded.digest == stored.digest == posterior.digest()
    assert loaded.posterior.config == posterior.config
    for key, tensor in posterior.tensors().items():
        assert torch.equal(loaded.posterior.tensors()[key], tensor)
    assert {layer.offset for layer in loaded.posterior.layers.values()} == {0.05 if family == "lowrank" else 0.0}
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        "posterior.safetensors", "posterior.json", "calibration.json", "CARD.md", "SHA256SUMS",
    }  # fmt: skip
    assert "after 0 shots: temperature 2.000" in (tmp_path / "p" / "CARD.md").read_text()


def test_what_is_not_a_posterior_is_not_replaced(llama: Attached, tmp_path: Path) -> None:
    posterior, notes = posterior_of(llama), tmp_path / "project" / "notes.txt"
    notes.parent.mkdir()
    save_posterior(notes.parent, posterior, Record())
    notes.write_text("mine")
    (notes.parent / "more").mkdir()
    save_posterior(notes.parent, posterior, Record(version=2), CALIBRATION)
    assert load_posterior(notes.parent).record.version == 2
    assert (notes.read_text(), (notes.parent / "more").is_dir()) == ("mine", True)
    (notes.parent / "posterior.json").unlink()
    for folder in (notes.parent, notes):
        with pytest.raises(AbmllError, match="is there and holds no posterior"):
            save_posterior(folder, posterior, Record())
    assert notes.read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a folder is gone for a moment while it is replaced")
def test_one_who_reads_finds_a_posterior_at_every_moment_of_its_replacement(llama: Attached, tmp_path: Path) -> None:
    folder, posterior = tmp_path / "p", posterior_of(llama)
    save_posterior(folder, posterior, Record())
    written = threading.Event()

    def look() -> set[bool]:
        seen = {True}
        while not written.is_set():
            seen.add(folder.exists())
        return seen

    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(look)
        for version in range(2, 30):
            save_posterior(folder, posterior, Record(version=version))
        written.set()
    assert seen.result() == {True}
    assert load_posterior(folder).record.version == 29
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_link_to_a_posterior_is_replaced_and_leaves_nothing_beside(llama: Attached, tmp_path: Path) -> None:
    folder, posterior = tmp_path / "p", posterior_of(llama)
    save_posterior(tmp_path / "elsewhere", posterior, Record())
    folder.symlink_to(tmp_path / "elsewhere")
    save_posterior(folder, posterior, Record(version=2))
    assert load_posterior(folder).record.version == 2
    assert load_posterior(tmp_path / "elsewhere").record.version == 1
    assert {path.name for path in tmp_path.iterdir()} == {"p", "elsewhere"}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_noticed(
    llama: Attached, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "p"
    save_posterior(folder, posterior_of(llama), Record(task="films"), CALIBRATION)
    name = data.draw(st.sampled_from(["posterior.safetensors", "posterior.json", "calibration.json", "SHA256SUMS"]))
    content = bytearray((folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    with pytest.raises(InvalidPosterior):
        load_posterior(folder)


@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_no_posterior(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("arbitrary")
    (folder / "posterior.json").write_bytes(content)
    (folder / "posterior.safetensors").write_bytes(content)
    with pytest.raises(InvalidPosterior):
        load_posterior(folder)


def _json(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "posterior.json").read_text())
        change(content)
        (folder / "posterior.json").write_text(json.dumps(content))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "posterior.safetensors")
        change(tensors, next(key for key in tensors if key.endswith("mean.a")))
        save_file(tensors, folder / "posterior.safetensors")

    return damage


def _not_finite(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key][0, 0] = float("nan")


def _missing(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


def _moved(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key][0, 0] += 1e-3


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no json": (lambda folder: (folder / "posterior.json").unlink(), "not a posterior folder"),
    "no tensors": (lambda folder: (folder / "posterior.safetensors").unlink(), "not a posterior folder"),
    "garbage json": (lambda folder: (folder / "posterior.json").write_text("{"), "damaged"),
    "garbage tensors": (lambda folder: (folder / "posterior.safetensors").write_bytes(b"\x80\x04K"), "damaged"),
    "truncated": (
        lambda folder: os.truncate(folder / "posterior.safetensors", 900),
        "damaged",
    ),
    "later format": (_json(lambda c: c.update(format=2)), "reads format 1"),
    "unknown family": (_json(lambda c: c["config"].update(family="dense")), "damaged"),
    "other rank": (_json(lambda c: c["config"].update(rank=4)), "not \\(4,"),
    "nan": (_tensors(_not_finite), "not finite"),
    "missing": (_tensors(_missing), "missing or not expected"),
    "unexpected": (_tensors(lambda t, key: t.update(more=t[key].clone())), "missing or not expected"),
    "transposed": (_tensors(lambda t, key: t.update({key: t[key].T.contiguous()})), "is \\("),
    "half": (_tensors(lambda t, key: t.update({key: t[key].half()})), "torch.float16"),
    "one bit": (_tensors(_moved), "does not match"),
    "calibration": (lambda folder: (folder / "calibration.json").write_text('{"by_shots": []}'), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told(llama: Attached, tmp_path: Path, damage: str) -> None:
    save_posterior(tmp_path / "p", posterior_of(llama), Record(), CALIBRATION)
    change, message = DAMAGES[damage]
    change(tmp_path / "p")
    with pytest.raises(InvalidPosterior, match=message):
        load_posterior(tmp_path / "p")


def test_what_is_not_finite_is_not_written(llama: Attached, tmp_path: Path) -> None:
    broken = posterior_of(llama).map(lambda tensor: tensor * float("inf"))
    with pytest.raises(InvalidPosterior, match="not finite"):
        save_posterior(tmp_path / "p", broken, Record())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(llama: Attached, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AbmllError, match="choose another folder"):
        save_posterior(tmp_path / "file" / "p", posterior_of(llama), Record())


_WRITER = """
import sys
from pathlib import Path
from abmll.store import Record, load_posterior, save_posterior
folder = Path(sys.argv[1])
stored = load_posterior(folder)
print("begun", flush=True)
while True:
    for factor in (1.0, 1.5):
        save_posterior(folder, stored.posterior.map(lambda t: t * factor), Record(task=str(factor)))
"""


def test_a_kill_while_writing_leaves_the_old_or_the_new_never_a_part(llama: Attached, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    posterior = posterior_of(llama)
    digests = {posterior.map(lambda t, f=f: t * f).digest() for f in (1.0, 1.5)}
    for attempt in range(3):
        save_posterior(folder, posterior, Record())
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.05 + 0.037 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        kept = folder if folder.exists() else next(tmp_path.glob(".p.old.*/was"))
        assert load_posterior(kept).digest in digests
