"""Micro-batches for a router: the queries that wait while it estimates are estimated together, in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from experts.cards import ExpertCard
from routers.contracts import Estimates, Query, Router

_MAX_BATCH = 64


class EstimateBatcher:
    """Runs one `Router.estimate` at a time. `router` may be replaced at any moment: a batch under way keeps its own."""

    def __init__(self, router: Router, cards: Sequence[ExpertCard]) -> None:
        self.router = router
        self._cards = cards
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"router-{router.name}")
        self._waiting: list[tuple[Query, asyncio.Future[Estimates]]] = []
        self._task: asyncio.Task[None] | None = None

    async def estimate(self, query: Query) -> Estimates:
        """The estimates for `query`, [1, E]. Raises what the router raises."""
        answer: asyncio.Future[Estimates] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, answer))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await answer

    def close(self) -> None:
        """End the thread once its batch is done."""
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
            if not await self._estimate(batch) and len(batch) > 1:
                for item in batch:  # one query that cannot be estimated must not fail those beside it
                    await self._estimate([item], last=True)
        self._task = None

    async def _estimate(self, batch: list[tuple[Query, asyncio.Future[Estimates]]], *, last: bool = False) -> bool:
        """Whether the batch was estimated. A failure reaches the queries if there is nothing else to try."""
        queries = [query for query, _ in batch]
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._thread, self.router.estimate, queries, self._cards)
        await asyncio.wait([work])
        error = work.exception()
        for row, (_, answer) in enumerate(batch):
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
