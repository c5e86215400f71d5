"""The one way to Redis: a client, whether Redis can be reached, and errors of our own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, ReadOnlyError, RedisError, TimeoutError

from router_service.errors import StateError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_AWAY = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError, OSError)
_PROBE_S = 0.25


class RedisLink:
    """A Redis client that stops asking while Redis is away, so that no request waits for what cannot come.

    `up` is false from the first failed command until a probe in the background (`watch`) succeeds; `seen` is true once
    Redis has been there.
    """

    def __init__(self, url: str, *, prefix: str = "router:", timeout_s: float = 1.0, connections: int = 64) -> None:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self.client = Redis.from_pool(pool)
        self.up = False
        self.seen = False
        self._prefix = prefix

    def key(self, *parts: str) -> str:
        """The full name of a key."""
        return self._prefix + ":".join(parts)

    async def run(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        """What `command` returns. Raises `StateError` at once while Redis is away, or if the command fails."""
        if not self.up:
            raise StateError("Redis is away")
        try:
            return await command(self.client)
        except _AWAY as error:
            self._lost(error)
            raise StateError(f"Redis is away: {type(error).__name__}") from error
        except RedisError as error:
            raise StateError(f"Redis refused a command: {error}") from error

    async def probe(self) -> bool:
        """Ask Redis whether it is there, and note the answer."""
        try:
            await self.client.ping()
        except _AWAY as error:
            self._lost(error)
            return False
        if not self.up:
            logger.info("redis is reachable")
        self.up = self.seen = True
        return True

    async def watch(self) -> None:
        """Probe while Redis is away; runs until cancelled."""
        while True:
            if not self.up:
                await self.probe()
            await asyncio.sleep(_PROBE_S)

    async def close(self) -> None:
        """Close all connections."""
        await self.client.aclose()
        await self.client.connection_pool.disconnect()

    def _lost(self, error: Exception) -> None:
        if self.up:
            logger.warning("redis is away: %s", type(error).__name__)
        self.up = False
