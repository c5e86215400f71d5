"""Routers and policies in service: loaded in a thread, replaced without a dropped request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experts.cards import ExpertCard
from experts.errors import ExpertError
from router_service.core.batcher import EstimateBatcher
from router_service.errors import StateError, UnavailableError
from router_service.metrics import Metrics
from router_service.state.link import RedisLink
from router_service.state.pointer import Promotion, promotions
from routers.contracts import Decision, Estimates, Query, Router, Strategy
from routers.errors import NoExpertError, RoutingError
from routers.policy import Policy, RouterChoice

logger = logging.getLogger(__name__)

_POLL_S = 1.0

LoadRouter = Callable[[RouterChoice, Path | None], Router]
"""The fitted router of a policy's choice, from the promoted artefact if there is one. Runs in a thread.

Raises `RoutingError`.
"""


class RouterSlot:
    """A router in service. `fault` says why the newest one could not be loaded; the one before it goes on.

    `promotion` is the last that was tried, `in_use` the one whose artefact answers now.
    """

    def __init__(self, choice: RouterChoice, load: LoadRouter, metrics: Metrics) -> None:
        self.name = choice.name
        self.fault: str | None = None
        self.promotion: Promotion | None = None
        self.in_use: Promotion | None = None
        self._choice = choice
        self._load = load
        self._metrics = metrics
        self._batcher: EstimateBatcher | None = None

    @property
    def loaded(self) -> bool:
        """Whether there is a router to ask."""
        return self._batcher is not None

    async def load(self, promotion: Promotion | None) -> None:
        """Load the router, from the promoted artefact if there is one, and swap it in."""
        self.promotion = promotion
        folder = promotion.folder if promotion else None
        try:
            router = await asyncio.to_thread(self._load, self._choice, folder)
        except (RoutingError, ExpertError, OSError, ValueError, ImportError) as error:
            self.fault = f"router {self.name!r} cannot be loaded{f' from {str(folder)!r}' if folder else ''}: {error}"
            self._metrics.count_load(self.name, ok=False)
            logger.error("%s", self.fault)
            return
        self._swap(router)
        self.in_use = promotion
        self._metrics.count_load(self.name, ok=True)
        logger.info("router %r is loaded%s", self.name, f" from {str(folder)!r}" if folder else "")

    async def estimate(self, query: Query, cards: Sequence[ExpertCard]) -> Estimates:
        """Estimates for `cards`, [1, E]. Raises `UnavailableError` if there is no router yet."""
        if self._batcher is None:
            raise UnavailableError(self.fault or f"router {self.name!r} is being loaded", retry_after_s=1.0)
        return await self._batcher.estimate(query, cards)

    def close(self) -> None:
        """End the router's thread."""
        if self._batcher:
            self._batcher.close()

    def _swap(self, router: Router) -> None:
        self.fault = None
        if self._batcher:
            self._batcher.router = router
        else:
            self._batcher = EstimateBatcher(router)


@dataclass(frozen=True, slots=True)
class Plan:
    """A policy in service: with its router, its strategy, and the cards it chooses among."""

    policy: Policy
    slot: RouterSlot
    strategy: Strategy
    cards: Sequence[ExpertCard]

    async def decide(self, query: Query, down: frozenset[str]) -> Decision:
        """The policy's choice among the experts that are up; those that are down come last. Raises `NoExpertError`.

        What is known of an expert's health is some seconds old: one that was down may be the only one that is left.
        """
        estimates = await self.slot.estimate(query, self.cards)
        whole = self.policy.choose(estimates, self.cards, query)
        last = [candidate for candidate in whole.ranking if candidate.expert in down]
        up = [i for i, card in enumerate(self.cards) if card.name not in down]
        if not last or not up:
            return whole
        try:
            decision = self.policy.choose(_columns(estimates, up), [self.cards[i] for i in up], query)
        except NoExpertError:
            return whole
        names = ", ".join(candidate.expert for candidate in last)
        reason = f"{decision.reason}; tried last, being down: {names}"
        return replace(decision, ranking=[*decision.ranking, *last], reason=reason)


def able(policy: Policy, cards: Iterable[ExpertCard]) -> list[ExpertCard]:
    """The cards of those who can do what `policy` serves."""
    embeds = policy.serves == "embeddings"
    return [card for card in cards if card.routed and (card.kind == "embedding") == embeds]


async def watch_promotions(link: RedisLink, slots: Sequence[RouterSlot]) -> None:
    """Load every router once Redis has said from where, then whenever another is promoted; runs until cancelled."""
    while True:
        try:
            promoted = await promotions(link)
        except StateError:
            promoted = None
        if promoted is not None:
            for slot in slots:
                promotion = promoted.get(slot.name)
                if promotion != slot.promotion or not (slot.loaded or slot.fault):
                    await slot.load(promotion)
        await asyncio.sleep(_POLL_S)


def stay_with(decision: Decision, expert: str) -> Decision:
    """The decision with the session's expert first, if it is among those allowed."""
    ranking = list(decision.ranking)
    held = next((candidate for candidate in ranking if candidate.expert == expert), None)
    if held is None or held is ranking[0]:
        return decision
    ranking.remove(held)
    reason = f"the session stays with {expert}; otherwise: {decision.reason}"
    return replace(decision, ranking=[held, *ranking], reason=reason)


def _columns(estimates: Estimates, index: Sequence[int]) -> Estimates:
    columns = np.asarray(index, dtype=np.intp)
    return Estimates(
        quality=estimates.quality[:, columns],
        cost_usd=estimates.cost_usd[:, columns],
        latency_s=estimates.latency_s[:, columns],
        uncertainty=None if estimates.uncertainty is None else estimates.uncertainty[:, columns],
    )
