"""The client, waiting (``Client``) and asynchronous (``AsyncClient``): the same methods on both."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx

from clients import calls
from clients.calls import Call, Normalize
from clients.errors import ApiError, ClientError, JobTimeout, ReplyTimeout, ServerUnreachable
from clients.examples import LabelledExample
from clients.replies import Answer, Feedback, Job, Recalibration, TaskInfo

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_SECONDS = 5.0
_PAUSES = (0.2, 0.8)  # seconds before a GET whose connection failed is sent again
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)


def _settings(url: str | None, timeout: float, key: str | None) -> dict[str, Any]:
    base = (url or os.environ.get("ABMLL_URL") or DEFAULT_URL).rstrip("/")
    try:
        parsed = httpx.URL(base)
    except httpx.InvalidURL as error:
        raise ServerUnreachable(f"{base!r} is not a URL ({error}); give one such as {DEFAULT_URL}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerUnreachable(f"{base!r} is not a server's URL; give one such as {DEFAULT_URL}")
    key = key or os.environ.get("ABMLL_KEY")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ClientError("the API key holds characters that no key has; give it as `abmll keys add` printed it")
    return {
        "base_url": base,
        "timeout": httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)),
        "headers": {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    }


def _pauses(call: Call[Any]) -> tuple[float | None, ...]:
    """Seconds to wait after each failed attempt; None: give up."""
    return (*_PAUSES, None) if call.method == "GET" else (None,)


def _translate(error: httpx.HTTPError, url: httpx.URL) -> ClientError:
    if isinstance(error, _BROKEN):
        return ServerUnreachable(f"no server answers at {url} ({error or type(error).__name__})")
    if isinstance(error, httpx.TimeoutException):
        return ReplyTimeout(f"{url} did not reply in time; give a longer timeout, or ask again later")
    return ClientError(f"the request to {url} failed: {error or type(error).__name__}")


def _expired(job: Job, deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise JobTimeout(f"job {job.job} was still {job.status} when the waiting ended; it runs on", job)


class Client:
    """A connection to a server, for code that waits.

    Args:
        url: The server's address; ``$ABMLL_URL`` or ``http://127.0.0.1:8000`` by default.
        timeout: Longest wait for a reply, in seconds.
        key: API key, where the server asks for one; ``$ABMLL_KEY`` by default.
        transport: Another way to send requests, as httpx takes it.

    All methods raise ``ServerUnreachable``, ``ReplyTimeout``, ``ApiError`` (``NotFound``,
    ``RequestRejected``, ``AccessDenied``, ``Conflict``, ``ServerUnavailable``) and ``InvalidReply``.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout: float = 60.0,
        key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**_settings(url, timeout, key), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def generate(
        self,
        prompt: str,
        *,
        task: str = "global",
        version: int | None = None,
        options: Sequence[str] | None = None,
        draws: int | Literal["auto"] = "auto",
        tolerance: float = 0.02,
        seed: int = 0,
        abstain_below: float | None = None,
        target_risk: float | None = None,
        max_tokens: int = 32,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        samples: int = 0,
        tokens: bool = False,
        normalize: Normalize | None = None,
    ) -> Answer:
        """Asks a question: which of ``options``, or free text without them.

        With automatic draws, ``tolerance`` is what further ones may move the confidence by. Below the confidence
        ``abstain_below``, or one by which at most ``target_risk`` of questions get a wrong answer on average, there is
        none. A free text takes the likeliest tokens, or at a ``temperature`` above 0 chooses them by ``seed``;
        ``samples`` more of them tell how far the model agrees with itself; ``tokens``: whether the answer tells it
        token by token.
        """
        return self._send(
            calls.generate(
                prompt,
                task=task,
                version=version,
                options=options,
                draws=draws,
                tolerance=tolerance,
                seed=seed,
                abstain_below=abstain_below,
                target_risk=target_risk,
                max_tokens=max_tokens,
                stop=stop,
                temperature=temperature,
                top_p=top_p,
                samples=samples,
                tokens=tokens,
                normalize=normalize,
            )
        )

    def score(
        self,
        prompt: str,
        answer: str,
        *,
        task: str = "global",
        version: int | None = None,
        draws: int | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> Answer:
        """Has a finished answer scored, from another model or a person: whole and token by token."""
        return self._send(calls.score(prompt, answer, task=task, version=version, draws=draws, seed=seed))

    def adapt(
        self,
        task: str,
        examples: Sequence[LabelledExample | Mapping[str, Any]],
        *,
        steps: int | None = None,
        seed: int = 0,
    ) -> Job:
        """Starts to teach a task from labelled examples; ``wait`` for the job."""
        return self._send(calls.adapt(task, examples, steps=steps, seed=seed))

    def job(self, id: str) -> Job:
        """Tells how an adaptation job stands."""
        return self._send(calls.job(id))

    def cancel(self, id: str) -> Job:
        """Cancels an adaptation job; one that has ended stays as it is."""
        return self._send(calls.cancel(id))

    def follow(self, job: Job | str, *, timeout: float | None = None, poll: float = 0.5) -> Iterator[Job]:
        """Yields the job every ``poll`` seconds, the last time when it has ended.

        Raises:
            JobTimeout: It was still under way after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        current = self.job(job) if isinstance(job, str) else job
        while True:
            yield current
            if current.ended:
                return
            _expired(current, deadline)
            time.sleep(poll)
            current = self.job(current.job)

    def wait(self, job: Job | str, timeout: float | None = None, poll: float = 0.5) -> Job:
        """Returns the job once it is done.

        Raises:
            JobFailed: It failed.
            JobCancelled: It was cancelled.
            JobTimeout: It was still under way after ``timeout`` seconds.
        """
        *_, last = self.follow(job, timeout=timeout, poll=poll)
        return calls.require_done(last)

    def tasks(self) -> list[TaskInfo]:
        """Lists the tasks, ``global`` first."""
        return self._send(calls.tasks())

    def task(self, name: str) -> TaskInfo:
        """Tells a task's calibration and history."""
        return self._send(calls.task(name))

    def delete_task(self, name: str) -> None:
        """Removes a task with all its versions."""
        self._send(calls.delete_task(name))

    def serve(self, name: str, versions: Mapping[int, float] | int | None) -> TaskInfo:
        """Says which version of a task answers, or which share the questions; None: always the newest."""
        return self._send(calls.serve(name, versions))

    def feedback(
        self, answered: Answer | str, *, answer: str | int | None = None, correct: bool | None = None
    ) -> Feedback:
        """Tells the right answer (text or index) to a question that was answered, or whether the answer was right."""
        request_id = answered if isinstance(answered, str) else answered.request_id
        return self._send(calls.feedback(request_id, answer=answer, correct=correct))

    def recalibrate(self, name: str, *, version: int | None = None, apply: bool = False) -> Recalibration:
        """Fits a task's temperature to its feedback; with ``apply``, makes a new version with it."""
        return self._send(calls.recalibrate(name, version=version, apply=apply))

    def healthy(self) -> bool:
        """Says whether the server lives; False where none can be reached."""
        return self._check("/healthz")

    def ready(self) -> bool:
        """Says whether the server answers questions now; False where none can be reached."""
        return self._check("/readyz")

    def _check(self, path: Literal["/healthz", "/readyz"]) -> bool:
        try:
            self._send(calls.check(path))
        except (ApiError, ServerUnreachable, ReplyTimeout):
            return False
        return True

    def _send(self, call: Call[T]) -> T:
        for pause in _pauses(call):
            try:
                reply = self._http.request(call.method, call.path, json=call.body)
            except httpx.HTTPError as error:
                if pause is None or not isinstance(error, _BROKEN):
                    raise _translate(error, self._http.base_url) from error
                time.sleep(pause)
            else:
                return calls.read(call, reply.status_code, reply.text)
        raise AssertionError("the last attempt returns or raises")


class AsyncClient:
    """A connection to a server, for asynchronous code; see ``Client``."""

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout: float = 60.0,
        key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**_settings(url, timeout, key), transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def generate(
        self,
        prompt: str,
        *,
        task: str = "global",
        version: int | None = None,
        options: Sequence[str] | None = None,
        draws: int | Literal["auto"] = "auto",
        tolerance: float = 0.02,
        seed: int = 0,
        abstain_below: float | None = None,
        target_risk: float | None = None,
        max_tokens: int = 32,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        samples: int = 0,
        tokens: bool = False,
        normalize: Normalize | None = None,
    ) -> Answer:
        """Asks a question: which of ``options``, or free text without them.

        With automatic draws, ``tolerance`` is what further ones may move the confidence by. Below the confidence
        ``abstain_below``, or one by which at most ``target_risk`` of questions get a wrong answer on average, there is
        none. A free text takes the likeliest tokens, or at a ``temperature`` above 0 chooses them by ``seed``;
        ``samples`` more of them tell how far the model agrees with itself; ``tokens``: whether the answer tells it
        token by token.
        """
        return await self._send(
            calls.generate(
                prompt,
                task=task,
                version=version,
                options=options,
                draws=draws,
                tolerance=tolerance,
                seed=seed,
                abstain_below=abstain_below,
                target_risk=target_risk,
                max_tokens=max_tokens,
                stop=stop,
                temperature=temperature,
                top_p=top_p,
                samples=samples,
                tokens=tokens,
                normalize=normalize,
            )
        )

    async def score(
        self,
        prompt: str,
        answer: str,
        *,
        task: str = "global",
        version: int | None = None,
        draws: int | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> Answer:
        """Has a finished answer scored, from another model or a person: whole and token by token."""
        return await self._send(calls.score(prompt, answer, task=task, version=version, draws=draws, seed=seed))

    async def adapt(
        self,
        task: str,
        examples: Sequence[LabelledExample | Mapping[str, Any]],
        *,
        steps: int | None = None,
        seed: int = 0,
    ) -> Job:
        """Starts to teach a task from labelled examples; ``wait`` for the job."""
        return await self._send(calls.adapt(task, examples, steps=steps, seed=seed))

    async def job(self, id: str) -> Job:
        """Tells how an adaptation job stands."""
        return await self._send(calls.job(id))

    async def cancel(self, id: str) -> Job:
        """Cancels an adaptation job; one that has ended stays as it is."""
        return await self._send(calls.cancel(id))

    async def follow(self, job: Job | str, *, timeout: float | None = None, poll: float = 0.5) -> AsyncIterator[Job]:
        """Yields the job every ``poll`` seconds, the last time when it has ended; as ``Client.follow``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        current = await self.job(job) if isinstance(job, str) else job
        while True:
            yield current
            if current.ended:
                return
            _expired(current, deadline)
            await asyncio.sleep(poll)
            current = await self.job(current.job)

    async def wait(self, job: Job | str, timeout: float | None = None, poll: float = 0.5) -> Job:
        """Returns the job once it is done; raises as ``Client.wait``."""
        last = [seen async for seen in self.follow(job, timeout=timeout, poll=poll)][-1]
        return calls.require_done(last)

    async def tasks(self) -> list[TaskInfo]:
        """Lists the tasks, ``global`` first."""
        return await self._send(calls.tasks())

    async def task(self, name: str) -> TaskInfo:
        """Tells a task's calibration and history."""
        return await self._send(calls.task(name))

    async def delete_task(self, name: str) -> None:
        """Removes a task with all its versions."""
        await self._send(calls.delete_task(name))

    async def serve(self, name: str, versions: Mapping[int, float] | int | None) -> TaskInfo:
        """Says which version of a task answers, or which share the questions; None: always the newest."""
        return await self._send(calls.serve(name, versions))

    async def feedback(
        self, answered: Answer | str, *, answer: str | int | None = None, correct: bool | None = None
    ) -> Feedback:
        """Tells the right answer (text or index) to a question that was answered, or whether the answer was right."""
        request_id = answered if isinstance(answered, str) else answered.request_id
        return await self._send(calls.feedback(request_id, answer=answer, correct=correct))

    async def recalibrate(self, name: str, *, version: int | None = None, apply: bool = False) -> Recalibration:
        """Fits a task's temperature to its feedback; with ``apply``, makes a new version with it."""
        return await self._send(calls.recalibrate(name, version=version, apply=apply))

    async def healthy(self) -> bool:
        """Says whether the server lives; False where none can be reached."""
        return await self._check("/healthz")

    async def ready(self) -> bool:
        """Says whether the server answers questions now; False where none can be reached."""
        return await self._check("/readyz")

    async def _check(self, path: Literal["/healthz", "/readyz"]) -> bool:
        try:
            await self._send(calls.check(path))
        except (ApiError, ServerUnreachable, ReplyTimeout):
            return False
        return True

    async def _send(self, call: Call[T]) -> T:
        for pause in _pauses(call):
            try:
                reply = await self._http.request(call.method, call.path, json=call.body)
            except httpx.HTTPError as error:
                if pause is None or not isinstance(error, _BROKEN):
                    raise _translate(error, self._http.base_url) from error
                await asyncio.sleep(pause)
            else:
                return calls.read(call, reply.status_code, reply.text)
        raise AssertionError("the last attempt returns or raises")
