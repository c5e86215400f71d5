"""Deadlines that say why: who is stopped by one learns its error, and can put it on record.

And ends of calls, for which nobody waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from experts.errors import ExpertTimeoutError
from experts.expert import Part

logger = logging.getLogger(__name__)

CLOSING_S = 2.0
"""How long, in seconds, is waited for a call to end that nobody wants any more."""


@asynccontextmanager
async def until(by: float, message: str) -> AsyncGenerator[None, None]:
    """As `asyncio.timeout_at(by)`, but raises `ExpertTimeoutError`; `message` goes with the cancellation."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is None:
        raise RuntimeError("a deadline is kept in a task")
    before, late = task.cancelling(), False

    def stop() -> None:
        nonlocal late
        late = True
        task.cancel(message)

    handle = loop.call_at(by, stop)
    try:
        yield
    except asyncio.CancelledError:
        if late and task.uncancel() <= before:
            raise ExpertTimeoutError(message) from None
        raise
    finally:
        handle.cancel()


async def close(source: AsyncIterator[Part]) -> None:
    """End a call that may be under way, within `CLOSING_S`."""
    if not isinstance(source, AsyncGenerator):
        return
    try:
        async with asyncio.timeout(CLOSING_S):
            await source.aclose()
    except TimeoutError:
        logger.error("a call did not end within %g s after it was closed", CLOSING_S)
