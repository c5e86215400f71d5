"""Which experts could answer now: asked every few seconds, and at once when a call has failed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress

from experts.errors import ExpertError
from experts.expert import Expert
from router_service.metrics import Metrics

logger = logging.getLogger(__name__)

_EVERY_S = 5.0
_PATIENCE_S = 3.0
_PAUSE_S = 0.5


class HealthMonitor:
    """Knows the experts that are down. Before the first look all count as up, and `looked` is false.

    `seen` are the experts that were up once: one that never was may still be loading.
    """

    def __init__(self, experts: Mapping[str, Expert], metrics: Metrics) -> None:
        self._experts = experts
        self._metrics = metrics
        self._suspects: set[str] = set()
        self._suspected = asyncio.Event()
        self.down: frozenset[str] = frozenset()
        self.seen: frozenset[str] = frozenset()
        self.looked = False

    def suspect(self, experts: Iterable[str]) -> None:
        """Look at `experts` again soon: calls of theirs have failed."""
        self._suspects.update(experts)
        if self._suspects:
            self._suspected.set()

    def forget(self, expert: str) -> None:
        """An expert is there no more."""
        self.down -= {expert}
        self.seen -= {expert}
        self._metrics.forget_expert(expert)

    async def watch(self) -> None:
        """Look every few seconds; runs until cancelled."""
        while True:
            await self.look(self._experts)
            with suppress(TimeoutError):
                async with asyncio.timeout(_PAUSE_S if self.down - self.seen else _EVERY_S):
                    await self._look_at_suspects()

    async def _look_at_suspects(self) -> None:
        while True:
            await self._suspected.wait()
            await asyncio.sleep(_PAUSE_S)
            suspects, self._suspects = self._suspects, set()
            self._suspected.clear()
            await self.look(suspects)

    async def look(self, experts: Iterable[str]) -> None:
        """Ask `experts`."""
        asked = {name: self._experts[name] for name in experts if name in self._experts}
        told = await asyncio.gather(*map(_healthy, asked.values()))
        answers = {name: up for name, up in zip(asked, told, strict=True) if self._experts.get(name) is asked[name]}
        names = frozenset(answers)
        asked_down = frozenset(name for name, up in answers.items() if not up)
        down = self.down - names | asked_down
        for name, up in answers.items():
            self._metrics.set_expert_up(name, up)
        for name in down ^ self.down:
            logger.warning("expert %r is %s", name, "down" if name in down else "up again")
        self.seen |= names - asked_down
        self.down, self.looked = down, True


async def _healthy(expert: Expert) -> bool:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await expert.healthy()
    except (ExpertError, TimeoutError, OSError):
        return False
