"""What is killed while the service answers: experts, Redis, clients. Answers go on, and nothing recorded is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import pytest
import redis

from router_service.bench.processes import find
from router_service.bench.service import Running, service, write_fleet, write_policies
from tests.e2e.conftest import LOCAL, Stack, ledger_of, remote_expert
from tests.e2e.waiting import eventually
from tests.router_service.fakes import RedisProcess

pytestmark = pytest.mark.slow


def test_an_expert_that_hangs_up_is_replaced_by_the_next(stack: Stack) -> None:
    response = stack.chat("auto:remote-first")
    assert response.status_code == 200
    calls = response.json()["router"]["calls"]
    assert [call["expert"] for call in calls] == ["dying", "fast"]
    assert calls[0]["error"].startswith("ExpertUnavailableError")
    assert calls[1]["error"] is None
    assert response.headers["x-router-expert"] == "fast"


def test_a_stream_that_breaks_off_after_its_first_words_says_so(stack: Stack) -> None:
    lines = stack.chat("auto:remote-first", stream=True).text.split("\n\n")
    assert '"content":"The"' in lines[0]
    assert '"error"' in lines[1]
    assert "[DONE]" not in lines


def test_a_local_expert_killed_in_mid_flight_is_replaced_by_the_next(stack: Stack) -> None:
    clients, killed = 24, Event()

    def ask_until_killed(client: int) -> list[httpx.Response]:
        responses = []
        while not killed.is_set():
            responses.append(stack.chat("auto", f"What is {client} + {len(responses)}?"))
        return responses

    with ThreadPoolExecutor(clients) as pool:
        answers = [pool.submit(ask_until_killed, client) for client in range(clients)]
        time.sleep(0.5)
        kill_replica(stack)
        killed.set()
        responses = [response for answer in answers for response in answer.result()]
    assert {response.status_code: response.text for response in responses if response.status_code != 200} == {}
    traces = [response.json()["router"] for response in responses]
    saved = [trace for trace in traces if [call["expert"] for call in trace["calls"]] == [LOCAL, "fast"]]
    assert saved
    assert all(trace["calls"][0]["error"] for trace in saved)
    ids = [trace["id"] for trace in traces]
    eventually(lambda: set(ids) <= {entry["id"] for entry in stack.ledger()})
    assert sorted(entry["id"] for entry in stack.ledger() if entry["id"] in ids) == sorted(ids)  # each of them once
    eventually(lambda: stack.chat(LOCAL).status_code == 200, 60.0)


def test_a_remote_service_killed_in_mid_flight_is_replaced_by_a_local_expert(stack: Stack) -> None:
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(stack.chat, "auto:doomed-first")
        eventually(lambda: httpx.get(f"{stack.doomed.url}/stats", trust_env=False).json())
        stack.doomed.process.kill()
        response = answer.result()
    assert response.status_code == 200, response.text
    trace = response.json()["router"]
    assert [call["expert"] for call in trace["calls"]] == ["doomed", LOCAL]
    assert trace["calls"][0]["error"].startswith("ExpertUnavailableError")
    assert trace["status"] == 200
    eventually(lambda: trace["id"] in {entry["id"] for entry in stack.ledger()})


def test_a_client_that_hangs_up_stops_the_generation(stack: Stack) -> None:
    body = {"model": "endless", "stream": True, "messages": [{"role": "user", "content": "go on"}]}
    with stack.http.stream("POST", "/v1/chat/completions", json=body) as response:
        answer_id = response.headers["x-router-id"]
        next(response.iter_lines())
    eventually(lambda: stack.stats("endless").get("abandoned", 0) == 1, 5.0)
    entry = eventually(lambda: [entry for entry in stack.ledger() if entry["id"] == answer_id])[0]
    assert entry["status"] == 499
    assert entry["cost_usd"] > 0


def test_the_private_redis_may_die(stack: Stack) -> None:
    process: int = stack.redis.info("server")["process_id"]
    ids = check_redis_may_die(stack.chat, stack.http, kill=lambda: os.kill(process, signal.SIGKILL))
    eventually(lambda: stack.redis.ping())
    assert stack.redis.info("server")["process_id"] != process
    check_kept(stack.ledger, stack.redis.xrange, ids)


def test_a_redis_of_ones_own_may_die(tmp_path_factory: pytest.TempPathFactory, second: Running) -> None:
    folder = tmp_path_factory.mktemp("external")
    fleet = write_fleet(folder, [remote_expert(second, "fast", "fast")])
    policies = write_policies(folder, fleet, {"fast": 1.0})
    server = RedisProcess(folder / "r")
    server.start()
    options = ("--no-ray", "--fleet", str(fleet), "--policies", str(policies), "--redis-url", server.url)
    with service(folder, options=options) as running, httpx.Client(base_url=running.url, timeout=30.0) as client:

        def chat(model: str) -> httpx.Response:
            body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "router": {"trace": True}}
            return client.post("/v1/chat/completions", json=body)

        ids = check_redis_may_die(chat, client, kill=server.kill)
        server.start()
        connection = redis.Redis(unix_socket_path=str(server.socket))
        check_kept(lambda: ledger_of(connection), connection.xrange, ids)
    server.stop()


def kill_replica(stack: Stack) -> None:
    """Kill the process that hosts the pocket base and its adapters."""
    (replica,) = find(stack.service.process.pid, f"ray::ServeReplica:experts-{LOCAL}:Experts")
    os.kill(replica, signal.SIGKILL)


def check_redis_may_die(
    chat: Callable[[str], httpx.Response], client: httpx.Client, *, kill: Callable[[], None]
) -> list[str]:
    """Ask, rate, kill Redis, and ask on; the ids of all answers, of which the first was rated."""
    before = [chat("fast") for _ in range(5)]
    rated = client.post("/v1/feedback", json={"id": before[0].json()["router"]["id"], "rating": "up"})
    assert rated.status_code == 200
    kill()
    after = [chat("fast") for _ in range(20)]
    assert {response.status_code for response in (*before, *after)} == {200}
    return [response.json()["router"]["id"] for response in (*before, *after)]


def check_kept(ledger: Callable[[], list[dict[str, Any]]], xrange: Callable[[str], Any], ids: list[str]) -> None:
    """All usage is in the ledger, each entry once, and the rating is there."""
    eventually(lambda: set(ids) <= {entry["id"] for entry in ledger()})
    assert sorted(entry["id"] for entry in ledger() if entry["id"] in ids) == sorted(ids)
    assert sum(ids[0].encode() in entry[b"entry"] for _, entry in xrange("router:feedback")) == 1
