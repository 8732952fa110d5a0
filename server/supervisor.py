"""Keeps the adaptation process alive while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys

from abmll.errors import StoreFailure
from server.adapting import STORE_SECONDS
from server.background import in_background
from server.jobs import JobRegistry
from server.settings import Settings

logger = logging.getLogger(__name__)

# That a worker has for its end.
_CLOSE_SECONDS = 5.0


class Supervisor:
    """Starts ``server.worker``, and starts it again when it dies.

    Args:
        settings: Passed on to the worker.
        registry: Jobs that a dead worker had under way are queued again here.
    """

    def __init__(self, settings: Settings, registry: JobRegistry) -> None:
        self.settings, self.registry = settings, registry
        self.restarts = 0
        self.process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the worker, and watches it."""
        self._task = in_background(self._watch(), "the watch over the adaptation process")

    async def close(self) -> None:
        """Ends the worker; its job is taken up again by the next server."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._end()
        with contextlib.suppress(StoreFailure):
            await asyncio.to_thread(self.registry.give_back)

    async def _end(self) -> None:
        if self.process is None or self.process.returncode is not None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), _CLOSE_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()

    def wake(self) -> None:
        """Tells the worker that a job waits."""
        stdin = self.process.stdin if self.process is not None else None
        if stdin is not None and not stdin.is_closing():
            stdin.write(b"\n")

    async def _watch(self) -> None:
        delay, recover = 1.0, self.registry.recover_after_server
        while True:
            try:
                await asyncio.to_thread(recover)
            except StoreFailure as error:  # a worker without its jobs put right would leave them running for ever
                logger.error("%s; adaptation waits", error.message)
                await asyncio.sleep(STORE_SECONDS)
                continue
            recover = self.registry.recover
            begun = asyncio.get_running_loop().time()
            try:
                code = await self._work()
            except OSError as error:  # no memory or process to be had at present
                logger.error("the adaptation process cannot be started: %s; it is tried again", error)
            else:
                logger.error("the adaptation process ended with code %d; it is started again", code)
            self.restarts += 1
            lived = asyncio.get_running_loop().time() - begun
            delay = 1.0 if lived > 60 else min(60.0, delay * 2)
            await asyncio.sleep(delay)

    async def _work(self) -> int:
        """Starts the worker and waits for its end; gives its exit status."""
        # In a session of its own: Ctrl+C in a terminal is for the server, and the end of stdin ends the worker.
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server.worker", stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert self.process.stdin is not None
        self.process.stdin.write(self.settings.model_dump_json().encode() + b"\n")
        return await self.process.wait()
