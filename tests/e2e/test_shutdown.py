"""The end of the service, which comes last here since all tests share one: nothing that it took is dropped."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from router_service.bench.processes import descendants
from router_service.redis_server import RedisServer
from tests.e2e.conftest import LOCAL, Stack, ledger_of
from tests.e2e.waiting import eventually

pytestmark = pytest.mark.slow

ASKED = 16


def test_shutdown_under_load_drops_nothing(stack: Stack) -> None:
    processes = descendants(stack.service.process.pid)
    with ThreadPoolExecutor(2 * ASKED) as pool:
        slow = [pool.submit(stack.chat, "slow") for _ in range(ASKED)]
        local = [pool.submit(stack.chat, LOCAL, max_tokens=200) for _ in range(ASKED)]
        time.sleep(0.5)
        stack.service.process.send_signal(signal.SIGTERM)
        responses = [answer.result() for answer in (*slow, *local)]
    assert [response.status_code for response in responses] == [200] * 2 * ASKED
    assert stack.service.process.wait(90) == 0
    eventually(lambda: not set(processes) & set(descendants(1)), 15.0)  # Ray's own end a moment after their parent
    ids = {response.json()["router"]["id"] for response in responses}
    server = RedisServer(stack.folder / "data")
    server.start()
    assert ids <= {entry["id"] for entry in ledger_of(redis.Redis.from_url(server.url))}
    server.stop()
