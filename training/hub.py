"""A base model's files, in a folder or from the Hugging Face hub, and what the hub's errors mean."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from abmll.errors import AbmllError, HubFailure

# Of a repository's top folder, what transformers reads of a text model; no pickle, no code.
_CONFIG = ("config.json",)
_MODEL = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# Folders, and the weights once more in the maker's own format.
_LEFT_OUT = ("*/*", "consolidated*")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
E = TypeVar("E", bound=BaseException)


@dataclass(frozen=True)
class Checkpoint:
    """Where a base model's files lie.

    Attributes:
        folder: The folder.
        commit: Of the hub's repository; None for a folder that was given.
    """

    folder: Path
    commit: str | None


def fetch(model: str, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Finds a base model's files, downloading from the hub what is not in its cache.

    A branch or tag is looked up once a process: whatever is loaded later is of the same commit.

    Args:
        model: Hub name or folder.
        revision: Commit, tag or branch on the hub; means nothing for a folder.
        weights: Whether weights and tokenizer are wanted, too; else the configuration alone.

    Raises:
        HubFailure: The hub is out of reach or gives no access, or its cache cannot be written.
        AbmllError: There is no such model, or its weights are no whole safetensors files.
    """
    if Path(model).is_dir():
        found = Checkpoint(Path(model), None)
    elif Path(model).is_absolute() or model.startswith((".", "~")):
        raise AbmllError(
            f"there is no model folder {model}; give one that holds a config.json, or a name on the hub", field="model"
        )
    else:
        folder = _snapshot(model, revision, _MODEL if weights else _CONFIG)
        found = Checkpoint(folder, folder.name)
    if not (found.folder / "config.json").is_file():
        raise AbmllError(
            f"{model} has no config.json, so it is no model; give a hub name, or a folder that save_pretrained wrote",
            field="model",
        )
    if weights:
        _check_weights(found.folder, model)
    return found


def in_cache(model: str, revision: str | None) -> bool:
    """Whether a model on the hub can be had without asking the hub."""
    return _cached(model, revision, _MODEL) is not None


@functools.cache
def _snapshot(model: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=list(files), ignore_patterns=list(_LEFT_OUT))
        )
    except Exception as error:  # the hub's client has had several HTTP libraries, each with its own errors
        # Where the hub is out of reach, the client wants all that it knows of: other programs fetch less.
        if isinstance(error, FileNotFoundError) and (folder := _cached(model, revision, files)) is not None:
            return folder
        told = reason(error, model, revision)
        kind = AbmllError if told.wrong_name else HubFailure
        raise kind(f"{told.what}; {told.mend}", field="model") from error


def _cached(model: str, revision: str | None, files: Sequence[str]) -> Path | None:
    """Folder of what is needed, if all of that is in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(files), local_files_only=True))
    except IncompleteSnapshotError as error:
        folder = Path(error.snapshot_path)
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    if not (folder / "config.json").is_file():
        return None
    if files == _MODEL:
        try:
            _check_weights(folder, model)
        except AbmllError:
            return None
    return folder


def _check_weights(folder: Path, model: str) -> None:
    """Opens every file of weights, which finds those that are cut short.

    Raises:
        AbmllError: There are no safetensors, one is missing, or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    again = "copy or download the model again"
    names = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file():
        if not (folder / _INDEX).is_file():
            raise AbmllError(
                f"{model} has no {_WEIGHTS}; abmll reads no pickled weights: give a revision that has safetensors, "
                "or convert it once with transformers' save_pretrained",
                field="model",
            )
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AbmllError(f"{_INDEX} of {model} is damaged ({brief(error)}); {again}", field="model") from error
    for name in names:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except FileNotFoundError as error:
            raise AbmllError(f"{name} of {model} is missing; {again}", field="model") from error
        except (SafetensorError, OSError) as error:
            raise AbmllError(f"{name} of {model} is damaged ({brief(error)}); {again}", field="model") from error


class Reason(NamedTuple):
    """What an error of the hub's client means.

    Attributes:
        what: What was wrong.
        mend: What would be right.
        wrong_name: Whether the model's or revision's name is at fault, and not the hub, the token or the disk.
    """

    what: str
    mend: str
    wrong_name: bool = False


def reason(error: Exception, model: str, revision: str | None) -> Reason:
    """Says what an error of the hub's client means.

    Args:
        error: As the client raised it.
        model: What was asked for.
        revision: Of which commit, tag or branch.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{model}"
    pinned = "" if revision is None else f" --revision {revision}"
    once = f"download it once with `hf download {model}{pinned}`, or give a folder"
    refused = _cause(error, HfHubHTTPError)
    if isinstance(error, HFValidationError):
        mend = "check it; names look like OWNER/MODEL"
        return Reason(f"{model} is neither a folder nor a name on the hub", mend, wrong_name=True)
    if isinstance(refused, GatedRepoError):
        accept = f"accept the licence on {page}, then set HF_TOKEN"
        if get_token() is None:
            return Reason(f"{model} is gated, and HF_TOKEN is not set", f"{accept} to a token of that account")
        mend = f"{accept} to a token of an account that may"
        return Reason(f"{model} is gated, and the token's account has no access", mend)
    if isinstance(refused, RepositoryNotFoundError):
        mend = "check the name; a private model needs HF_TOKEN"
        return Reason(f"there is no folder {model}, and the hub knows no model of that name", mend, wrong_name=True)
    if isinstance(refused, RevisionNotFoundError):
        mend = f"give a branch, tag or whole commit from {page}/commits/main"
        return Reason(f"{model} has no revision {revision}", mend, wrong_name=True)
    if refused is not None and refused.response.status_code in (401, 403):
        said = brief(refused.server_message or refused)
        return Reason(f"the hub refuses {model}: {said}", "check HF_TOKEN and its rights")
    if constants.HF_HUB_OFFLINE:
        at = "" if revision is None else f" at {revision}"
        mend = f"HF_HUB_OFFLINE is set: online, {once}"
        return Reason(f"{model}{at} is not in the hub's cache, or not whole", mend)
    if isinstance(error, OSError) and error.errno is not None:
        mend = "free space, or set HF_HOME"
        return Reason(f"{model} cannot be written to the hub's cache ({brief(error)})", mend)
    what = brief(refused or error.__cause__ or error)
    return Reason(f"the hub at {constants.ENDPOINT} cannot be reached ({what})", f"get online and {once}")


def _cause(error: BaseException | None, kind: type[E]) -> E | None:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def brief(error: object) -> str:
    """The beginning of a message that may have many lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
