"""Answers over HTTP: whole, streamed, failing, cut off."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import orjson
import pytest

from experts.errors import ExpertRequestError, ExpertTimeoutError, ExpertUnavailableError
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import Running, policy, serving

pytestmark = pytest.mark.slow


VECTORS = {"vectors": {"kind": "embedding"}}


def text_of(events: list[str]) -> str:
    chunks = [orjson.loads(event) for event in events if event != "[DONE]"]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


async def test_a_policy_answers_and_says_who_did(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good"), FakeExpert("other")) as service:
        response = await service.chat("auto")
        assert response.status_code == 200
        answer = response.json()
        assert answer["choices"][0]["message"]["content"] == "four it is"
        headers = response.headers
        assert headers["x-router-expert"] == "good"
        assert headers["x-router-policy"] == "auto"
        assert headers["x-router-router"] == "best"
        assert headers["x-router-strategy"] == "single"
        assert headers["x-router-attempts"] == "1"
        assert headers["x-router-reason"].startswith("good: estimated quality 0.90")
        assert float(headers["x-router-cost-usd"]) == pytest.approx(16e-6)
        assert headers["x-router-id"] == headers["x-request-id"] == answer["id"]
        assert "router" not in answer
        (entry,) = await service.stream(count=1)
        assert entry["id"] == entry["request_id"] == answer["id"]
        assert entry["status"] == 200
        assert entry["key"] == "anonymous"
        assert entry["text"] is None
        assert entry["cost_usd"] == pytest.approx(16e-6)
        assert [candidate["expert"] for candidate in entry["decision"]["ranking"]] == ["good", "other"]
        assert [(call["expert"], call["output_tokens"]) for call in entry["calls"]] == [("good", 3)]


async def test_the_body_reaches_the_expert_untouched_but_for_the_services_own_field(redis_server: RedisProcess) -> None:
    fields: dict[str, Any] = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "user", "content": "go on"},
        ],
        "never_heard_of": {"a": [1, None]},
    }
    async with serving(redis_server, FakeExpert("good"), cards={"good": {"features": {"tools"}}}) as service:
        body = {"model": "good", **fields, "router": {"trace": True}}
        response = await service.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        assert service.experts["good"].requests[0].body == {"model": "good", **fields}
        trace = response.json()["router"]
        assert trace["expert"] == "good"
        assert trace["status"] == 200
        assert trace["decision"] is None


async def test_an_expert_is_not_asked_for_what_it_cannot_do(redis_server: RedisProcess) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    cards = {"able": {"features": {"tools"}}}
    async with serving(redis_server, FakeExpert("good"), FakeExpert("able"), cards=cards) as service:
        assert (await service.chat("auto", tools=tools)).headers["x-router-expert"] == "able"
        refused = await service.chat("good", tools=tools)
        assert refused.status_code == 400
        assert "does not offer tools" in refused.json()["error"]["message"]
        assert service.experts["good"].requests == []


async def test_a_stream_is_framed_as_openai_frames_it(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good")) as service:
        response, events = await service.events("auto", headers={"x-router-trace": "1"})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-router-expert"] == "good"
        assert events[-1] == "[DONE]"
        assert text_of(events) == "four it is"
        trace = orjson.loads(events[-2])
        assert trace["choices"] == []
        assert trace["router"]["calls"][0]["output_tokens"] == 3
        (entry,) = await service.stream(count=1)
        assert entry["stream"] is True
        assert entry["first_part_s"] <= entry["latency_s"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_expert_that_fails_is_replaced_and_the_trace_says_so(redis_server: RedisProcess, stream: bool) -> None:
    down = FakeExpert("good", error=ExpertUnavailableError("connection refused"))
    async with serving(redis_server, down, FakeExpert("other")) as service:
        response = await service.chat("auto", stream=stream)
        assert response.status_code == 200
        assert response.headers["x-router-expert"] == "other"
        assert response.headers["x-router-attempts"] == "2"
        (entry,) = await service.stream(count=1)
        assert [(call["expert"], call["error"]) for call in entry["calls"]] == [
            ("good", "ExpertUnavailableError: connection refused"),
            ("other", None),
        ]
        assert entry["calls"][0]["cost_usd"] == 0


async def test_a_stream_that_breaks_ends_with_an_error_event_and_is_charged(redis_server: RedisProcess) -> None:
    breaks = FakeExpert("good", error=ExpertUnavailableError("connection lost"), error_after=2)
    async with serving(redis_server, breaks) as service:
        response, events = await service.events("good")
        assert response.status_code == 200
        assert text_of(events[:-1]) == "four it"
        assert orjson.loads(events[-1])["error"] == {
            "message": "connection lost",
            "type": "upstream_error",
            "param": None,
            "code": "upstream_error",
        }
        (entry,) = await service.stream(count=1)
        assert entry["status"] == 502
        (call,) = entry["calls"]
        assert call["estimated"] is True
        assert call["output_tokens"] == 2
        assert entry["cost_usd"] > 4e-6


async def test_a_client_that_hangs_up_stops_its_expert_and_is_charged(redis_server: RedisProcess) -> None:
    endless = FakeExpert("good", words=("more ",) * 10_000, pause_s=0.01)
    async with serving(redis_server, endless) as service:
        body = {"model": "good", "stream": True, "messages": [{"role": "user", "content": "go on"}]}
        async with service.client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for _ in response.aiter_lines():
                break
        (entry,) = await service.stream(count=1)
        assert entry["status"] == 499
        assert endless.closed_early == 1
        (call,) = entry["calls"]
        assert call["error"] == "cut off"
        assert 0 < call["output_tokens"] < 200
        assert call["cost_usd"] > 0
        assert service.application.service.gate.under_way == 0


async def test_a_client_that_hangs_up_before_a_whole_answer_stops_its_expert(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good", pause_s=30)) as service:
        with pytest.raises(httpx.ReadTimeout):
            await service.client.post(
                "/v1/chat/completions",
                json={"model": "auto", "messages": [{"role": "user", "content": "hi"}]},
                timeout=0.3,
            )
        (entry,) = await service.stream(count=1)
        assert (entry["status"], entry["calls"][0]["error"]) == (499, "cut off")
        assert service.experts["good"].closed_early == 1


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ExpertUnavailableError("refused"), 502, "upstream_error"),
        (ExpertUnavailableError("busy", retry_after_s=7.2), 503, "unavailable"),
        (ExpertTimeoutError("too slow"), 504, "upstream_timeout"),
        (ExpertRequestError("too long", code="context_length_exceeded"), 400, "context_length_exceeded"),
        (ExpertRequestError("no", status=422, param="tools", code="x"), 422, "x"),
    ],
)
async def test_an_experts_failure_has_its_status(
    redis_server: RedisProcess, error: Exception, status: int, code: str
) -> None:
    async with serving(redis_server, FakeExpert("good", error=error)) as service:
        for stream in (False, True):
            response = await service.chat("good", stream=stream)
            assert response.status_code == status
            assert response.json()["error"]["code"] == code
            assert response.headers["x-router-expert"] == "good"
        if code == "unavailable":
            assert response.headers["retry-after"] == "8"
        assert [entry["status"] for entry in await service.stream(count=2)] == [status, status]


async def test_a_bug_is_an_error_body_and_no_stack_trace(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good", error=ZeroDivisionError("a secret of the code"))) as service:
        response = await service.chat("good")
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert (await service.stream(count=1))[0]["status"] == 500


async def test_an_expert_that_ignores_its_time_is_cut_off(redis_server: RedisProcess) -> None:
    slow = FakeExpert("good", pause_s=30)
    async with serving(redis_server, slow, environment={"ROUTER_REQUEST_TIMEOUT_S": "0.3"}) as service:
        response = await service.chat("good")
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "upstream_timeout"
        assert slow.closed_early == 1


async def test_embeddings_come_from_a_named_expert_only(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good"), FakeExpert("vectors"), cards=VECTORS) as service:
        response = await service.client.post("/v1/embeddings", json={"model": "vectors", "input": "a"})
        assert response.json()["data"][0]["embedding"] == [0.5, -0.5]
        assert (await service.stream(count=1))[0]["calls"][0]["input_tokens"] == 3
        refused = await service.client.post("/v1/embeddings", json={"model": "auto", "input": "a"})
        assert refused.status_code == 404
        assert refused.json()["error"]["param"] == "model"
        assert (await service.client.post("/v1/embeddings", json={"model": "good", "input": "a"})).status_code == 400
        assert (await service.chat("vectors")).status_code == 400
        assert (await service.chat("auto")).headers["x-router-expert"] == "good"


async def test_the_openai_client_works_unchanged(redis_server: RedisProcess) -> None:
    experts = (FakeExpert("good"), FakeExpert("vectors"))
    async with serving(redis_server, *experts, cards=VECTORS) as service, _openai(service) as client:
        answer = await client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "2+2?"}])
        assert answer.choices[0].message.content == "four it is"
        assert answer.usage
        assert answer.usage.completion_tokens == 3
        said = ""
        async for chunk in await client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": "2+2?"}],
            stream=True,
            extra_body={"router": {"trace": True}},
        ):
            said += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert said == "four it is"
        assert {model.id async for model in client.models.list()} == {"auto", "good", "vectors"}
        assert (await client.models.retrieve("good")).owned_by == "router-service"
        vectors = await client.embeddings.create(model="vectors", input="a", encoding_format="float")
        assert vectors.data[0].embedding == [0.5, -0.5]
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "2+2?"}])
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(
                model="auto", messages=[{"role": "user", "content": "2+2?"}], temperature=9
            )


async def test_the_openai_client_sees_a_broken_stream_as_an_error(redis_server: RedisProcess) -> None:
    breaks = FakeExpert("good", error=ExpertUnavailableError("connection lost"), error_after=2)
    async with serving(redis_server, breaks) as service, _openai(service) as client:
        stream = await client.chat.completions.create(
            model="good", messages=[{"role": "user", "content": "2+2?"}], stream=True
        )
        with pytest.raises(openai.APIError, match="connection lost"):
            async for _ in stream:
                pass


def _openai(service: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_cache_gives_out_whole_answers(redis_server: RedisProcess, stream: bool) -> None:
    policies = [policy(), policy("cached", cache_ttl_s=60)]
    async with serving(redis_server, FakeExpert("good"), policies=policies) as service:

        async def ask(**fields: Any) -> tuple[str, str, str]:
            response = await service.chat("auto:cached", stream=stream, **fields)
            return response.headers["x-router-cache"], response.headers["x-router-id"], response.text

        first, first_id, text = await ask(temperature=0)
        await asyncio.sleep(0.1)
        second, second_id, again = await ask(temperature=0)
        assert (first, second) == ("miss", "hit")
        assert first_id != second_id
        assert [_without_id(line) for line in text.splitlines()] == [_without_id(line) for line in again.splitlines()]
        assert second_id in again
        assert first_id not in again
        assert (await ask(temperature=0, max_tokens=5))[0] == "miss"
        assert "x-router-cache" not in (await service.chat("auto:cached")).headers  # not deterministic
        assert "x-router-cache" not in (await service.chat("auto", temperature=0)).headers  # not asked for
        entries = await service.stream(count=5)
        assert (entries[1]["cache"], entries[1]["cost_usd"], entries[1]["calls"]) == ("hit", 0, [])


def _without_id(line: str) -> Any:
    data = line.removeprefix("data: ")
    if not data.startswith("{"):
        return data
    return {name: value for name, value in orjson.loads(data).items() if name != "id"}


async def test_a_stream_that_broke_is_not_cached(redis_server: RedisProcess) -> None:
    breaks = FakeExpert("good", error=ExpertUnavailableError("connection lost"), error_after=2)
    async with serving(redis_server, breaks, policies=[policy(cache_ttl_s=60)]) as service:
        await service.events(temperature=0)
        await asyncio.sleep(0.1)
        response, _ = await service.events(temperature=0)
        assert response.headers["x-router-cache"] == "miss"


async def test_a_session_stays_with_its_expert(redis_server: RedisProcess) -> None:
    good, other = FakeExpert("good", error=ExpertUnavailableError("gone")), FakeExpert("other")
    async with serving(redis_server, good, other, policies=[policy(session_ttl_s=60)]) as service:
        session = {"x-session-id": "s1"}
        assert (await service.chat(headers=session)).headers["x-router-attempts"] == "2"
        good.error = None
        await asyncio.sleep(0.1)
        stays = await service.chat(headers=session)
        assert stays.headers["x-router-expert"] == "other"
        assert "session stays" in stays.headers["x-router-reason"]
        assert (await service.chat(router={"session": "s2"})).headers["x-router-expert"] == "good"
