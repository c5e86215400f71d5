"""Which experts could answer now: asked every few seconds, and at once when a call has failed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

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
        self._suspected = asyncio.Event()
        self.down: frozenset[str] = frozenset()
        self.seen: frozenset[str] = frozenset()
        self.looked = False

    def suspect(self) -> None:
        """Look again soon: a call has failed."""
        self._suspected.set()

    async def watch(self) -> None:
        """Look every few seconds; runs until cancelled."""
        while True:
            await self.look()
            try:
                await asyncio.wait_for(self._suspected.wait(), _PAUSE_S if self.down - self.seen else _EVERY_S)
            except TimeoutError:
                continue
            await asyncio.sleep(_PAUSE_S)
            self._suspected.clear()

    async def look(self) -> None:
        """Ask every expert."""
        names = list(self._experts)
        answers = await asyncio.gather(*(self._healthy(name) for name in names))
        down = frozenset(name for name, up in zip(names, answers, strict=True) if not up)
        for name, up in zip(names, answers, strict=True):
            self._metrics.set_expert_up(name, up)
        for name in down ^ self.down:
            logger.warning("expert %r is %s", name, "down" if name in down else "up again")
        self.seen |= frozenset(names) - down
        self.down, self.looked = down, True

    async def _healthy(self, name: str) -> bool:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await self._experts[name].healthy()
        except (ExpertError, TimeoutError, OSError):
            return False
