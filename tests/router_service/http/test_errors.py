"""What the service refuses, with the status and the body that OpenAI's clients expect."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from router_service.http.connection import encode_headers
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import policy, serving

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    error: dict[str, Any] = body["error"]
    return error


async def test_malformed_requests(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good")) as service:
        cases: list[tuple[dict[str, Any], str | None, str | None]] = [
            ({}, "model", "missing_required_parameter"),
            ({"model": 3, "messages": HELLO}, "model", None),
            ({"model": "auto"}, "messages", None),
            ({"model": "auto", "messages": []}, "messages", None),
            ({"model": "auto", "messages": ["hello"]}, "messages[0]", None),
            ({"model": "auto", "messages": HELLO, "stream": "yes"}, "stream", "invalid_value"),
            ({"model": "auto", "messages": HELLO, "max_tokens": 0}, "max_tokens", "invalid_value"),
            ({"model": "auto", "messages": HELLO, "max_tokens": True}, "max_tokens", "invalid_value"),
            ({"model": "auto", "messages": HELLO, "temperature": 2.5}, "temperature", "invalid_value"),
            ({"model": "auto", "messages": HELLO, "tools": "hammer"}, "tools", "invalid_value"),
            ({"model": "auto", "messages": HELLO, "router": 1}, "router", None),
            ({"model": "auto", "messages": HELLO, "router": {"trase": True}}, "router", None),
            ({"model": "auto", "messages": HELLO, "router": {"trace": 1}}, "router.trace", None),
            ({"model": "auto", "messages": HELLO, "router": {"session": ""}}, "router.session", None),
        ]
        for body, param, code in cases:
            response = await service.client.post(CHAT, json=body)
            error = error_of(response)
            assert (response.status_code, error["type"]) == (400, "invalid_request_error"), body
            assert error["param"] == param, body
            assert code is None or error["code"] == code, body
        for content in (b"{", b"[]", b"", b"\xff", b"NaN"):
            response = await service.client.post(CHAT, content=content)
            assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json"), content
        assert service.experts["good"].requests == []


async def test_unknown_models_and_routes(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good"), policies=[policy(), policy("cheap")]) as service:
        for model in ("nobody", "auto:nobody", "auto:", "cheap", "AUTO", "auto:good"):
            response = await service.chat(model)
            assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found"), model
        assert (await service.chat("auto:cheap")).status_code == 200
        assert (await service.chat("auto:auto")).status_code == 200
        assert (await service.client.get("/v1/models/nobody")).status_code == 404
        response = await service.client.get("/v1/nothing")
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
        response = await service.client.get(CHAT)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert error_of(response)["code"] == "method_not_allowed"


async def test_a_prompt_too_long_for_every_expert(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good"), cards={"good": {"context_length": 40}}) as service:
        response = await service.chat(text="word " * 100)
        assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
        assert (await service.stream(count=1))[0]["status"] == 400


async def test_too_large_a_body(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good"), environment={"ROUTER_MAX_BODY_BYTES": "1000"}) as service:
        response = await service.chat(text="x" * 1000)
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")

        async def chunks() -> Any:
            for _ in range(20):
                yield b"x" * 100

        response = await service.client.post(CHAT, content=chunks())
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
        assert (await service.chat()).status_code == 200


async def test_api_keys(redis_server: RedisProcess) -> None:
    keys = f"alice:sk-alice,bob:sha256={hashlib.sha256(b'sk-bob').hexdigest()}"
    async with serving(redis_server, FakeExpert("good"), environment={"ROUTER_API_KEYS": keys}) as service:
        routes = [("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/v1/embeddings"), ("POST", "/v1/route")]
        routes += [("POST", "/v1/feedback"), ("GET", "/v1/models"), ("GET", "/v1/models/good"), ("GET", "/metrics")]
        for method, route in routes:
            response = await service.client.request(method, route)
            assert (response.status_code, error_of(response)["code"]) == (401, "missing_api_key"), route
            for wrong in ("Bearer sk-eve", "Basic sk-alice", "Bearer", "sk-alice", "Bearer sk-alice2"):
                response = await service.client.request(method, route, headers={"authorization": wrong})
                assert response.status_code == 401, (route, wrong)
                assert "sk-" not in response.text
        for name in ("alice", "bob"):
            answer = await service.chat(headers={"authorization": f"Bearer sk-{name}"})
            assert answer.status_code == 200
        assert [entry["key"] for entry in await service.stream(count=2)] == ["alice", "bob"]
        assert (await service.client.get("/healthz")).status_code == 200


async def test_web_pages_cannot_use_a_service_without_keys(redis_server: RedisProcess) -> None:
    async with serving(redis_server, FakeExpert("good")) as service:
        response = await service.chat(headers={"origin": "https://evil.example"})
        assert (response.status_code, error_of(response)["code"]) == (403, "forbidden_origin")
    environment = {"ROUTER_API_KEYS": "a:key"}
    async with serving(redis_server, FakeExpert("good"), environment=environment) as service:
        headers = {"origin": "https://ui.example", "authorization": "Bearer key"}
        assert (await service.chat(headers=headers)).status_code == 200


async def test_overload_is_429(redis_server: RedisProcess) -> None:

    slow = FakeExpert("good", pause_s=0.5)
    async with serving(redis_server, slow, environment={"ROUTER_MAX_CONCURRENCY": "2"}) as service:
        answers = await asyncio.gather(*(service.chat() for _ in range(5)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) == 3
        assert {answer.status_code for answer in refused} == {429}
        assert error_of(refused[0])["code"] == "overloaded"
        assert int(refused[0].headers["retry-after"]) >= 1
        assert (await service.chat()).status_code == 200


async def test_a_full_expert_is_passed_over(redis_server: RedisProcess) -> None:

    slow, other = FakeExpert("good", pause_s=0.5), FakeExpert("other")
    async with serving(redis_server, slow, other, environment={"ROUTER_MAX_CALLS_PER_EXPERT": "1"}) as service:
        answers = await asyncio.gather(*(service.chat() for _ in range(3)))
        assert sorted(answer.headers["x-router-expert"] for answer in answers) == ["good", "other", "other"]
        named = await asyncio.gather(*(service.chat("good") for _ in range(2)))
        assert sorted(answer.status_code for answer in named) == [200, 503]


def test_headers_hold_one_printable_line() -> None:
    ((name, value),) = encode_headers({"x-router-reason": "a\r\nset-cookie: b\x00 é " + "z" * 1000})
    assert name == b"x-router-reason"
    assert value.startswith(b"a??set-cookie: b? ? zzz")
    assert len(value) == 400


async def test_a_body_that_does_not_come_is_given_up_and_holds_no_place(
    redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router_service.http.connection._BODY_TIMEOUT_S", 0.3)
    async with serving(redis_server, FakeExpert("good")) as service:
        host, port = service.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.1)
        assert service.application.service.gate.under_way == 0
        assert b" 408 " in await reader.readline()
        writer.close()
