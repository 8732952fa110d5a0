"""A free-text answer told as it comes: server-sent events of its tokens, and of the reply at the end."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel

from abmll.errors import AbmllError, EngineFailure
from server.engine import Tell
from server.errors import body_of
from server.schemas import ErrorReply, GenerateReply, StreamedToken

logger = logging.getLogger(__name__)

# An event, an error that ends the stream, or its end.
_Item = bytes | Exception | None


class Events(Protocol):
    """How a stream's events are written."""

    def token(self, token: StreamedToken) -> bytes:
        """A token."""
        ...

    def answer(self, reply: GenerateReply) -> bytes:
        """The whole reply, at the end."""
        ...

    def error(self, error: ErrorReply) -> bytes:
        """What ended the stream in its place."""
        ...


class TokenEvents:
    """Those of ``POST /generate``: ``token``, then ``answer`` or ``error``."""

    def token(self, token: StreamedToken) -> bytes:
        """A token."""
        return _event("token", token)

    def answer(self, reply: GenerateReply) -> bytes:
        """The whole reply, at the end."""
        return _event("answer", reply)

    def error(self, error: ErrorReply) -> bytes:
        """What ended the stream in its place."""
        return _event("error", error)


class WholeText:
    """Splits a text that comes token by token into parts that can be shown at once.

    A part ends with a whole character, and holds nothing that may be the beginning of a stop string: that waits for the
    token that decides. All parts together are the text before the stop string.

    Args:
        tokenizer: The base model's.
        stop: The stop strings.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.tokens: list[int] = []
        self.told, self.ended = 0, False

    def add(self, token: int) -> str:
        """Returns what can be shown now that this token has come; perhaps nothing."""
        if self.ended:
            return ""
        self.tokens.append(token)
        text = self._text()
        places = [place for string in self.stop if (place := text.find(string)) >= 0]
        if places:
            self.ended = True
            return self._until(text, min(places))
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        return self._until(whole, len(whole) - self._waiting(whole))

    def rest(self) -> str:
        """Returns what has waited, at the end of the text."""
        return "" if self.ended else self._until(text := self._text(), len(text))

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _until(self, text: str, place: int) -> str:
        part = text[self.told : place]
        self.told = max(self.told, place)
        return part

    def _waiting(self, text: str) -> int:
        """Characters at the end of a text that begin a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(string.startswith(text[-n:]) for string in self.stop)), 0)


async def stream(
    work: Callable[[Tell], Coroutine[Any, Any, GenerateReply]],
    text: WholeText,
    events: Events,
    first_of: Callable[[Coroutine[Any, Any, _Item]], Awaitable[_Item]],
    finished: Callable[[GenerateReply], None],
    broken: Callable[[], None],
) -> EventSourceResponse:
    """Answers with a stream of events: for each token, then for the answer, or an error.

    What fails before the first token is raised, so that it has a status of its own. The work ends with its reader.

    Args:
        work: Answers, and tells each token of the text.
        text: Splits the tokens' text.
        events: Writes them.
        first_of: Awaits the first event on the client's behalf.
        finished: Told of the reply.
        broken: Told that an error has ended the stream.
    """
    items: asyncio.Queue[_Item] = asyncio.Queue()

    def tell(token: int, log_prob: float) -> None:
        if not text.ended:
            items.put_nowait(events.token(StreamedToken(text=text.add(token), probability=math.exp(log_prob))))

    async def answer() -> None:
        try:
            reply = await work(tell)
            finished(reply)
            if rest := text.rest():
                items.put_nowait(events.token(StreamedToken(text=rest, probability=None)))
            items.put_nowait(events.answer(reply))
        except Exception as error:
            items.put_nowait(error)
        finally:
            items.put_nowait(None)

    working = asyncio.ensure_future(answer())

    async def end() -> None:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

    try:
        first = await first_of(items.get())
        if first is None:
            raise EngineFailure("the engine gave this request up; ask again")
        if isinstance(first, Exception):
            raise first
    except BaseException:
        await end()
        raise

    async def written(item: _Item) -> AsyncGenerator[bytes]:
        try:
            while item is not None:
                if isinstance(item, Exception):
                    broken()
                    if isinstance(item, AbmllError):  # others are logged as any request's
                        logger.warning("a stream ends with an error: %s: %s", type(item).__name__, item.message)
                    item = events.error(body_of(item, "a stream"))
                yield item
                item = await items.get()
        finally:
            await end()

    return EventSourceResponse(written(first), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def data_of(content: BaseModel) -> str:
    """JSON of an event's data; in ASCII, for a line's end that JSON allows, such as U+2028, would part the data."""
    return json.dumps(content.model_dump(mode="json"))


def _event(name: str, content: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=data_of(content))
