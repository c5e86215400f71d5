"""Micro-batches: together while the router is busy, in a thread, and no query fails for another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from experts.cards import ExpertCard
from router_service.core.batcher import EstimateBatcher
from routers.contracts import Estimates, Query, Router
from routers.errors import RouterConfigError
from tests.router_service.fakes import card

CARDS = [card("a"), card("b")]


class FakeRouter:
    """Estimates the length of the text as quality, slowly, and notes what it was asked."""

    name = "fake"

    def __init__(self, pause_s: float = 0.02) -> None:
        self.batches: list[int] = []
        self.threads: set[int] = set()
        self.pause_s = pause_s

    def estimate(self, queries: Sequence[Query], cards: Sequence[ExpertCard]) -> Estimates:
        self.batches.append(len(queries))
        self.threads.add(threading.get_ident())
        time.sleep(self.pause_s)
        if any(query.text == "poison" for query in queries):
            raise RouterConfigError("this text cannot be estimated")
        quality = np.array([[len(query.text)] * len(cards) for query in queries], np.float32)
        return Estimates(quality=quality, cost_usd=quality, latency_s=quality, uncertainty=quality)


def batcher(router: FakeRouter) -> EstimateBatcher:
    return EstimateBatcher(cast("Router", router))


async def test_queries_that_wait_are_estimated_together_and_each_gets_its_own() -> None:
    router = FakeRouter()
    batches = batcher(router)
    answers = await asyncio.gather(*(batches.estimate(Query(text="x" * n), CARDS) for n in range(1, 200)))
    assert [answer.quality.tolist() for answer in answers] == [[[n, n]] for n in range(1, 200)]
    assert all(answer.uncertainty is not None and answer.uncertainty.shape == (1, 2) for answer in answers)
    assert sum(router.batches) == 199
    assert len(router.batches) <= 5
    assert max(router.batches) <= 64
    assert threading.get_ident() not in router.threads
    batches.close()


async def test_queries_about_other_cards_are_estimated_apart() -> None:
    """Experts may come and go while queries wait: each gets estimates of the cards it asked about."""
    router = FakeRouter()
    batches, more = batcher(router), [*CARDS, card("c")]
    asked = [CARDS, CARDS, more, more, more, CARDS]
    answers = await asyncio.gather(*(batches.estimate(Query(text="a"), cards) for cards in asked))
    assert [answer.quality.shape for answer in answers] == [(1, len(cards)) for cards in asked]
    assert router.batches == [2, 3, 1]
    batches.close()


async def test_a_query_that_fails_fails_alone() -> None:
    batches = batcher(FakeRouter())
    texts = ["a", "poison", "bb"]
    answers: list[Any] = await asyncio.gather(
        *(batches.estimate(Query(text=text), CARDS) for text in texts), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [Estimates, RouterConfigError, Estimates]
    with pytest.raises(RouterConfigError):
        await batches.estimate(Query(text="poison"), CARDS)
    assert (await batches.estimate(Query(text="ccc"), CARDS)).quality[0, 0] == 3
    batches.close()


async def test_a_caller_that_is_gone_disturbs_nobody() -> None:
    batches = batcher(FakeRouter(0.1))
    gone = asyncio.create_task(batches.estimate(Query(text="a"), CARDS))
    stays = asyncio.create_task(batches.estimate(Query(text="bb"), CARDS))
    await asyncio.sleep(0.02)
    gone.cancel()
    assert (await stays).quality[0, 0] == 2
    assert gone.cancelled()
    batches.close()


async def test_a_new_router_takes_over_between_batches() -> None:
    old, new = FakeRouter(0.1), FakeRouter(0.0)
    batches = batcher(old)
    first = asyncio.create_task(batches.estimate(Query(text="a"), CARDS))
    await asyncio.sleep(0.02)
    batches.router = cast("Router", new)
    second = asyncio.create_task(batches.estimate(Query(text="bb"), CARDS))
    await asyncio.gather(first, second)
    assert (old.batches, new.batches) == ([1], [1])
    batches.close()
