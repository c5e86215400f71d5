"""The ledger: who asked what of whom, what it used and what it cost; and the feedback on it. Streams in Redis.

Entries are appended in batches by a writer in the background. A writer numbers its entries, and Redis keeps the number
of the last one that it took (the writer's mark), as Kafka's idempotent producers do. So an entry may be sent again
whenever its fate is not known, and is there once: after a timeout, from the spool, or when a Redis that was killed
comes back without its last second. An entry is *acknowledged* when Redis has it, or when it is synced in the spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, cast

import orjson

from router_service.errors import StateError
from router_service.state.link import RedisLink
from router_service.state.spool import Charge, Entry, Spool, orphans

logger = logging.getLogger(__name__)

LEDGER: Final = "ledger"
FEEDBACK: Final = "feedback"

_APPEND = files(__package__).joinpath("append.lua").read_text()
_FLUSH_S = 0.025
_RETRY_S = 0.25
_RECHECK_S = 1.0
_KEEP_S = 10.0
_BATCH = 500
_MAX_WAITING = 50_000
_MARK_TTL_S = 30 * 86_400
_ADOPT_S = 60.0


class LedgerWriter:
    """Appends entries to streams, in order, each exactly once.

    `record` never waits. While Redis is away entries go to the spool. What Redis took in the last seconds is kept in
    memory, and sent again if it comes back without them.
    """

    def __init__(self, link: RedisLink, folder: Path, *, max_entries: int = 0) -> None:
        self.writer = uuid.uuid4().hex
        self._link = link
        self._folder = folder
        self._spool = Spool(folder, self.writer)
        self._max_entries = str(max_entries)
        self._append = link.client.register_script(_APPEND)
        self._number = 0
        self._waiting: deque[Entry] = deque()
        self._recent: deque[tuple[float, Entry]] = deque()
        self._acknowledged = asyncio.Condition()
        self._acknowledged_number = 0
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._adopted_at = float("-inf")
        self._fault: str | None = None

    @property
    def depth(self) -> int:
        """Entries in the spool."""
        return self._spool.depth

    @property
    def fault(self) -> str | None:
        """Why entries can be kept neither in Redis nor in the spool; `None` where they can."""
        return self._fault

    @property
    def full(self) -> bool:
        """Whether so many entries wait in memory that nothing more should be accepted."""
        return len(self._waiting) >= _MAX_WAITING

    def record(self, stream: str, value: Any, charges: Sequence[Charge] = ()) -> int:
        """Append `value` (JSON) to `stream` soon, and apply `charges` with it. Returns the entry's number."""
        self._number += 1
        payload = value if isinstance(value, bytes) else orjson.dumps(value)
        self._waiting.append(Entry(self._number, self._link.key(stream), payload, tuple(charges)))
        self._wake.set()
        return self._number

    async def commit(self, stream: str, value: Any) -> None:
        """Append `value` and return once it is acknowledged. Raises `StateError` where it cannot be."""
        number = self.record(stream, value)
        async with self._acknowledged:
            await self._acknowledged.wait_for(lambda: self._acknowledged_number >= number or self._fault)
        if self._acknowledged_number < number:
            raise StateError(f"neither Redis nor the spool takes entries: {self._fault}")

    def start(self) -> None:
        """Begin to write in the background."""
        self._task = asyncio.create_task(self._run(), name="ledger-writer")
        self._task.add_done_callback(self._ended)

    async def close(self) -> None:
        """Acknowledge all that was recorded, and end; nothing may be recorded afterwards."""
        self._closing = True
        self._wake.set()
        if self._task:
            await self._task
        await self._send_all()
        await asyncio.to_thread(self._spool.close)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A writer that fails for a reason nobody thought of makes the service say that it is not ready."""
        if not task.cancelled() and (error := task.exception()):
            self._fault = f"the writer has failed: {error!r}"
            logger.critical("the ledger's writer has failed", exc_info=error)

    async def _run(self) -> None:
        while not self._closing:
            await self._wait()
            if not await self._send_all() and not self._closing:
                await asyncio.sleep(_RETRY_S)

    async def _wait(self) -> None:
        """Until something waits to be written, or it is time to look whether Redis still has what it took."""
        if not self._waiting and not self._spool.depth:
            idle_s = _RECHECK_S if self._recent else _ADOPT_S
            try:
                await asyncio.wait_for(self._wake.wait(), idle_s)
            except TimeoutError:
                return
        self._wake.clear()
        if not self._closing:
            await asyncio.sleep(_FLUSH_S)  # so that entries of one moment share a batch

    async def _send_all(self) -> bool:
        """Send orphans, spool and what waits, in this order. False if Redis is away: then what waits is spooled."""
        try:
            await self._adopt()
            await self._drain()
            await (self._send_waiting() if self._waiting else self._recheck())
        except StateError:
            await self._spool_waiting()
            return False
        self._fault = None
        return True

    async def _adopt(self) -> None:
        """Send what dead writers left behind."""
        if not self._link.up or time.monotonic() - self._adopted_at < _ADOPT_S:
            return
        with contextlib.closing(orphans(self._folder)) as found:
            while orphan := await asyncio.to_thread(next, found, None):
                writer, entries = orphan
                for start in range(0, len(entries), _BATCH):
                    await self._append_as(writer, entries[start : start + _BATCH])
                logger.info("took over %d entries of a writer that is gone", len(entries))
        self._adopted_at = time.monotonic()

    async def _drain(self) -> None:
        if not self._spool.depth:
            return
        if not self._link.up:
            raise StateError("Redis is away")
        entries = await asyncio.to_thread(self._spool.read)
        for start in range(0, len(entries), _BATCH):
            await self._send(entries[start : start + _BATCH])
        await asyncio.to_thread(self._spool.clear)
        logger.info("drained %d entries from the spool", len(entries))

    async def _send_waiting(self) -> None:
        while self._waiting:
            batch = [self._waiting[i] for i in range(min(_BATCH, len(self._waiting)))]
            await self._send(batch)
            for _ in batch:
                self._waiting.popleft()
            await self._acknowledge(batch[-1].number)

    async def _recheck(self) -> None:
        """Send again what Redis has lost since it took it; forget what it took long ago."""
        horizon = time.monotonic() - _KEEP_S
        while self._recent and self._recent[0][0] < horizon:
            self._recent.popleft()
        if self._recent:
            await self._send([])

    async def _send(self, entries: list[Entry]) -> None:
        """Append entries that follow the last one sent."""
        before = entries[0].number - 1 if entries else self._recent[-1][1].number
        mark = await self._append_as(self.writer, entries, before=before)
        if mark < before:
            held = [entry for _, entry in self._recent if entry.number > mark]
            first = (held + entries)[0].number if held or entries else before + 1
            logger.warning("redis came back without %d entries: %d sent again", before - mark, before + 1 - first)
            await self._append_as(self.writer, held + entries)
        now = time.monotonic()
        self._recent.extend((now, entry) for entry in entries)

    async def _append_as(self, writer: str, entries: Sequence[Entry], *, before: int = 0) -> int:
        arguments: list[Any] = [before, _MARK_TTL_S]
        for entry in entries:
            arguments += (entry.number, entry.stream, self._max_entries, entry.payload, len(entry.charges))
            for charge in entry.charges:
                arguments += (charge.key, charge.kind, repr(charge.change), charge.ttl_s)
        key = self._link.key("writer", writer)
        return int(cast("int", await self._link.run(lambda _: self._append(keys=[key], args=arguments))))

    async def _spool_waiting(self) -> None:
        if not self._waiting:
            return
        batch = list(self._waiting)
        try:
            await asyncio.to_thread(self._spool.append, batch)
        except OSError as error:
            if self._fault is None:
                logger.error("redis is away and the spool cannot be written: %s", error)
            self._fault = str(error)
            await self._acknowledge(self._acknowledged_number)  # wakes those who wait, to see the fault
            return
        self._fault = None
        for _ in batch:
            self._waiting.popleft()
        await self._acknowledge(batch[-1].number)

    async def _acknowledge(self, number: int) -> None:
        self._acknowledged_number = number
        async with self._acknowledged:
            self._acknowledged.notify_all()


async def read_stream(link: RedisLink, stream: str, *, after: str = "-", count: int = 1000) -> list[tuple[str, Any]]:
    """Up to `count` entries of `stream` (`LEDGER` or `FEEDBACK`) after the stream id `after`: pairs of id and value."""
    start = after if after == "-" else f"({after}"
    rows = cast("list[Any]", await link.run(lambda client: client.xrange(link.key(stream), min=start, count=count)))
    return [(row_id.decode(), orjson.loads(fields[b"entry"])) for row_id, fields in rows]
