"""Deadlines that say why: who is stopped by one learns its error, and can put it on record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from experts.errors import ExpertTimeoutError


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
