"""The client, for code that waits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx
from httpx_sse import EventSource, SSEError

from clients import calls
from clients.calls import Call, Normalize
from clients.connection import (
    BROKEN,
    DEFAULT_TIMEOUT,
    PASSING,
    Patience,
    check_deadline,
    pauses,
    rest,
    sent,
    settings_of,
    translate,
)
from clients.errors import ApiError, InvalidReply, ReplyTimeout, ServerUnreachable
from clients.examples import Examples
from clients.replies import Answer, Feedback, Job, Recalibration, Reliability, StreamedToken, TaskInfo
from clients.streaming import cut_off, read_event

T = TypeVar("T")


class Client:
    """A connection to a server, for code that waits.

    Args:
        url: The server's address; ``$ABMLL_URL`` or ``http://127.0.0.1:8000`` by default.
        timeout: Longest wait for a reply, in seconds; ``math.inf``: as long as it takes.
        key: API key, where the server asks for one; ``$ABMLL_KEY`` by default.
        transport: Another way to send requests, as httpx takes it.

    All methods raise ``ServerUnreachable``, ``ReplyTimeout``, ``ApiError`` (``NotFound``,
    ``RequestRejected``, ``AccessDenied``, ``Conflict``, ``ServerUnavailable``) and ``InvalidReply``.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**settings_of(url, timeout, key), transport=transport)

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
        meaning: Literal["normalized", "entailment"] = "normalized",
        tokens: bool = False,
        normalize: Normalize | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Asks a question: which of ``options``, or free text without them.

        With automatic draws, ``tolerance`` is what further ones may move the confidence by. Below the confidence
        ``abstain_below``, or one by which at most ``target_risk`` of questions get a wrong answer on average, there is
        none. A free text takes the likeliest tokens, or at a ``temperature`` above 0 chooses them by ``seed``;
        ``samples`` more of them tell how far the model agrees with itself; ``tokens``: whether the answer tells it
        token by token. ``timeout``: seconds until the server gives the question up, at most its own.
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
                meaning=meaning,
                tokens=tokens,
                normalize=normalize,
                timeout=timeout,
            )
        )

    def stream(
        self,
        prompt: str,
        *,
        task: str = "global",
        version: int | None = None,
        draws: int | Literal["auto"] = "auto",
        seed: int = 0,
        max_tokens: int = 32,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        samples: int = 0,
        meaning: Literal["normalized", "entailment"] = "normalized",
        tokens: bool = False,
        timeout: float | None = None,
    ) -> Iterator[StreamedToken | Answer]:
        """Asks for a free text, see ``generate``, and gives its tokens as they come, then the answer."""
        call = calls.stream(
            prompt,
            task=task,
            version=version,
            draws=draws,
            seed=seed,
            max_tokens=max_tokens,
            stop=stop,
            temperature=temperature,
            top_p=top_p,
            samples=samples,
            meaning=meaning,
            tokens=tokens,
            timeout=timeout,
        )
        item: StreamedToken | Answer | None = None
        try:
            with self._http.stream(**sent(call, self._http.timeout)) as reply:
                if reply.status_code != 200:
                    reply.read()
                    calls.read(call, reply.status_code, reply.text, reply.headers.get("Retry-After"))
                for event in EventSource(reply).iter_sse():
                    found = read_event(event)
                    if found is not None:
                        item = found
                        yield item
        except (httpx.HTTPError, SSEError) as error:
            raise translate(error, self._http.base_url) from error
        if not isinstance(item, Answer):
            raise cut_off()

    def score(
        self,
        prompt: str,
        answer: str,
        *,
        task: str = "global",
        version: int | None = None,
        draws: int | Literal["auto"] = "auto",
        seed: int = 0,
        end: bool = True,
        timeout: float | None = None,
    ) -> Answer:
        """Has a finished answer scored, from another model or a person: whole and token by token."""
        return self._send(
            calls.score(prompt, answer, task=task, version=version, draws=draws, seed=seed, end=end, timeout=timeout)
        )

    def adapt(
        self,
        task: str,
        examples: Examples,
        *,
        steps: int | None = None,
        seed: int = 0,
    ) -> Job:
        """Starts to teach a task from labelled examples, a list or a frame of them; ``wait`` for the job."""
        return self._send(calls.adapt(task, examples, steps=steps, seed=seed))

    def jobs(self) -> list[Job]:
        """Lists the newest hundred adaptation jobs, newest first."""
        return self._send(calls.jobs())

    def job(self, id: str) -> Job:
        """Tells how an adaptation job stands."""
        return self._send(calls.job(id))

    def cancel(self, id: str) -> Job:
        """Cancels an adaptation job; one that has ended stays as it is."""
        return self._send(calls.cancel(id))

    def follow(self, job: Job | str, *, timeout: float | None = None, poll: float = 0.5) -> Iterator[Job]:
        """Yields the job every ``poll`` seconds, the last time when it has ended.

        It goes on while the server starts anew or is overloaded, for two minutes, or as long as its ``Retry-After``
        says.

        Raises:
            JobTimeout: It was still under way after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        current = self._send(calls.job(job), deadline) if isinstance(job, str) else job
        while True:
            yield current
            if current.ended:
                return
            check_deadline(current, deadline)
            time.sleep(min(poll, rest(deadline)))
            current = self._look(current, deadline, poll)

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

    def delete_version(self, name: str, version: int) -> None:
        """Removes a version of a task that does not answer and is not the newest."""
        self._send(calls.delete_version(name, version))

    def serve(self, name: str, versions: Mapping[int, float] | int | None) -> TaskInfo:
        """Says which version of a task answers, or which share the questions; None: always the newest."""
        return self._send(calls.serve(name, versions))

    def feedback(
        self, answered: Answer | str, *, answer: str | int | None = None, correct: bool | None = None
    ) -> Feedback:
        """Tells the right answer (text or index) to a question that was answered, or whether the answer was right."""
        request_id = answered if isinstance(answered, str) else answered.request_id
        return self._send(calls.feedback(request_id, answer=answer, correct=correct))

    def reliability(self, name: str, *, version: int | None = None) -> Reliability:
        """Tells how far the confidence of a task's version held; of the one that answers (most) by default."""
        return self._send(calls.reliability(name, version=version))

    def recalibrate(self, name: str, *, version: int | None = None, apply: bool = False) -> Recalibration:
        """Fits a task's temperature to its feedback; with ``apply``, makes a new version with it."""
        return self._send(calls.recalibrate(name, version=version, apply=apply))

    def healthy(self) -> bool:
        """Says whether the server lives; False where none of ours can be reached."""
        return self._check("/healthz")

    def ready(self) -> bool:
        """Says whether the server answers questions now; False where none of ours can be reached."""
        return self._check("/readyz")

    def _look(self, job: Job, deadline: float | None, poll: float) -> Job:
        patience = Patience(poll, deadline)
        while True:
            try:
                return self._send(calls.job(job.job), deadline)
            except PASSING as error:
                check_deadline(job, deadline)
                time.sleep(patience.pause(error))

    def _check(self, path: Literal["/healthz", "/readyz"]) -> bool:
        try:
            self._send(calls.check(path))
        except (ApiError, InvalidReply, ServerUnreachable, ReplyTimeout):
            return False
        return True

    def _send(self, call: Call[T], deadline: float | None = None) -> T:
        for pause in pauses(call):
            try:
                reply = self._http.request(**sent(call, self._http.timeout, deadline))
            except httpx.HTTPError as error:
                if pause is None or not isinstance(error, BROKEN):
                    raise translate(error, self._http.base_url) from error
                time.sleep(pause)
            else:
                return calls.read(call, reply.status_code, reply.text, reply.headers.get("Retry-After"))
        raise AssertionError("the last attempt returns or raises")
