"""Complete answers by the hash of what was asked, and the expert that each session stays with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import orjson

from router_service.state.link import RedisLink

_MAX_BYTES = 1 << 20


class AnswerCache:
    """Keeps an answer's pieces, as they were sent, for the policy's time. Larger answers than 1 MiB are not kept."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def get(self, digest: str) -> list[bytes] | None:
        """The pieces of the answer kept under `digest`. Raises `StateError`."""
        value = cast("bytes | None", await self._link.run(lambda client: client.get(self._link.key("answer", digest))))
        return [piece.encode() for piece in orjson.loads(value)] if value else None

    async def put(self, digest: str, pieces: Sequence[bytes], *, ttl_s: float) -> None:
        """Keep `pieces` for `ttl_s` seconds. Raises `StateError`."""
        value = orjson.dumps([piece.decode() for piece in pieces])
        if len(value) <= _MAX_BYTES:
            key = self._link.key("answer", digest)
            await self._link.run(lambda client: client.set(key, value, px=int(ttl_s * 1000)))


class Sessions:
    """Which expert a session stays with, as long as it is used at least every `ttl_s` seconds."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def get(self, session: Sequence[str]) -> str | None:
        """The session's expert, if it has one. Raises `StateError`."""
        key = self._link.key("session", *session)
        value = cast("bytes | None", await self._link.run(lambda client: client.get(key)))
        return value.decode() if value else None

    async def put(self, session: Sequence[str], expert: str, *, ttl_s: float) -> None:
        """Let the session stay with `expert`. Raises `StateError`."""
        key = self._link.key("session", *session)
        await self._link.run(lambda client: client.set(key, expert, px=int(ttl_s * 1000)))
