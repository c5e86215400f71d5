"""Limits and budgets against a real Redis: taken before, settled after, whatever runs beside."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from router_service.state.counters import Counter, Counters
from router_service.state.link import RedisLink
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import Running, eventually, policy, serving

pytestmark = pytest.mark.slow


def limits(**fields: float) -> dict[str, str]:
    return {"ROUTER_API_KEYS": "a:key-a,b:key-b", "ROUTER_LIMITS": json.dumps({"a": fields})}


A, B = {"authorization": "Bearer key-a"}, {"authorization": "Bearer key-b"}


async def test_parallel_reservations_never_exceed_a_limit(redis_server: RedisProcess) -> None:
    link = RedisLink(redis_server.url)
    await link.probe()
    counters = Counters(link)
    bucket = Counter(name="requests", key="router:limit:x", kind="bucket", limit=10, amount=1)
    budget = Counter(name="usd", key="router:spent:x", kind="budget", limit=5.0, amount=1.0, ttl_s=100)
    answers = await asyncio.gather(*(counters.reserve([bucket, budget]) for _ in range(30)))
    assert sum(answer.refused is None for answer in answers) == 5
    assert {answer.refused for answer in answers if answer.refused} == {budget}
    # What was refused took nothing from the bucket either.
    (left,) = (await counters.reserve([bucket])).left
    assert left == pytest.approx(4, abs=0.5)
    with redis_server.client() as client:
        assert 0 < client.ttl("router:limit:x") <= 120
        assert 0 < client.ttl("router:spent:x") <= 100
    await link.close()


async def test_requests_a_minute(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good"), environment=limits(requests_per_minute=3)) as service:
        first = await service.chat(headers=A)
        assert first.headers["x-ratelimit-limit-requests"] == "3"
        assert first.headers["x-ratelimit-remaining-requests"] == "2"
        assert first.headers["x-ratelimit-reset-requests"].endswith("s")
        assert (await service.events(headers=A))[0].status_code == 200
        route = {"messages": [{"role": "user", "content": "hi"}]}
        assert (await service.client.post("/v1/route", json=route, headers=A)).status_code == 200
        refused = await service.chat(headers=A)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert (await service.client.post("/v1/route", json=route, headers=A)).status_code == 429
        rating = {"id": "x", "rating": 1}
        assert (await service.client.post("/v1/feedback", json=rating, headers=A)).status_code == 429
        assert (await service.chat(headers=B)).status_code == 200
        assert (await service.stream(count=4))[2]["status"] == 429


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_settled_to_what_was_used(redis_server: RedisProcess, stream: bool) -> None:
    async with serving(redis_server, FakeExpert("good"), environment=limits(tokens_per_minute=1000)) as service:
        for _ in range(3):  # each reserves 900 and uses 13
            await eventually(lambda: _has_tokens(service, 900))
            response = await service.chat(headers=A, stream=stream, max_tokens=890)
            assert response.status_code == 200
            assert int(response.headers["x-ratelimit-remaining-tokens"]) < 110
        service.experts["good"].pause_s = 1.0  # so that all of them are there before the first is settled
        used = await asyncio.gather(*(service.chat(headers=A, max_tokens=890) for _ in range(4)))
        assert sorted(answer.status_code for answer in used) == [200, 429, 429, 429]


async def _has_tokens(service: Running, tokens: float) -> bool:
    with service.redis.client() as client:
        held = client.hget("router:limit:tokens:a", "n")
    return held is None or float(held) >= tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_a_budget_is_spent_by_every_way_to_an_expert(redis_server: RedisProcess, stream: bool) -> None:
    experts, cards = (FakeExpert("good"), FakeExpert("vectors")), {"vectors": {"kind": "embedding"}}
    async with serving(redis_server, *experts, cards=cards, environment=limits(usd_per_day=30e-6)) as service:

        async def ask(model: str) -> int:
            status = (await service.chat(model, stream=stream, headers=A)).status_code
            await asyncio.sleep(0.1)  # until it is settled
            return status

        assert [await ask("auto"), await ask("good"), await ask("good")] == [200, 200, 429]  # 16e-6 USD each
        refused = await service.client.post("/v1/embeddings", json={"model": "vectors", "input": "a"}, headers=A)
        assert refused.json()["error"]["type"] == "insufficient_quota"
        assert (await service.chat(headers=B)).status_code == 200
        with redis_server.client() as client:
            (key,) = client.keys("router:spent:key:a:*")
            assert float(client.hget(key, "n")) == pytest.approx(32e-6)


@pytest.mark.parametrize(
    ("strategy", "options", "ceilings", "calls", "usd"),
    [
        ("single", {}, {}, 1, 1800e-6),
        ("vote", {"voters": 3, "samples": 2}, {}, 6, 6 * 1800e-6),
        ("vote", {"voters": 3}, {"calls": 2}, 2, 2 * 1800e-6),
        ("cascade", {"experts": ["a", "b"]}, {}, 2, 2 * 1800e-6),
        ("mixture_of_agents", {"proposers": 3}, {"cost_usd": 0.004}, 4, 0.004),
        ("self_moa", {"samples": 4}, {}, 5, 5 * 1800e-6),
    ],
)
async def test_all_calls_of_a_strategy_are_reserved(
    redis_server: RedisProcess, strategy: str, options: dict[str, Any], ceilings: dict[str, Any], calls: int, usd: float
) -> None:
    served = policy(strategy={"name": strategy, "options": options}, ceilings=ceilings)
    experts = [FakeExpert(name, pause_s=0.2) for name in ("a", "b", "c")]
    limited = limits(usd_per_day=1, tokens_per_minute=100_000)
    async with serving(redis_server, *experts, policies=[served], environment=limited) as service:
        asked = asyncio.create_task(service.chat(headers=A, max_tokens=890))
        await eventually(lambda: _asked(experts))
        with redis_server.client() as client:
            (key,) = client.keys("router:spent:key:a:*")
            assert float(client.hget(key, "n")) == pytest.approx(usd, rel=0.02)
        response = await asked
        assert response.status_code == 200
        assert 100_000 - int(response.headers["x-ratelimit-remaining-tokens"]) == pytest.approx(900 * calls, rel=0.02)


async def _asked(experts: list[FakeExpert]) -> bool:
    return any(expert.requests for expert in experts)


async def test_a_policys_budget_is_everyones(redis_server: RedisProcess) -> None:
    policies = [policy(), policy("small", budget={"usd_per_day": 10e-6})]
    async with serving(redis_server, FakeExpert("good"), policies=policies, environment=limits()) as service:
        assert (await service.chat("auto:small", headers=A)).status_code == 200
        await service.stream(count=1)
        assert (await service.chat("auto:small", headers=B)).status_code == 429
        assert (await service.chat("auto", headers=B)).status_code == 200


async def test_a_stream_that_is_cut_off_spends_the_budget(redis_server: RedisProcess) -> None:
    endless = FakeExpert("good", words=("more ",) * 10_000, pause_s=0.01)
    async with serving(redis_server, endless, environment=limits(usd_per_day=1)) as service:
        body = {"model": "good", "stream": True, "messages": [{"role": "user", "content": "go on"}]}
        async with service.client.stream("POST", "/v1/chat/completions", json=body, headers=A) as response:
            async for _ in response.aiter_lines():
                break
        (entry,) = await service.stream(count=1)
        with redis_server.client() as client:
            (key,) = client.keys("router:spent:key:a:*")
            assert float(client.hget(key, "n")) == pytest.approx(entry["cost_usd"])


@pytest.mark.parametrize(("fail", "status"), [("open", 200), ("closed", 503)])
async def test_limits_without_redis_fail_as_configured(redis_server: RedisProcess, fail: str, status: int) -> None:
    environment = {**limits(usd_per_day=1.0, requests_per_minute=2), "ROUTER_LIMITS_FAIL": fail}
    async with serving(redis_server, FakeExpert("good"), environment=environment) as service:
        redis_server.kill()
        answers = [await service.chat(headers=A) for _ in range(4)]
        assert {answer.status_code for answer in answers} == {status}
        assert (await service.chat(headers=B)).status_code == 200  # has no limits
        redis_server.start()
        await eventually(service.ready)
        if fail == "open":  # what was answered meanwhile is charged once Redis is back
            await service.stream(count=5)
            with redis_server.client() as client:
                (key,) = client.keys("router:spent:key:a:*")
                assert float(client.hget(key, "n")) == pytest.approx(4 * 16e-6)
