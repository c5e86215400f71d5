"""The private Redis: what was acknowledged survives kills, orphans are ended, and two owners do not share a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from router_service.errors import StateError
from router_service.redis_server import RedisServer

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


@pytest.fixture
def server(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder)
    server.start()
    yield server
    server.stop()


def _eventually(client: redis.Redis, key: str, seconds: float = 10.0) -> bytes | None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return client.get(key)
        except redis.RedisError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_acknowledged_writes_survive_a_kill_and_it_is_restarted(server: RedisServer) -> None:
    client = redis.Redis.from_url(server.url)
    for i in range(100):
        client.set(f"key{i}", i)
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert _eventually(client, "key99") == b"99"
    assert client.dbsize() == 100
    assert server.pid not in (None, first)


def test_stop_ends_the_process_and_the_next_start_has_the_data(folder: Path) -> None:
    first = RedisServer(folder)
    first.start()
    redis.Redis.from_url(first.url).set("a", 1)
    pid = first.pid
    assert pid is not None
    first.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    second = RedisServer(folder)
    second.start()
    assert redis.Redis.from_url(second.url).get("a") == b"1"
    second.stop()


def test_a_folder_has_one_owner(server: RedisServer, folder: Path) -> None:
    with pytest.raises(StateError, match="another service uses the state folder"):
        RedisServer(folder).start()
    assert redis.Redis.from_url(server.url).ping()


def test_an_orphan_is_ended_and_its_data_kept(folder: Path) -> None:
    script = (
        "import sys, os, pathlib, redis; from router_service.redis_server import RedisServer\n"
        "server = RedisServer(pathlib.Path(sys.argv[1])); server.start()\n"
        "redis.Redis.from_url(server.url).set('a', 1)\n"
        "print(server.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    owner = subprocess.run([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True, check=False)
    orphan = int(owner.stdout)
    os.kill(orphan, 0)
    server = RedisServer(folder)
    server.start()
    assert server.pid != orphan
    with pytest.raises(ProcessLookupError):
        os.kill(orphan, 0)
    assert redis.Redis.from_url(server.url).get("a") == b"1"
    server.stop()


def test_a_path_too_long_for_a_socket_is_said(folder: Path) -> None:
    with pytest.raises(StateError, match="too long for a unix socket"):
        RedisServer(folder / ("x" * 120)).start()


def test_a_server_that_cannot_start_says_why(folder: Path) -> None:
    (folder / "appendonly.aof").write_text("this is no append-only file\n")
    with pytest.raises(StateError, match=r"Redis ended with status 1: .+"):
        RedisServer(folder).start()
