"""Tasks of the event loop that last as long as the server: where one ends by a fault, the log says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


def in_background(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Starts a task that nobody waits for.

    Args:
        work: What it does.
        name: What the log calls it.
    """
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell)
    return task


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("%s has stopped by a fault of ours; start the server anew", task.get_name(), exc_info=error)
