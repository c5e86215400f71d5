"""The calls of one request: each is recorded whatever becomes of it, and all of them are ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from experts.build import build_remotes
from experts.errors import ExpertUnavailableError
from experts.expert import ExpertRequest, Part
from experts.fleet import FleetEntry
from router_service.core.calls import Caller, Lane
from router_service.core.trace import Trace
from router_service.metrics import Metrics
from routers.policy import Ceilings
from routers.strategies import deadline
from tests.experts.upstream import run_upstream
from tests.router_service.fakes import FakeExpert, card


class Holding(FakeExpert):
    """Begins an answer and waits; when it is closed it fails, or does not end."""

    def __init__(self, name: str, end: str) -> None:
        super().__init__(name)
        self.end = end
        self.ended = False

    async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
        try:
            yield Part(self._json(request, "chat.completion.chunk", {"index": 0, "delta": {"content": "well"}}))
            await asyncio.sleep(3600)
        finally:
            if self.end == "fails":
                raise RuntimeError("the connection is in a bad state")
            if self.end == "hangs":
                await asyncio.sleep(3600)
            self.ended = True


def caller(*experts: FakeExpert, **ceilings: Any) -> tuple[Caller, Trace, dict[str, Lane]]:
    lanes = {expert.name: Lane(card(expert.name), expert, limit=5) for expert in experts}
    trace = asked_of("m")
    limits = Ceilings.model_validate(ceilings)
    return Caller(lanes, trace, Metrics(), deadline=time.monotonic() + 60, ceilings=limits), trace, lanes


def asked_of(model: str) -> Trace:
    return Trace(id="1", request_id="1", at=0.0, key="k", endpoint="chat/completions", model=model, stream=True)


def asks(**body: Any) -> ExpertRequest:
    messages = [{"role": "user", "content": "hello"}]
    return ExpertRequest(id="1", endpoint="chat/completions", body={"messages": messages, "stream": True, **body})


async def test_every_call_is_ended_whatever_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "CLOSING_S", 0.1)
    experts = [Holding("a", "fails"), Holding("b", "hangs"), Holding("c", "ends")]
    call, trace, lanes = caller(*experts)
    for expert in experts:
        await anext(call(expert.name, asks(), why="test"))
    async with asyncio.timeout(5):
        await call.close()
    assert experts[2].ended
    assert [record.usage.output_tokens for record in trace.calls] == [1, 1, 1]
    assert not any(lane._under_way for lane in lanes.values())


async def test_embeddings_are_bounded_by_the_ceiling() -> None:
    call, trace, _ = caller(FakeExpert("a"), cost_usd=0.001)
    request = ExpertRequest(id="1", endpoint="embeddings", body={"input": "x" * 500})
    await call.embed("a", request, why="test")
    assert trace.cost_usd == pytest.approx(3e-6)
    with pytest.raises(ExpertUnavailableError, match="leaves no call"):
        await call.embed("a", ExpertRequest(id="1", endpoint="embeddings", body={"input": "x" * 2000}), why="test")
    assert trace.cost_usd == pytest.approx(3e-6)


@pytest.mark.parametrize(("model", "source"), [("no-usage", {}), ("good", {"stream_usage": False})])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_api_that_tells_no_usage_uses_up_all_that_was_set_aside(
    model: str, source: dict[str, Any], stream: bool
) -> None:
    """What it really used nobody knows: it may be more than its words."""
    async with run_upstream() as upstream:
        entry = FleetEntry(name="far", remote={"base_url": upstream.url, "model": model, **source})
        far = build_remotes([entry])["far"]
        lanes, trace = {"far": Lane(card("far"), far, limit=5)}, asked_of("far")
        limits = Ceilings(cost_usd=0.004)
        call = Caller(lanes, trace, Metrics(), deadline=time.monotonic() + 60, ceilings=limits)
        assert [part async for part in call("far", asks(stream=stream, max_tokens=400), why="test")]
        (record,) = trace.calls
        assert (record.estimated, record.outcome) == (True, "ok")
        assert 0 < record.cost_usd < 1e-4  # by its words
        with pytest.raises(ExpertUnavailableError, match="leaves no call"):
            await anext(call("far", asks(stream=stream, max_tokens=400), why="test"))
        assert len(upstream.seen) == 1
        await far.close()


async def test_a_call_that_was_never_made_costs_nothing() -> None:
    expert = FakeExpert("a")
    call, trace, _ = caller(expert, cost_usd=1e-5)
    with pytest.raises(ExpertUnavailableError, match="leaves no call"):
        await anext(call("a", asks(), why="test"))
    assert (trace.cost_usd, trace.tokens, expert.requests) == (0, 0, [])


@pytest.mark.parametrize("last", [b'{"choices": [{"delta": {"content": 5}, "index": 0}]}', b"no json", None])
async def test_a_whole_answer_that_breaks_off_is_none(last: bytes | None) -> None:
    class Broken(FakeExpert):
        async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
            yield Part(self._json(request, "chat.completion.chunk", {"index": 0, "delta": {"content": "well"}}))
            if last:
                yield Part(last)

    call, _, _ = caller(Broken("a"), cost_usd=0.01)
    with pytest.raises(ExpertUnavailableError, match=r"no chunk of an answer|in the middle of its answer"):
        await anext(call("a", asks(stream=False), why="test"))
