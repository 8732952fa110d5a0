"""The HTTP contract as data: each call is a request and how to read its reply. No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from clients.errors import InvalidArgument, InvalidReply, JobCancelled, JobFailed, api_error
from clients.examples import Examples, records_of
from clients.replies import Answer, Feedback, Health, Job, Recalibration, Reliability, TaskInfo

T = TypeVar("T")
Normalize = Literal["sum", "mean"]


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and what its reply holds.

    Attributes:
        method: HTTP method; a GET may be repeated.
        path: Path on the server, escaped.
        read: From the reply's JSON (None without a body) to its value.
        body: JSON to send.
        timeout: Seconds that the server may take, where the caller says them.
    """

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    read: Callable[[Any], T]
    body: dict[str, Any] | None = None
    timeout: float | None = None


def generate(
    prompt: str,
    *,
    task: str,
    version: int | None,
    options: Sequence[str] | None,
    draws: int | Literal["auto"],
    tolerance: float,
    seed: int,
    abstain_below: float | None,
    target_risk: float | None,
    max_tokens: int,
    stop: Sequence[str],
    temperature: float,
    top_p: float,
    samples: int,
    meaning: Literal["normalized", "entailment"],
    tokens: bool,
    normalize: Normalize | None,
    timeout: float | None,
) -> Call[Answer]:
    """Asks a question."""
    body = {
        "prompt": prompt,
        "task": task,
        "version": version,
        "options": None if options is None else _texts("options", options),
        "draws": draws,
        "tolerance": tolerance,
        "seed": seed,
        "abstain_below": abstain_below,
        "target_risk": target_risk,
        "max_tokens": max_tokens,
        "stop": _texts("stop", stop),
        "temperature": temperature,
        "top_p": top_p,
        "samples": samples,
        "meaning": meaning,
        "tokens": tokens,
        "normalize": normalize,
        "timeout": timeout,
    }
    return Call("POST", "/generate", _reader(Answer), body, timeout)


def stream(prompt: str, **settings: Any) -> Call[Answer]:
    """Asks for a free text as it comes; ``settings`` as ``generate`` takes them."""
    usual: dict[str, Any] = {
        "options": None, "tolerance": 0.0, "abstain_below": None, "target_risk": None, "normalize": None,
    }  # fmt: skip
    call = generate(prompt, **(usual | settings))
    return replace(call, body={**(call.body or {}), "stream": True})


def score(
    prompt: str,
    answer: str,
    *,
    task: str,
    version: int | None,
    draws: int | Literal["auto"],
    seed: int,
    end: bool,
    timeout: float | None,
) -> Call[Answer]:
    """Has a finished answer scored."""
    body = {
        "prompt": prompt, "answer": answer, "task": task, "version": version, "draws": draws, "seed": seed, "end": end,
        "timeout": timeout,
    }  # fmt: skip
    return Call("POST", "/score", _reader(Answer), body, timeout)


def adapt(task: str, examples: Examples, *, steps: int | None, seed: int) -> Call[Job]:
    """Starts to teach a task."""
    body = {"task": task, "examples": records_of(examples), "steps": steps, "seed": seed}
    return Call("POST", "/adapt", _reader(Job), body)


def jobs() -> Call[list[Job]]:
    """Lists the newest jobs."""
    return Call("GET", "/adapt", _reader(list[Job]))


def job(id: str) -> Call[Job]:
    """Asks how a job stands."""
    return Call("GET", f"/adapt/{quote(id, safe='')}", _reader(Job))


def cancel(id: str) -> Call[Job]:
    """Cancels a job."""
    return Call("DELETE", f"/adapt/{quote(id, safe='')}", _reader(Job))


def tasks() -> Call[list[TaskInfo]]:
    """Lists the tasks."""
    return Call("GET", "/tasks", _reader(list[TaskInfo]))


def task(name: str) -> Call[TaskInfo]:
    """Asks for one task's calibration and history."""
    return Call("GET", f"/tasks/{quote(name, safe='')}", _reader(TaskInfo))


def delete_task(name: str) -> Call[None]:
    """Removes a task with all its versions."""
    return Call("DELETE", f"/tasks/{quote(name, safe='')}", lambda _: None)


def delete_version(name: str, version: int) -> Call[None]:
    """Removes a version of a task."""
    return Call("DELETE", f"/tasks/{quote(name, safe='')}/versions/{version}", lambda _: None)


def serve(name: str, versions: Mapping[int, float] | int | None) -> Call[TaskInfo]:
    """Says which versions of a task answer."""
    shares = {versions: 1.0} if isinstance(versions, int) else versions
    body = None if shares is None else {str(number): share for number, share in shares.items()}
    return Call("PUT", f"/tasks/{quote(name, safe='')}/serving", _reader(TaskInfo), {"versions": body})


def reliability(name: str, *, version: int | None) -> Call[Reliability]:
    """Asks how far a version's confidence held."""
    query = "" if version is None else f"?version={version}"
    return Call("GET", f"/tasks/{quote(name, safe='')}/reliability{query}", _reader(Reliability))


def recalibrate(name: str, *, version: int | None, apply: bool) -> Call[Recalibration]:
    """Fits a task's temperature to its feedback."""
    path = f"/tasks/{quote(name, safe='')}/recalibrate"
    return Call("POST", path, _reader(Recalibration), {"version": version, "apply": apply})


def feedback(request_id: str, *, answer: str | int | None, correct: bool | None) -> Call[Feedback]:
    """Tells the right answer, or whether the answer was right."""
    body = {"request_id": request_id, "answer": answer, "correct": correct}
    return Call("POST", "/feedback", _reader(Feedback), body)


def check(path: Literal["/healthz", "/readyz"]) -> Call[Health]:
    """Asks whether the server lives, or answers."""
    return Call("GET", path, _reader(Health))


def request_of(call: Call[T]) -> dict[str, Any]:
    """Returns what httpx takes for a call.

    Raises:
        InvalidArgument: Something in the body has no form in JSON.
    """
    wanted: dict[str, Any] = {"method": call.method, "url": call.path}
    if call.body is None:
        return wanted
    try:
        body = json.dumps(call.body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{call.method} {call.path}: an argument has no form in JSON: {error}") from error
    return wanted | {"content": body, "headers": {"Content-Type": "application/json"}}


def read(call: Call[T], status: int, text: str, retry_after: str | None = None) -> T:
    """Reads a reply; ``retry_after`` is its header, where there is one.

    Raises:
        ApiError: The status is not one of success.
        InvalidReply: The reply does not keep the contract.
    """
    try:
        content = TypeAdapter(Any).validate_json(text) if text else None
    except ValidationError as error:
        if status >= 400:
            raise api_error(status, text, retry_after) from error
        raise InvalidReply(f"{call.method} {call.path}: the reply is not JSON; is this an abmll server?") from error
    if not 200 <= status < 300:
        raise api_error(status, content if content is not None else "", retry_after)
    try:
        return call.read(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(piece) for piece in first["loc"]) or "the reply"
        raise InvalidReply(f"{call.method} {call.path}: {where}: {first['msg']}; another version's server?") from error


def require_done(job: Job) -> Job:
    """Returns a job that is done.

    Raises:
        JobFailed: It failed.
        JobCancelled: It was cancelled.
    """
    if job.status == "failed":
        raise JobFailed(f"job {job.job} for task {job.task!r} failed: {job.error or 'no reason given'}", job)
    if job.status == "cancelled":
        raise JobCancelled(f"job {job.job} for task {job.task!r} was cancelled", job)
    return job


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise InvalidArgument(f"{name} is the one text {texts[:80]!r}; give a list of texts")
    return list(texts)


def _reader(kind: type[T]) -> Callable[[Any], T]:
    return TypeAdapter(kind).validate_python
