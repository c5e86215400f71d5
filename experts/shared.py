"""Something that several experts of a process use together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """A resource that is closed when the last of its holders lets it go."""

    def __init__(self, resource: T, close: Callable[[], Awaitable[None]]) -> None:
        self.resource = resource
        self._close = close
        self._holders = 0

    def hold(self) -> Shared[T]:
        """Count one more holder."""
        self._holders += 1
        return self

    async def release(self) -> None:
        """Count one holder less; the last one closes the resource."""
        self._holders -= 1
        if self._holders == 0:
            await self._close()
