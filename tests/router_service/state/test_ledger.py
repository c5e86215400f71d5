"""The ledger against a real Redis that is killed, stopped and emptied."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from router_service.errors import StateError
from router_service.state.ledger import FEEDBACK, LEDGER, LedgerWriter, read_stream
from router_service.state.link import RedisLink
from router_service.state.spool import Charge, Entry, Spool, orphans, read_entries
from tests.router_service.fakes import RedisProcess

pytestmark = pytest.mark.slow


@asynccontextmanager
async def writing(server: RedisProcess, folder: Path) -> AsyncIterator[tuple[LedgerWriter, RedisLink]]:
    link = RedisLink(server.url, timeout_s=0.3)
    await link.probe()
    writer = LedgerWriter(link, folder)
    writer.start()
    watch = asyncio.create_task(link.watch())
    try:
        yield writer, link
    finally:
        await writer.close()
        watch.cancel()
        await link.close()


def kept(server: RedisProcess, stream: str = LEDGER) -> list[Any]:
    with server.client() as client:
        rows: Any = client.xrange(f"router:{stream}")
    return [orjson.loads(fields[b"entry"])["n"] for _, fields in rows]


async def until(condition: Any, timeout_s: float = 40.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_entries_arrive_in_order(redis_server: RedisProcess, tmp_path: Path) -> None:
    async with writing(redis_server, tmp_path) as (writer, link):
        for n in range(1200):
            writer.record(LEDGER, {"n": n})
        await writer.commit(FEEDBACK, {"n": -1})
        assert kept(redis_server) == list(range(1200))
        assert kept(redis_server, FEEDBACK) == [-1]
        page = await read_stream(link, LEDGER, count=2)
        rest = await read_stream(link, LEDGER, after=page[-1][0], count=1)
        assert [value["n"] for _, value in page + rest] == [0, 1, 2]


async def test_what_was_acknowledged_outlives_a_killed_redis(redis_server: RedisProcess, tmp_path: Path) -> None:
    async with writing(redis_server, tmp_path) as (writer, _):
        await writer.commit(LEDGER, {"n": 0})
        redis_server.kill()
        for n in range(1, 50):
            await writer.commit(LEDGER, {"n": n})
            assert writer.depth == n
            assert [orjson.loads(e.payload)["n"] for e in read_entries(tmp_path / f"{writer.writer}.jsonl")][-1] == n
        redis_server.start()
        await until(lambda: writer.depth == 0)
        await writer.commit(LEDGER, {"n": 50})
        assert kept(redis_server) == list(range(51))


async def test_entries_recorded_while_redis_is_killed_again_and_again_are_there_once(
    redis_server: RedisProcess, tmp_path: Path
) -> None:
    async with writing(redis_server, tmp_path) as (writer, _):
        for n in range(300):
            writer.record(LEDGER, {"n": n})
            if n % 100 == 50:
                await asyncio.sleep(0.026)  # a batch is on its way, or just there
                redis_server.kill()
                redis_server.start()
            await asyncio.sleep(0.001)
        await writer.commit(LEDGER, {"n": 300})
        await until(lambda: writer.depth == 0)
        assert kept(redis_server) == list(range(301))


async def test_a_redis_that_hangs_takes_a_batch_once(redis_server: RedisProcess, tmp_path: Path) -> None:
    async with writing(redis_server, tmp_path) as (writer, _):
        await writer.commit(LEDGER, {"n": 0})
        redis_server.signal(signal.SIGSTOP)
        await writer.commit(LEDGER, {"n": 1})  # sent, never answered, spooled; Redis finds it in its socket later
        redis_server.signal(signal.SIGCONT)
        await until(lambda: writer.depth == 0)
        assert kept(redis_server) == [0, 1]


async def test_what_redis_lost_after_taking_it_is_sent_again(redis_server: RedisProcess, tmp_path: Path) -> None:
    async with writing(redis_server, tmp_path) as (writer, _):
        for n in range(5):
            await writer.commit(LEDGER, {"n": n})
        with redis_server.client() as client:
            client.flushall()  # as if the last second had not reached the disk
        await until(lambda: kept(redis_server) == list(range(5)))
        await writer.commit(LEDGER, {"n": 5})
        assert kept(redis_server) == list(range(6))


async def test_a_dead_writers_spool_is_sent_by_the_next_one(redis_server: RedisProcess, tmp_path: Path) -> None:
    spool = Spool(tmp_path, "dead")
    spool.append([Entry(n + 1, "router:ledger", orjson.dumps({"n": n})) for n in range(3)])
    assert list(orphans(tmp_path)) == []  # its writer lives
    spool.close()
    with (tmp_path / "dead.jsonl").open("ab") as file:
        file.write(b'[4,"router:ledger","cut o')  # it died within a write that was never acknowledged
    async with writing(redis_server, tmp_path) as (writer, _):
        await writer.commit(LEDGER, {"n": 3})
        assert kept(redis_server) == [0, 1, 2, 3]
        assert not (tmp_path / "dead.jsonl").exists()


async def test_shutting_down_without_redis_leaves_everything_in_the_spool(
    redis_server: RedisProcess, tmp_path: Path
) -> None:
    async with writing(redis_server, tmp_path) as (writer, _):
        redis_server.kill()
        for n in range(10):
            writer.record(LEDGER, {"n": n})
    assert len(read_entries(tmp_path / f"{writer.writer}.jsonl")) == 10
    redis_server.start()
    async with writing(redis_server, tmp_path) as (other, _):
        await other.commit(LEDGER, {"n": 10})
    assert kept(redis_server) == list(range(11))
    assert list(orphans(tmp_path)) == []


async def test_charges_are_settled_once_with_their_entry(redis_server: RedisProcess, tmp_path: Path) -> None:
    charge = Charge("router:spent:x", "budget", 0.25, 100)
    async with writing(redis_server, tmp_path) as (writer, _):
        writer.record(LEDGER, {"n": 0}, [charge])
        await until(lambda: kept(redis_server) == [0])
        redis_server.signal(signal.SIGSTOP)
        writer.record(LEDGER, {"n": 1}, [charge, Charge("router:limit:gone", "bucket", 5.0, 100)])
        await until(lambda: writer.depth == 1)
        redis_server.signal(signal.SIGCONT)
        await until(lambda: writer.depth == 0)
        with redis_server.client() as client:
            assert client.hget("router:spent:x", "n") == b"0.5"
            assert 0 < client.ttl("router:spent:x") <= 100
            assert not client.exists("router:limit:gone")


async def test_neither_redis_nor_disk_is_an_error_and_nothing_is_forgotten(
    redis_server: RedisProcess, tmp_path: Path
) -> None:
    blocked = tmp_path / "spool"
    blocked.write_text("a file where the folder should be")
    async with writing(redis_server, blocked) as (writer, _):
        redis_server.kill()
        with pytest.raises(StateError, match="neither Redis nor the spool"):
            await writer.commit(FEEDBACK, {"n": 0})
        assert writer.fault
        os.unlink(blocked)  # noqa: PTH108
        await until(lambda: writer.depth == 1)
        assert writer.fault is None
        redis_server.start()
        await until(lambda: writer.depth == 0)
    assert kept(redis_server, FEEDBACK) == [0]


def test_a_spool_that_cannot_sync_keeps_none_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, "w")
    spool.append([Entry(1, "s", b"1")])

    def fail(_: int) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="full"):
            spool.append([Entry(2, "s", b"2")])
    spool.append([Entry(2, "s", b"2")])
    assert [entry.number for entry in spool.read()] == [1, 2]
    spool.clear()
    assert spool.read() == []
    spool.close()
