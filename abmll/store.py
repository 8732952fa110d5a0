"""Posteriors on disk: a folder that is written beside, fsynced and renamed, and checked when read."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from abmll.calibration import Calibration, ShotCalibration
from abmll.errors import AbmllError, InvalidPosterior, StoreFailure
from abmll.names import GLOBAL
from abmll.posterior import Components, LayerPosterior, Posterior, PosteriorConfig

FORMAT = 1
# As sha256sum writes it, so that `sha256sum -c SHA256SUMS` checks a folder too.
SUMS = "SHA256SUMS"
# Of Linux' renameat2: AT_FDCWD and RENAME_EXCHANGE.
_HERE, _EXCHANGE = -100, 2
# How file systems say that they have no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NAMES = {"posterior.safetensors", "posterior.json", "calibration.json", SUMS, "CARD.md"}


class LayerShape(BaseModel, frozen=True):
    """Dimensions of one layer."""

    d_out: int = Field(gt=0)
    d_in: int = Field(gt=0)


class Record(BaseModel, frozen=True):
    """What ``posterior.json`` says besides the configuration.

    Attributes:
        task: Name of the task; ``global`` for the global posterior.
        version: Counts up from 1 within a task.
        parent: Digest of the posterior that it was adapted from; None for a global one.
        seed: Seed of its training.
        shots: Labelled examples it was adapted with; 0 for a global one.
        created: UTC time, ISO 8601.
        training: Settings of the training that made it.
        results: Figures that its training printed.
    """

    task: str = GLOBAL
    version: int = Field(default=1, ge=1)
    parent: str | None = None
    seed: int = 0
    shots: int = Field(default=0, ge=0)
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    training: dict[str, Any] = Field(default_factory=dict)
    results: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class StoredPosterior:
    """A posterior with its record and calibration.

    Attributes:
        posterior: The parameters, float32 on the CPU.
        record: Where it comes from.
        calibration: How its confidence is made; None if it was never calibrated.
        digest: ``posterior.digest()``.
    """

    posterior: Posterior
    record: Record
    calibration: Calibration | None
    digest: str

    @cached_property
    def answering(self) -> str:
        """Hash of all that makes its answers: posterior and calibration. A version's number says less: a task that
        was deleted and taught again begins with 1 once more.
        """
        calibration = "" if self.calibration is None else self.calibration.model_dump_json()
        return hashlib.sha256(f"{self.digest}{calibration}".encode()).hexdigest()[:32]


class _Component(BaseModel):
    task: str
    family: str


class _File(BaseModel):
    format: int
    digest: str
    config: PosteriorConfig
    record: Record
    layers: dict[str, LayerShape]
    components: list[_Component] = Field(default_factory=list, exclude_if=lambda value: not value)


def _card(posterior: Posterior, record: Record, calibration: Calibration | None) -> str:
    config = posterior.config
    lines = [
        f"# Posterior of task `{record.task}`, version {record.version}",
        "",
        f"A Gaussian posterior over LoRA updates of `{config.base_model}`"
        f"{f' at {config.base_revision}' if config.base_revision else ''}, "
        "made by ABMLL (Zhang, Snell, Griffiths, arXiv 2508.14285).",
        "",
        f"- targets: {', '.join(config.targets)} ({len(posterior.layers)} layers, {posterior.weights:,} weights)",
        f"- scale family: {config.family}; rank {config.rank}; {posterior.parameters:,} parameters; "
        f"{'' if config.members == 1 else f'a mixture of {config.members}; '}"
        f"a draw is a LoRA adapter of rank {config.draw_rank}",
        *(
            []
            if posterior.components is None
            else [f"- a task's prior has {len(posterior.components.tasks)} components"]
        ),
        f"- made {record.created}, seed {record.seed}, {record.shots} labelled examples"
        + (f", from posterior {record.parent}" if record.parent else ""),
    ]
    if calibration is None:
        lines.append("- not calibrated: its confidence is the raw predictive probability")
    lines += [
        f"- after {entry.shots} shots: temperature {_temperature_text(entry)}, ECE on validation tasks "
        f"{entry.ece_before:.3f} before and {entry.ece_after:.3f} after it ({entry.questions} answers)"
        for entry in (calibration.by_shots if calibration else [])
    ]
    lines += [
        f"- after {entry.shots} shots, free text: slope {entry.slope:.3f}, offset {entry.offset:.3f}; ECE on "
        f"validation tasks {entry.ece_before:.3f} before and {entry.ece_after:.3f} after ({entry.questions} answers)"
        for entry in (calibration.texts if calibration else [])
    ]
    return "\n".join(lines) + "\n"


def _temperature_text(entry: ShotCalibration) -> str:
    if entry.support:
        return f"{entry.temperature:.3f} (the task's own, from {entry.support} held-out answers)"
    return f"{entry.temperature:.3f}" + (f" (log T of tasks spread by {entry.spread:.2f})" if entry.spread else "")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_posterior(
    folder: Path,
    posterior: Posterior,
    record: Record,
    calibration: Calibration | None = None,
    publish: Callable[[Path], None] = lambda _: None,
) -> StoredPosterior:
    """Writes a posterior folder; a crash leaves the old folder or none, never a part of the new.

    Args:
        folder: The folder to make; a posterior that is there is replaced, files beside it that are not abmll's stay.
        posterior: The parameters.
        record: Where it comes from.
        calibration: How its confidence is made.
        publish: Given the folder of files that are written but not in their place yet; if it raises, they never are.

    Raises:
        AbmllError: Something else is there, see ``check_replaceable``.
        InvalidPosterior: A parameter is not finite.
        StoreFailure: The disk is full or not writable; nothing is left behind.
    """
    check_replaceable(folder, record.task)
    clean = posterior.map(lambda tensor: tensor.detach().to("cpu", torch.float32).contiguous())
    tensors = clean.tensors()
    components: list[_Component] = []
    if (own := clean.components) is not None:
        tensors |= {f"{name}.components": cores for name, cores in own.cores.items()}
        named = zip(own.tasks, own.families, strict=True)
        components = [_Component(task=task, family=family) for task, family in named]
    _check_finite(tensors, "this posterior")
    shapes = {n: LayerShape(d_out=layer.b.shape[0], d_in=layer.a.shape[1]) for n, layer in posterior.layers.items()}
    digest = clean.digest()
    file = _File(
        format=FORMAT, digest=digest, config=posterior.config, record=record, layers=shapes, components=components
    )
    contents = {
        "posterior.safetensors": save(tensors),
        "posterior.json": (file.model_dump_json(indent=1) + "\n").encode(),
    }
    if calibration is not None:
        contents["calibration.json"] = (calibration.model_dump_json(indent=1) + "\n").encode()
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
    # The card is for people, who may add to it.
    contents |= {SUMS: sums.encode(), "CARD.md": _card(posterior, record, calibration).encode()}
    with replaced(folder) as partial:
        for name, data in contents.items():
            (partial / name).write_bytes(data)
        for path in sorted(folder.iterdir()) if folder.exists() else []:
            if path.name not in _NAMES:
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, partial / path.name)
        publish(partial)
    return StoredPosterior(clean, record, calibration, digest)


def check_replaceable(folder: Path, task: str) -> None:
    """Checks that a posterior folder may be made here; to be asked before hours of work, too.

    Args:
        folder: Where.
        task: Whose posterior; ``global`` for the global one.

    Raises:
        AbmllError: There is a file, or a folder that holds other things than a posterior, or the global posterior where
            a task's is to be, or the other way round: they would be lost.
        StoreFailure: It cannot be made there.
    """
    held = _task_of(folder)
    if held is not None and (held == GLOBAL) != (task == GLOBAL):
        there, new = "the global posterior", "a task's"
        if held != GLOBAL:
            there, new = f"the posterior of task {held!r}", "a global"
        raise AbmllError(f"{folder} holds {there}, which {new} one does not replace: name a new folder", field="out")
    if folder.exists() and not (folder / "posterior.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise AbmllError(
            f"{folder} is there and holds no posterior; it is not replaced: name a new folder, or an empty one",
            field="out",
        )
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise StoreFailure(f"{folder} cannot be made, nothing can be written in {above}; choose another folder", "out")


def _task_of(folder: Path) -> str | None:
    """Whose posterior a folder holds; None where it holds none, or one that is damaged."""
    try:
        return json.loads((folder / "posterior.json").read_text(encoding="utf-8"))["record"]["task"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def replaced(folder: Path) -> Generator[Path]:
    """Gives an empty folder beside ``folder`` to write into, which then is synced and renamed there.

    Raises:
        StoreFailure: Writing failed; nothing is left behind, and what stood there stays.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise StoreFailure(f"cannot write to {folder.parent}: {error}; free space or choose another folder") from error
    try:
        partial.chmod(0o755)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        _swap(folder, partial)
        _sync(folder.parent)
    except OSError as error:
        raise StoreFailure(f"cannot write {folder}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(folder: Path, new: Path) -> None:
    """Puts ``new`` in the place of ``folder``; what stood there is gone, or stands where ``new`` did."""
    if not folder.exists():
        new.rename(folder)
        return
    if not folder.is_symlink() and _exchange(folder, new):
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old / "was")
    try:
        new.rename(folder)
    except OSError:
        (old / "was").rename(folder)
        raise
    finally:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two paths change places in one step, so that one who reads, or a crash, finds neither missing.

    Returns:
        Whether they did: Linux can, on most file systems.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file beside ``path``, synced, and renames it there: what stood there stays until all is written.

    Raises:
        OSError: Writing failed.
    """
    with _written_beside(path, data) as partial:
        partial.replace(path)


def create_file(path: Path, data: bytes) -> None:
    """Writes a file beside ``path``, synced, and puts it there in one step where nothing is; of several, one does.

    Raises:
        FileExistsError: Something is there.
        OSError: Writing failed.
    """
    with _written_beside(path, data) as partial:
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with path.open("xb") as stream:  # some network shares; a crash may leave a part there
                _write_synced(stream, data)


def _write_synced(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def _written_beside(path: Path, data: bytes) -> Generator[Path]:
    """Writes a file beside ``path`` for the block to put in its place; what is then left of it is removed."""
    # A name of its own: two that write at once must not write into each other's file.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            _write_synced(stream, data)
        partial.chmod(0o644)
        yield partial
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


def _check_finite(tensors: dict[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InvalidPosterior(f"{where}: parameter {key} has values that are not finite")


def _expected_shapes(config: PosteriorConfig, shape: LayerShape, components: int) -> dict[str, tuple[int, ...]]:
    a, b = (config.rank, shape.d_in), (shape.d_out, config.rank)
    core = (config.rank, config.rank) if config.members == 1 else (config.members, config.rank, config.rank)
    if config.family == "subspace":
        of_components = {"components": (components, config.rank, config.rank)} if components else {}
        return {"shared.a": a, "shared.b": b, "mean.core": core, "scale.log_s": core} | of_components
    shapes: dict[str, tuple[int, ...]] = {"mean.a": a, "mean.b": b}
    if config.family == "kronecker":
        return shapes | {"scale.log_s": (shape.d_out,), "scale.log_t": (shape.d_in,)}
    return shapes | {"scale.a": (config.scale_rank, shape.d_in), "scale.b": (shape.d_out, config.scale_rank)}


def load_global(folder: Path) -> StoredPosterior:
    """Reads the folder of a global posterior, see ``load_posterior``.

    Raises:
        InvalidPosterior: See ``load_posterior``.
        AbmllError: It is a task's.
    """
    stored = load_posterior(folder)
    if stored.record.task != GLOBAL:
        raise AbmllError(
            f"{folder} holds the posterior of task {stored.record.task!r}; give the global one that it was made from",
            field="posterior",
        )
    if stored.posterior.config.members > 1:
        raise InvalidPosterior(f"{folder} holds a mixture; a global posterior is one Gaussian, which tasks begin at")
    return stored


def load_posterior(folder: Path) -> StoredPosterior:
    """Reads a posterior folder and checks names, shapes, dtypes, finiteness and the contents' hashes.

    Raises:
        InvalidPosterior: The folder is absent or damaged; the message says where.
    """
    json_file, tensor_file = folder / "posterior.json", folder / "posterior.safetensors"
    try:
        file = _File.model_validate_json(json_file.read_bytes())
        tensors = load(tensor_file.read_bytes())
    except OSError as error:
        raise InvalidPosterior(f"{folder} is not a posterior folder: {error}") from error
    except (ValidationError, SafetensorError, ValueError) as error:
        raise InvalidPosterior(f"the posterior in {folder} is damaged ({error}); restore it") from error
    if file.format != FORMAT:
        raise InvalidPosterior(f"{json_file} has format {file.format}; this version reads format {FORMAT}")
    if file.components and (file.config.family != "subspace" or file.config.members > 1 or file.record.task != GLOBAL):
        raise InvalidPosterior(f"{json_file} lists components, which a global subspace posterior alone has")
    expected = {
        f"{name}.{key}": want
        for name, shape in file.layers.items()
        for key, want in _expected_shapes(file.config, shape, len(file.components)).items()
    }
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())[0]
        raise InvalidPosterior(f"{tensor_file}: parameter {odd} is missing or not expected")
    for key, want in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != want or tensor.dtype != torch.float32:
            raise InvalidPosterior(
                f"{tensor_file}: {key} is {tuple(tensor.shape)} {tensor.dtype}, not {want} torch.float32"
            )
    _check_finite(tensors, str(tensor_file))
    offset = file.config.scale_init if file.config.family == "lowrank" else 0.0
    layers: dict[str, LayerPosterior] = {}
    for name, shape in file.layers.items():
        own = {key: tensors[f"{name}.{key}"] for key in _expected_shapes(file.config, shape, 0)}
        scale = {key.removeprefix("scale."): t for key, t in own.items() if key.startswith("scale.")}
        if file.config.family == "subspace":
            layers[name] = LayerPosterior(own["shared.a"], own["shared.b"], scale, core=own["mean.core"])
        else:
            layers[name] = LayerPosterior(own["mean.a"], own["mean.b"], scale, offset)
    posterior = Posterior(file.config, layers)
    if file.components:
        tasks, families = (tuple(getattr(own, field) for own in file.components) for field in ("task", "family"))
        cores = {name: tensors[f"{name}.components"] for name in layers}
        posterior = posterior.with_components(Components(tasks, families, cores))
    digest = posterior.digest()
    if digest != file.digest:
        raise InvalidPosterior(f"{tensor_file} does not match its posterior.json (hash {digest}, not {file.digest})")
    calibration = read_calibration(folder)
    _check_sums(folder)
    return StoredPosterior(posterior, file.record, calibration, digest)


def _check_sums(folder: Path) -> None:
    """Checks each file against ``SHA256SUMS``; a folder without it was written before there was one."""
    path = folder / SUMS
    if not path.exists():
        return
    try:
        for line in path.read_bytes().decode("ascii").removesuffix("\n").split("\n"):
            expected, _, name = line.partition("  ")
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                raise InvalidPosterior(f"{folder / name} is damaged: it does not match {SUMS}; restore it")
    except (OSError, ValueError) as error:
        raise InvalidPosterior(f"{path} is damaged, or names a file that is not there: {error}") from error


def read_calibration(folder: Path) -> Calibration | None:
    """Reads ``calibration.json`` of a posterior folder; None where there is none.

    Raises:
        InvalidPosterior: The file is damaged.
    """
    path = folder / "calibration.json"
    if not path.exists():
        return None
    try:
        return Calibration.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise InvalidPosterior(f"{path} is damaged: {error}") from error
