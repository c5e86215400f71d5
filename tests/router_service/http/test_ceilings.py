"""What a request may use is never exceeded, whatever its experts do: fail, dawdle, write without end, ignore bounds."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from experts.errors import ExpertUnavailableError
from experts.expert import ExpertRequest, Part, Usage
from router_service.core.ceilings import CostCeiling, most_input_tokens
from routers.policy import Policy
from tests.router_service.fakes import FakeExpert, RedisProcess, card
from tests.router_service.serving import Running, policy, serving

STRATEGIES: dict[str, dict[str, Any]] = {
    "cascade": {"threshold": 1.0},
    "vote": {"voters": 3},
    "mixture_of_agents": {"proposers": 2},
    "self_moa": {"samples": 2},
}


class Endless(FakeExpert):
    """Writes on and on, whatever bound it was given, and never says what it used; a plain answer never comes."""

    async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
        for number in itertools.count():
            choice = {"index": 0, "delta": {"content": f" word{number}"}, "finish_reason": None}
            yield Part(self._json(request, "chat.completion.chunk", choice))
            await asyncio.sleep(0)

    async def _whole(self, request: ExpertRequest) -> AsyncIterator[Part]:
        await asyncio.sleep(3600)
        yield Part(b"{}")


class Greedy(FakeExpert):
    """Writes as much as it is allowed to."""

    async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
        count = int(request.body.get("max_tokens") or 1000)
        for number in range(count):
            choice = {"index": 0, "delta": {"content": f" {self.name}{number % 9}"}, "finish_reason": None}
            yield Part(self._json(request, "chat.completion.chunk", choice))
        yield Part(b"", Usage(input_tokens=10, output_tokens=count))


class Stubborn(FakeExpert):
    """Says nothing, and does not mind its time."""

    async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
        await asyncio.sleep(3600)
        yield Part(b"{}")

    _whole = _stream


def limited(strategy: str, *, timeout_s: float = 20.0, **ceilings: float) -> Policy:
    choice = {"name": strategy, "options": STRATEGIES.get(strategy, {})}
    return policy(strategy=choice, ceilings=ceilings, timeout_s=timeout_s, fallbacks={"max_attempts": 5})


async def used(service: Running) -> dict[str, Any]:
    """The ledger's entry of the one request."""
    return (await service.stream(count=1))[0]


@pytest.fixture
def redis_server(tmp_path: Path) -> Any:
    process = RedisProcess(tmp_path)
    process.start()
    yield process
    process.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_endless_experts_stay_below_the_cost(redis_server: RedisProcess, strategy: str, stream: bool) -> None:
    experts = [Endless("a"), Endless("b"), Endless("c")]
    async with serving(redis_server, *experts, policies=[limited(strategy, cost_usd=0.002)]) as service:
        response = await service.chat(stream=stream)
        assert response.status_code == 502 or stream
        entry = await used(service)
        assert 0 < entry["cost_usd"] <= 0.002
        assert all(call["error"] for call in entry["calls"])  # each was cut off, or not let begin


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_calls_beside_each_other_share_the_cost(redis_server: RedisProcess, strategy: str) -> None:
    experts = [Greedy("a"), Greedy("b"), Greedy("c")]
    async with serving(redis_server, *experts, policies=[limited(strategy, cost_usd=0.002)]) as service:
        response = await service.chat()
        entry = await used(service)
        assert response.status_code == 200, response.text
        assert 0.001 < entry["cost_usd"] <= 0.002
        bounds = [request.body["max_tokens"] for expert in experts for request in expert.requests]
        assert all(bound >= 1 for bound in bounds)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_slow_experts_stay_within_the_time(redis_server: RedisProcess, strategy: str) -> None:
    experts = [Stubborn("a"), Stubborn("b"), Stubborn("c")]
    async with serving(redis_server, *experts, policies=[limited(strategy, timeout_s=0.6)]) as service:
        started = time.perf_counter()
        response = await service.chat()
        assert response.status_code == 504
        assert time.perf_counter() - started < 0.6 + 1.5  # what a busy machine adds
        entry = await used(service)
        assert entry["latency_s"] < 0.6 + 1.5


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
async def test_failing_experts_stay_within_the_calls(redis_server: RedisProcess, strategy: str) -> None:
    experts = [FakeExpert(name, error=ExpertUnavailableError("gone")) for name in "abcde"]
    async with serving(redis_server, *experts, policies=[limited(strategy, calls=3)]) as service:
        assert (await service.chat()).status_code == 502
        entry = await used(service)
        assert 1 <= len(entry["calls"]) <= 3
        assert sum(len(expert.requests) for expert in experts) == len(entry["calls"])


async def test_an_answer_names_who_gave_it_and_traces_every_call(redis_server: RedisProcess) -> None:
    experts = [FakeExpert("a", ("8",)), FakeExpert("b", ("9",)), FakeExpert("c", ("9",))]
    async with serving(redis_server, *experts, policies=[limited("vote", calls=3)]) as service:
        response = await service.chat(router={"trace": True})
        assert response.json()["choices"][0]["message"]["content"] == "9"
        assert response.headers["x-router-expert"] == "b"
        assert response.headers["x-router-strategy"] == "vote"
        trace = response.json()["router"]
        assert [(call["expert"], call["why"]) for call in trace["calls"]] == [
            ("a", "vote 1"), ("b", "vote 2"), ("c", "vote 3")
        ]  # fmt: skip
        assert all(call["cost_usd"] > 0 for call in trace["calls"])
        assert (await used(service))["expert"] == "b"


def test_a_grant_is_what_the_rest_of_the_ceiling_pays_for() -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 500}
    request = ExpertRequest(id="1", endpoint="chat/completions", body=body)
    reads = 1e-6 * most_input_tokens(body)
    ceiling = CostCeiling(2 * reads + 2e-6 * 700)
    first, bounded = ceiling.grant(card("a"), request)
    assert (first.output_tokens, bounded.body["max_tokens"]) == (500, 500)
    second, bounded = ceiling.grant(card("b"), request)
    assert (second.output_tokens, bounded.body["max_tokens"]) == (200, 200)
    with pytest.raises(ExpertUnavailableError, match="leaves no call of it"):
        ceiling.grant(card("c"), request)
    ceiling.settle(first, 0.0)
    assert ceiling.grant(card("c"), request)[0].output_tokens == 500


def test_input_is_counted_at_a_token_a_byte() -> None:
    body = {"messages": [{"role": "user", "content": "é" * 1000}]}
    assert most_input_tokens(body) >= 2000
    assert orjson.dumps(body)
