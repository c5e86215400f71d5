"""Models, decisions, feedback, readiness, metrics; and starting and stopping."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from router_service.state.pointer import promote
from routers.errors import RouterConfigError
from routers.policy import RouterChoice
from routers.registry import AnyRouter
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import Running, best_router, eventually, policy, serving

pytestmark = pytest.mark.slow


async def test_models_are_experts_and_policies(redis_server: RedisProcess) -> None:
    policies = [policy(), policy("cheap", description="as cheap as it gets")]
    async with serving(redis_server, FakeExpert("org/good"), policies=policies) as service:
        models = (await service.client.get("/v1/models")).json()
        assert models["object"] == "list"
        assert [(model["id"], model["kind"]) for model in models["data"]] == [
            ("auto", "policy"),
            ("auto:cheap", "policy"),
            ("org/good", "expert"),
        ]
        assert {model["object"] for model in models["data"]} == {"model"}
        expert = (await service.client.get("/v1/models/org/good")).json()
        assert expert == models["data"][2]
        assert expert["expert"]["output_price"] == 2.0


async def test_a_decision_calls_no_expert(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good"), FakeExpert("other")) as service:
        response = await service.client.post("/v1/route", json={"messages": [{"role": "user", "content": "hi"}]})
        decision = response.json()
        assert decision["expert"] == "good"
        assert [candidate["expert"] for candidate in decision["ranking"]] == ["good", "other"]
        assert decision["ranking"][0]["quality"] == pytest.approx(0.9)
        assert decision["removed"] == {}
        assert decision["reason"]
        assert not any(expert.requests for expert in service.experts.values())
        named = await service.client.post("/v1/route", json={"model": "good", "prompt": "hi"})
        assert named.status_code == 400


async def test_feedback_is_kept(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good")) as service:

        async def rate(**body: object) -> int:
            return (await service.client.post("/v1/feedback", json=body)).status_code

        assert await rate(id="chatcmpl-1", rating=0.5, comment="so so") == 200
        assert await rate(id="chatcmpl-1", rating="up") == 200
        entries = await service.stream("feedback", count=2)
        assert [(entry["id"], entry["rating"], entry["comment"]) for entry in entries] == [
            ("chatcmpl-1", 0.5, "so so"),
            ("chatcmpl-1", 1.0, None),
        ]
        for wrong in ({"id": "a"}, {"id": "a", "rating": 2}, {"id": "a", "rating": True}, {"rating": 1}):
            assert await rate(**wrong) == 400
        assert await rate(id="a", rating=1, extra=1) == 400
        assert await rate(id="a", rating="sideways") == 400


async def test_answers_and_feedback_go_on_without_redis_and_are_there_afterwards(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good")) as service:
        ids = [(await service.chat()).json()["id"]]
        redis_server.kill()
        for stream in (False, True) * 5:
            response = await service.chat(stream=stream)
            assert response.status_code == 200
            ids.append(response.headers["x-router-id"])
            rated = await service.client.post("/v1/feedback", json={"id": ids[-1], "rating": 1})
            assert rated.status_code == 200
        status = (await service.client.get("/readyz")).json()
        assert (status["ready"], status["redis"]) == (True, "down")
        assert "router_redis_up 0.0" in (await service.client.get("/metrics")).text
        redis_server.start()
        ledger = await service.stream(count=len(ids))
        assert [entry["id"] for entry in ledger] == ids
        assert [entry["id"] for entry in await service.stream("feedback", count=10)] == ids[1:]
        assert (await service.client.get("/readyz")).json()["redis"] == "up"


async def test_a_service_is_not_ready_before_redis_was_there(redis_server: RedisProcess) -> None:
    redis_server.kill()
    async with serving(redis_server, FakeExpert("good"), ready=False) as service:
        await asyncio.sleep(0.2)
        response = await service.client.get("/readyz")
        assert response.status_code == 503
        assert "Redis cannot be reached" in response.json()["reasons"]
        assert (await service.chat("good")).status_code == 200
        refused = await service.chat("auto")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        redis_server.start()
        await eventually(service.ready)
        assert (await service.chat("auto")).status_code == 200


async def test_a_router_that_cannot_be_loaded_is_said_and_not_replaced_by_another(redis_server: RedisProcess) -> None:
    def fail(_: RouterChoice, promoted: Path | None) -> AnyRouter:
        raise RouterConfigError("its table is missing")

    async with serving(redis_server, FakeExpert("good"), load=fail, ready=False) as service:
        await eventually(lambda: _says(service, "its table is missing"))
        assert (await service.client.get("/readyz")).status_code == 503
        refused = await service.chat("auto")
        assert refused.status_code == 503
        assert "its table is missing" in refused.json()["error"]["message"]
        assert (
            'router_router_loads_total{outcome="error",router="best"} 1.0'
            in (await service.client.get("/metrics")).text
        )


async def test_a_promoted_router_is_swapped_in_without_a_failed_request(
    redis_server: RedisProcess, tmp_path: Path
) -> None:
    best_router("other", "good", "other").save(tmp_path)
    async with serving(redis_server, FakeExpert("good"), FakeExpert("other")) as service:
        link = service.application.service.link
        answered: list[str] = []

        async def keep_asking() -> None:
            while "other" not in answered:
                response = await service.chat()
                assert response.status_code == 200
                answered.append(response.headers["x-router-expert"])

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        await asyncio.sleep(0.2)
        await promote(link, "best", tmp_path)
        async with asyncio.timeout(10):
            await asyncio.gather(*asking)
        assert set(answered) == {"good", "other"}

        await promote(link, "best", tmp_path / "nothing")
        await eventually(lambda: _says(service, "nothing"))
        assert (await service.client.get("/readyz")).status_code == 200  # the one before it goes on
        assert (await service.chat()).headers["x-router-expert"] == "other"
        await promote(link, "best", tmp_path)  # again, from the same folder
        await eventually(lambda: _says(service, '"best":"loaded"'))


async def test_it_is_not_ready_before_its_own_experts_are(redis_server: RedisProcess) -> None:
    good, other = FakeExpert("good"), FakeExpert("other")
    good.up = other.up = False
    async with serving(redis_server, good, other, own=frozenset({"good"}), ready=False) as service:
        await eventually(lambda: _says(service, "experts are being loaded: good"))
        good.up = True
        await eventually(service.ready)


async def test_experts_that_are_down_are_tried_last(redis_server: RedisProcess) -> None:
    good, other = FakeExpert("good"), FakeExpert("other")
    good.up = False
    async with serving(redis_server, good, other) as service:
        response = await service.chat(router={"trace": True})
        assert response.headers["x-router-expert"] == "other"
        decision = response.json()["router"]["decision"]
        assert [candidate["expert"] for candidate in decision["ranking"]] == ["other", "good"]
        assert "tried last, being down: good" in decision["reason"]
        other.up = False
        service.application.service.health.suspect(["other"])
        await eventually(lambda: _says(service, "every expert is down"))
        assert (await service.chat()).status_code == 200  # both are tried nevertheless


async def test_shutdown_waits_for_answers_and_keeps_their_usage(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good", words=("a",) * 20, pause_s=0.05)) as service:
        asked = asyncio.create_task(service.events())
        await eventually(lambda: _asked(service.experts["good"]))
        closing = asyncio.create_task(service.application.service.close())
        await asyncio.sleep(0.05)
        assert (await service.client.get("/readyz")).status_code == 503
        refused = await service.chat()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        _, events = await asked
        await closing
        assert events[-1] == "[DONE]"
        assert [entry["status"] for entry in await service.stream(count=1)] == [200]


async def test_metrics_count_answers_calls_tokens_and_money(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good")) as service:
        await service.chat()
        await service.events()
        await service.chat("nobody")
        text = (await service.client.get("/metrics")).text
        for line in (
            'router_requests_total{expert="good",policy="auto",route="chat/completions",status="200"} 2.0',
            'router_requests_total{expert="",policy="",route="chat/completions",status="404"} 1.0',
            'router_expert_calls_total{expert="good",outcome="ok"} 2.0',
            'router_tokens_total{direction="output",expert="good"} 6.0',
            'router_first_part_seconds_count{policy="auto"} 1.0',
            'router_expert_up{expert="good"} 1.0',
            "router_redis_up 1.0",
            "router_ledger_spool_entries 0.0",
        ):
            assert line in text
        assert "what is two" not in text


async def test_logs_hold_neither_keys_nor_prompts(redis_server: RedisProcess, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        environment = {"ROUTER_API_KEYS": "a:sk-secret"}
        async with serving(redis_server, FakeExpert("good"), environment=environment) as service:
            await service.chat(text="a private matter", headers={"authorization": "Bearer sk-secret"})
            await service.chat(text="a private matter", headers={"authorization": "Bearer sk-secret2"})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("router_service")]
    assert ours
    assert not any("sk-secret" in line or "private" in line for line in ours)


async def test_the_ledger_keeps_texts_if_it_is_told_to(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good"), environment={"ROUTER_LEDGER_TEXT": "true"}) as service:
        await service.chat(text="how high is the sky?")
        assert "how high is the sky?" in (await service.stream(count=1))[0]["text"]


async def _says(service: Running, text: str) -> bool:
    return text in await service.readiness()


async def _asked(expert: FakeExpert) -> bool:
    return bool(expert.requests)
