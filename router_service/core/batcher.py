"""Micro-batches for a router: the queries that wait while it estimates are estimated together, in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from experts.cards import ExpertCard
from routers.contracts import Estimates, Query, Router

_MAX_BATCH = 64

_Waiting: TypeAlias = "tuple[Query, Sequence[ExpertCard], asyncio.Future[Estimates]]"


class EstimateBatcher:
    """Runs one `Router.estimate` at a time. `router` may be replaced at any moment: a batch under way keeps its own."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"router-{router.name}")
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def estimate(self, query: Query, cards: Sequence[ExpertCard]) -> Estimates:
        """The estimates for `query` and `cards`, [1, E]. Raises what the router raises."""
        answer: asyncio.Future[Estimates] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, cards, answer))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await answer

    def close(self) -> None:
        """End the thread once its batch is done."""
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        while self._waiting:
            batch = self._next()
            if not await self._estimate(batch) and len(batch) > 1:
                for item in batch:  # one query that cannot be estimated must not fail those beside it
                    await self._estimate([item], last=True)
        self._task = None

    def _next(self) -> list[_Waiting]:
        """The queries that have waited longest, as far as they are about the same cards."""
        count, cards = 1, self._waiting[0][1]
        while count < min(len(self._waiting), _MAX_BATCH) and self._waiting[count][1] is cards:
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    async def _estimate(self, batch: list[_Waiting], *, last: bool = False) -> bool:
        """Whether the batch was estimated. A failure reaches the queries if there is nothing else to try."""
        queries, cards = [query for query, _, _ in batch], batch[0][1]
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._thread, self.router.estimate, queries, cards)
        await asyncio.wait([work])
        error = work.exception()
        for row, (_, _, answer) in enumerate(batch):
            if answer.done():  # its client is gone
                continue
            if error is None:
                answer.set_result(_row(work.result(), row))
            elif last or len(batch) == 1:
                answer.set_exception(error)
        return error is None


def _row(estimates: Estimates, row: int) -> Estimates:
    index = slice(row, row + 1)
    return Estimates(
        quality=estimates.quality[index],
        cost_usd=estimates.cost_usd[index],
        latency_s=estimates.latency_s[index],
        uncertainty=None if estimates.uncertainty is None else estimates.uncertainty[index],
    )
