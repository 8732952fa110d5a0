"""The client, for asynchronous code: the methods of ``Client``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
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


class AsyncClient:
    """A connection to a server, for asynchronous code; see ``Client``."""

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**settings_of(url, timeout, key), transport=transport)

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
                meaning=meaning,
                tokens=tokens,
                normalize=normalize,
                timeout=timeout,
            )
        )

    async def stream(
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
    ) -> AsyncIterator[StreamedToken | Answer]:
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
            async with self._http.stream(**sent(call, self._http.timeout)) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    calls.read(call, reply.status_code, reply.text, reply.headers.get("Retry-After"))
                async for event in EventSource(reply).aiter_sse():
                    found = read_event(event)
                    if found is not None:
                        item = found
                        yield item
        except (httpx.HTTPError, SSEError) as error:
            raise translate(error, self._http.base_url) from error
        if not isinstance(item, Answer):
            raise cut_off()

    async def score(
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
        return await self._send(
            calls.score(prompt, answer, task=task, version=version, draws=draws, seed=seed, end=end, timeout=timeout)
        )

    async def adapt(
        self,
        task: str,
        examples: Examples,
        *,
        steps: int | None = None,
        seed: int = 0,
    ) -> Job:
        """Starts to teach a task from labelled examples, a list or a frame of them; ``wait`` for the job."""
        return await self._send(calls.adapt(task, examples, steps=steps, seed=seed))

    async def jobs(self) -> list[Job]:
        """Lists the newest hundred adaptation jobs, newest first."""
        return await self._send(calls.jobs())

    async def job(self, id: str) -> Job:
        """Tells how an adaptation job stands."""
        return await self._send(calls.job(id))

    async def cancel(self, id: str) -> Job:
        """Cancels an adaptation job; one that has ended stays as it is."""
        return await self._send(calls.cancel(id))

    async def follow(self, job: Job | str, *, timeout: float | None = None, poll: float = 0.5) -> AsyncIterator[Job]:
        """Yields the job every ``poll`` seconds, the last time when it has ended; as ``Client.follow``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        current = await self._send(calls.job(job), deadline) if isinstance(job, str) else job
        while True:
            yield current
            if current.ended:
                return
            check_deadline(current, deadline)
            await asyncio.sleep(min(poll, rest(deadline)))
            current = await self._look(current, deadline, poll)

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

    async def delete_version(self, name: str, version: int) -> None:
        """Removes a version of a task that does not answer and is not the newest."""
        await self._send(calls.delete_version(name, version))

    async def serve(self, name: str, versions: Mapping[int, float] | int | None) -> TaskInfo:
        """Says which version of a task answers, or which share the questions; None: always the newest."""
        return await self._send(calls.serve(name, versions))

    async def feedback(
        self, answered: Answer | str, *, answer: str | int | None = None, correct: bool | None = None
    ) -> Feedback:
        """Tells the right answer (text or index) to a question that was answered, or whether the answer was right."""
        request_id = answered if isinstance(answered, str) else answered.request_id
        return await self._send(calls.feedback(request_id, answer=answer, correct=correct))

    async def reliability(self, name: str, *, version: int | None = None) -> Reliability:
        """Tells how far the confidence of a task's version held; of the one that answers (most) by default."""
        return await self._send(calls.reliability(name, version=version))

    async def recalibrate(self, name: str, *, version: int | None = None, apply: bool = False) -> Recalibration:
        """Fits a task's temperature to its feedback; with ``apply``, makes a new version with it."""
        return await self._send(calls.recalibrate(name, version=version, apply=apply))

    async def healthy(self) -> bool:
        """Says whether the server lives; False where none of ours can be reached."""
        return await self._check("/healthz")

    async def ready(self) -> bool:
        """Says whether the server answers questions now; False where none of ours can be reached."""
        return await self._check("/readyz")

    async def _look(self, job: Job, deadline: float | None, poll: float) -> Job:
        patience = Patience(poll, deadline)
        while True:
            try:
                return await self._send(calls.job(job.job), deadline)
            except PASSING as error:
                check_deadline(job, deadline)
                await asyncio.sleep(patience.pause(error))

    async def _check(self, path: Literal["/healthz", "/readyz"]) -> bool:
        try:
            await self._send(calls.check(path))
        except (ApiError, InvalidReply, ServerUnreachable, ReplyTimeout):
            return False
        return True

    async def _send(self, call: Call[T], deadline: float | None = None) -> T:
        for pause in pauses(call):
            try:
                reply = await self._http.request(**sent(call, self._http.timeout, deadline))
            except httpx.HTTPError as error:
                if pause is None or not isinstance(error, BROKEN):
                    raise translate(error, self._http.base_url) from error
                await asyncio.sleep(pause)
            else:
                return calls.read(call, reply.status_code, reply.text, reply.headers.get("Retry-After"))
        raise AssertionError("the last attempt returns or raises")
