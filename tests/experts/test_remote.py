"""Remote experts against a real second service that misbehaves on demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import orjson
import pytest

from experts import remote
from experts.build import build_remotes
from experts.errors import (
    ExpertConfigError,
    ExpertError,
    ExpertRequestError,
    ExpertTimeoutError,
    ExpertUnavailableError,
)
from experts.expert import Endpoint, Expert, ExpertRequest, Part, Usage
from experts.fleet import FleetEntry
from experts.remote import RemoteExpert
from experts.shared import Shared
from tests.experts.upstream import ANSWER, CHUNKS, EMBEDDING, Upstream, run_upstream

KEY = "sk-secret"
Make = Callable[..., Expert]


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with run_upstream() as running:
        yield running


@pytest.fixture
async def make(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Makes a remote expert of a model of the upstream, with any fields of its source."""
    monkeypatch.setenv("UPSTREAM_KEY", KEY)
    monkeypatch.setattr(remote, "_FIRST_BACKOFF_S", 0.01)
    made: list[Expert] = []

    def make(model: str = "good", **source: Any) -> Expert:
        source = {"base_url": upstream.url, "model": model, "api_key_env": "UPSTREAM_KEY", **source}
        made.extend(build_remotes([FleetEntry(name="far", remote=source)]).values())
        return made[-1]

    yield make
    for expert in made:
        await expert.close()


def ask(endpoint: Endpoint = "chat/completions", *, timeout_s: float = 10, **body: Any) -> ExpertRequest:
    body = {"model": "auto", "messages": [{"role": "user", "content": "12345678"}], **body}
    return ExpertRequest(id="req-1", endpoint=endpoint, body=body, timeout_s=timeout_s)


async def run(expert: Expert, request: ExpertRequest) -> list[Part]:
    return [part async for part in expert.generate(request)]


async def fails(expert: Expert, request: ExpertRequest) -> ExpertError:
    with pytest.raises(ExpertError) as caught:
        await run(expert, request)
    assert KEY not in str(caught.value)
    return caught.value


async def test_answer_is_passed_on_but_for_its_id(make: Make) -> None:
    [part] = await run(make(), ask())
    assert orjson.loads(part.data) == {**ANSWER, "id": "req-1"}
    assert part.usage == Usage(7, 2, 3)


async def test_body_goes_out_untouched_but_for_the_model(make: Make, upstream: Upstream) -> None:
    odd = {
        "messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "t", "function": {"name": "f"}}]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "never_heard_of": {"deep": [1, 2.5, None, "\u00e9"]},
    }
    await run(make(headers={"X-Team": "blue"}), ask(**odd))
    headers, body = upstream.seen[0]
    assert body == {**odd, "model": "good"}
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["x-team"] == "blue"


async def test_key_in_a_header_of_its_own(make: Make, upstream: Upstream) -> None:
    await run(make(api_key_header="api-key"), ask())
    assert upstream.seen[0][0]["api-key"] == KEY


@pytest.mark.parametrize("model", ["good", "crumbs"])
async def test_stream_is_passed_on_but_for_its_id(make: Make, model: str) -> None:
    parts = await run(make(model), ask(stream=True))
    assert [orjson.loads(part.data) for part in parts[:-1]] == [{**one, "id": "req-1"} for one in CHUNKS]
    assert parts[-1].data == b""
    assert all(part.usage is None for part in parts[:-1])


async def test_stream_usage_is_asked_for_and_shown_only_to_who_wants_it(make: Make, upstream: Upstream) -> None:
    hidden = await run(make(), ask(stream=True))
    shown = await run(make(), ask(stream=True, stream_options={"include_usage": True, "other": 1}))
    assert [body["stream_options"] for body in upstream.bodies()] == [
        {"include_usage": True},
        {"include_usage": True, "other": 1},
    ]
    assert hidden[-1].usage == shown[-1].usage == Usage(7, 2, 3)
    assert len(shown) == len(hidden) + 1
    assert orjson.loads(shown[-2].data)["choices"] == []


async def test_usage_is_not_asked_for_where_the_fleet_says_so(make: Make, upstream: Upstream) -> None:
    await run(make(stream_usage=False), ask(stream=True))
    assert "stream_options" not in upstream.bodies()[0]


@pytest.mark.parametrize(("stream", "output"), [(False, 1), (True, 2)])
async def test_usage_is_estimated_where_none_is_reported(make: Make, stream: bool, output: int) -> None:
    parts = await run(make("no-usage"), ask(stream=stream))
    assert parts[-1].usage == Usage(2, output, estimated=True)


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_of_tools_count_in_an_estimate(stream: bool) -> None:
    said = {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "f", "arguments": "y" * 3999}}]}

    def answer(request: httpx.Request) -> httpx.Response:
        choice = {"index": 0, "delta" if stream else "message": said, "finish_reason": "tool_calls"}
        data = orjson.dumps({"id": "1", "choices": [choice], "usage": {}})
        return httpx.Response(200, content=b"data: %s\n\n" % data if stream else data)

    transport = httpx.MockTransport(answer)
    source = {"base_url": "https://far.example/v1/", "model": "m"}
    expert = RemoteExpert(FleetEntry(name="far", remote=source), Shared(transport, transport.aclose))
    assert (await run(expert, ask(stream=stream)))[-1].usage == Usage(2, 1000, estimated=True)


async def test_embeddings(make: Make) -> None:
    expert = make(task="embedding")
    part = await expert.embed(ask("embeddings", input="text"))
    assert orjson.loads(part.data) == EMBEDDING
    assert part.usage == Usage(4, 0)
    assert isinstance(await fails(expert, ask()), ExpertRequestError)
    with pytest.raises(ExpertRequestError):
        await make().embed(ask("embeddings", input="text"))


@pytest.mark.parametrize("statuses", [[500], [429, 503], [408]])
async def test_passing_failures_are_tried_again(make: Make, upstream: Upstream, statuses: list[int]) -> None:
    [part] = await run(make("status"), ask(statuses=statuses))
    assert part.usage == Usage(7, 2, 3)
    assert len(upstream.seen) == len(statuses) + 1


async def test_retries_end(make: Make, upstream: Upstream) -> None:
    error = await fails(make("status", max_retries=1), ask(statuses=[500] * 9))
    assert isinstance(error, ExpertUnavailableError)
    assert len(upstream.seen) == 2


async def test_dropped_connections_are_tried_again(make: Make, upstream: Upstream) -> None:
    [part] = await run(make("drop"), ask())
    assert part.usage == Usage(7, 2, 3)
    assert len(upstream.seen) == 3


async def test_retry_after_is_waited_for(make: Make, upstream: Upstream) -> None:
    began = time.monotonic()
    await run(make("status"), ask(statuses=[429], retry_after="0.3"))
    assert time.monotonic() - began >= 0.3


async def test_retry_after_beyond_the_deadline_fails_at_once(make: Make, upstream: Upstream) -> None:
    began = time.monotonic()
    error = await fails(make("status"), ask(statuses=[429] * 9, retry_after="60"))
    assert isinstance(error, ExpertUnavailableError)
    assert error.retry_after_s == 60
    assert time.monotonic() - began < 2
    assert len(upstream.seen) == 1


async def test_the_callers_fault_is_passed_on(make: Make, upstream: Upstream) -> None:
    error = await fails(make("status"), ask(statuses=[422] * 9))
    assert isinstance(error, ExpertRequestError)
    assert (str(error), error.status, error.param, error.code) == ("no", 422, "temperature", "bad_value")
    assert len(upstream.seen) == 1


@pytest.mark.parametrize("status", [301, 401, 403, 404])
async def test_our_own_fault_is_not_the_callers(make: Make, upstream: Upstream, status: int) -> None:
    error = await fails(make("status"), ask(statuses=[status] * 9, error={"message": f"wrong key {KEY}"}))
    assert type(error) is ExpertUnavailableError
    assert len(upstream.seen) == 1


async def test_the_key_is_cut_out_of_messages(make: Make) -> None:
    error = await fails(make("status"), ask(statuses=[400], error=f"bad request with {KEY}"))
    assert str(error) == "bad request with ***"


@pytest.mark.parametrize(
    ("model", "stream"),
    [
        ("garbage", False),
        ("garbage", True),
        ("cut", False),
        ("cut", True),
        ("short", True),
        ("error-in-stream", True),
        ("flood", True),
        ("flood", False),
    ],
)
async def test_broken_answers_are_errors(make: Make, upstream: Upstream, model: str, stream: bool) -> None:
    assert isinstance(await fails(make(model), ask(stream=stream)), ExpertUnavailableError)
    assert len(upstream.seen) == 1


@pytest.mark.parametrize(("model", "stream"), [("hang", False), ("hang", True), ("drip", True), ("drip", False)])
async def test_slow_answers_time_out(make: Make, model: str, stream: bool) -> None:
    began = time.monotonic()
    assert isinstance(await fails(make(model), ask(stream=stream, timeout_s=0.3)), ExpertTimeoutError)
    assert time.monotonic() - began < 2


async def test_the_sources_own_timeout_holds_too(make: Make) -> None:
    assert isinstance(await fails(make("hang", timeout_s=0.2), ask()), ExpertTimeoutError)


async def test_closing_the_stream_hangs_up(make: Make, upstream: Upstream) -> None:
    stream = make("drip").generate(ask(stream=True))
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(2):
        await upstream.hung_up.wait()


async def test_nobody_listens(make: Make) -> None:
    expert = make(base_url="http://127.0.0.1:9/v1", max_retries=1)
    assert isinstance(await fails(expert, ask()), ExpertUnavailableError)
    assert not await expert.healthy()


async def test_health(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await make().healthy()
    monkeypatch.setenv("UPSTREAM_KEY", "another")
    assert not await make().healthy()
    assert await make(health_path="/elsewhere").healthy()  # 404: somebody is there, and refuses no key


async def test_an_api_that_is_not_asked_counts_as_up(make: Make, upstream: Upstream) -> None:
    assert await make(base_url="http://127.0.0.1:9/v1", health_path=None).healthy()


@pytest.mark.parametrize("key", ["", "two\nlines"])
def test_a_missing_key_fails_at_start(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", key)
    source = {"base_url": "http://localhost/v1", "model": "m", "api_key_env": "UPSTREAM_KEY"}
    with pytest.raises(ExpertConfigError, match="UPSTREAM_KEY"):
        build_remotes([FleetEntry(name="far", remote=source)])


async def test_odd_stream_options_are_the_callers_fault(make: Make) -> None:
    error = await fails(make(), ask(stream=True, stream_options=5))
    assert isinstance(error, ExpertRequestError)
    assert error.param == "stream_options"


async def test_many_at_once_each_get_their_own(make: Make) -> None:
    expert = make()
    requests = [ExpertRequest(id=f"r{i}", endpoint="chat/completions", body={"stream": i % 2 == 0}) for i in range(50)]
    replies = await asyncio.gather(*(run(expert, request) for request in requests))
    for request, parts in zip(requests, replies, strict=True):
        assert {orjson.loads(part.data)["id"] for part in parts if part.data} == {request.id}


async def test_any_httpx_transport_serves() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url == "https://far.example/v1/chat/completions"
        return httpx.Response(200, json=ANSWER)

    transport = httpx.MockTransport(answer)
    source = {"base_url": "https://far.example/v1/", "model": "m"}
    expert = RemoteExpert(FleetEntry(name="far", remote=source), Shared(transport, transport.aclose))
    [part] = await run(expert, ask())
    assert part.usage == Usage(7, 2, 3)


async def test_the_last_holder_closes_what_is_shared() -> None:
    closed = 0

    async def close() -> None:
        nonlocal closed
        closed += 1

    shared = Shared("it", close)
    holders = [shared.hold(), shared.hold()]
    await holders[0].release()
    assert closed == 0
    await holders[1].release()
    assert closed == 1
