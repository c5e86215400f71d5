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
from routers.policy import Policy
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import Running, policy, serving

STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {},
    "cascade": {"threshold": 1.0},
    "vote": {"voters": 3},
    "mixture_of_agents": {"proposers": 2},
    "self_moa": {"samples": 2},
}


_STUBBORN_S = 3600.0


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
    """Writes as much as it is allowed to, in tokens of four bytes, each in every way that pieces can be written."""

    async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
        count = int(request.body.get("max_tokens") or 1000)
        for number in range(count):
            delta = {"role": "assistant", "content": f" {self.name}{number % 90 + 10}"}
            choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": {"content": [{"logprob": -0.1}]}}
            yield Part(self._json(request, "chat.completion.chunk", choice))
        choice = {"index": 0, "delta": {}, "finish_reason": "length"}
        yield Part(self._json(request, "chat.completion.chunk", choice))
        yield Part(b"", Usage(input_tokens=10, output_tokens=count))


class Evasive(FakeExpert):
    """Writes without end, in pieces of 99 bytes that are not where an answer's words are looked for."""

    def __init__(self, name: str, *choices: dict[str, Any], **piece: Any) -> None:
        super().__init__(name)
        self.said = b""
        self._choices = choices
        self._piece = piece

    async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
        while True:
            self.said += b"x" * 99
            yield Part(orjson.dumps({"id": request.id, "choices": self._choices, **self._piece}))
            await asyncio.sleep(0)


class Stubborn(FakeExpert):
    """Says nothing, and does not mind its time."""

    async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
        await asyncio.sleep(_STUBBORN_S)
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
        assert 0.0003 < entry["cost_usd"] <= 0.002
        assert not any(call["error"] and "wrote more" in call["error"] for call in entry["calls"])
        bounds = [request.body["max_tokens"] for expert in experts for request in expert.requests]
        assert all(bound >= 1 for bound in bounds)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_slow_experts_stay_within_the_time(redis_server: RedisProcess, strategy: str) -> None:
    experts = [Stubborn("a"), Stubborn("b"), Stubborn("c")]
    async with serving(redis_server, *experts, policies=[limited(strategy, timeout_s=0.6)]) as service:
        started = time.perf_counter()
        response = await service.chat()
        assert response.status_code == 504
        assert time.perf_counter() - started < _STUBBORN_S / 100  # not what the experts take, however busy the machine
        assert (await used(service))["latency_s"] < _STUBBORN_S / 100


@pytest.mark.parametrize("strategy", STRATEGIES)
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


_TEXT = "x" * 99
HIDING_PLACES: dict[str, Evasive] = {
    "content": Evasive("a", {"delta": {"content": _TEXT}}),
    "content as a list": Evasive("a", {"delta": {"content": [{"type": "text", "text": _TEXT}]}}),
    "function_call": Evasive("a", {"delta": {"function_call": {"arguments": _TEXT}}}),
    "tool_calls": Evasive("a", {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": _TEXT}}]}}),
    "delta that is text": Evasive("a", {"delta": _TEXT}),
    "message": Evasive("a", {"message": {"content": _TEXT}}),
    "unknown field": Evasive("a", {"delta": {_TEXT: 1}}),
    "reason of the end": Evasive("a", {"finish_reason": _TEXT}),
    "beside choices": Evasive("a", output=_TEXT),
    "second choice": Evasive("a", {"index": 1, "delta": {"content": _TEXT}}),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
async def test_words_count_wherever_they_are_written(redis_server: RedisProcess, place: str) -> None:
    expert = HIDING_PLACES[place]
    expert.said = b""
    async with serving(redis_server, expert, policies=[limited("single", cost_usd=0.002)]) as service:
        await service.chat(stream=True)
        (call,) = (await used(service))["calls"]
        assert 0 < call["cost_usd"] <= 0.002
        assert "wrote more than the policy's ceiling" in call["error"] or "no chunk" in call["error"]
        assert 2e-6 * (len(expert.said) - 99) <= 0.002  # as if each byte were a token; the last piece is cut off


@pytest.mark.parametrize("stream", [False, True])
async def test_a_claim_beyond_what_was_allowed_is_not_charged(redis_server: RedisProcess, stream: bool) -> None:
    liar = FakeExpert("a", usage=Usage(input_tokens=10, output_tokens=10**7))
    async with serving(redis_server, liar, policies=[limited("single", cost_usd=0.002)]) as service:
        assert (await service.chat(stream=stream)).status_code == 200
        (call,) = (await used(service))["calls"]
        assert 0 < call["cost_usd"] <= 0.002
        assert "says that it used more than it was allowed" in call["error"]


async def test_what_a_late_call_may_have_used_is_spent(redis_server: RedisProcess) -> None:
    served = limited("single", cost_usd=0.002)
    served = served.model_copy(update={"fallbacks": served.fallbacks.model_copy(update={"attempt_timeout_s": 0.2})})
    async with serving(redis_server, Stubborn("a"), FakeExpert("b"), policies=[served]) as service:
        response = await service.chat(max_tokens=4000)
        assert response.status_code == 502
        assert "leaves no call of it" in response.json()["error"]["message"]
        calls = (await used(service))["calls"]
        assert [call["expert"] for call in calls] == ["a", "b"]
        assert not service.experts["b"].requests
        assert response.headers["x-router-attempts"] == "1"
        metrics = (await service.client.get("/metrics")).text
        assert 'expert="a",outcome="error"' in metrics
        assert 'expert="b",outcome=' not in metrics
        response = await service.chat(max_tokens=20)  # which leaves enough for the second
        assert response.headers["x-router-expert"] == "b"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_never_told_its_usage_is_charged(redis_server: RedisProcess, stream: bool) -> None:
    slow = FakeExpert("a", pause_s=30)
    async with serving(redis_server, slow, policies=[policy(timeout_s=0.4)]) as service:
        assert (await service.chat(stream=stream, max_tokens=70)).status_code == (200 if stream else 504)
        (call,) = (await used(service))["calls"]
        assert call["estimated"]
        assert call["output_tokens"] == (1 if stream else 70)


async def test_a_whole_answer_is_put_together_under_a_ceiling(redis_server: RedisProcess) -> None:
    class Two(FakeExpert):
        async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
            for word, end in (("four", None), (" it is", "stop")):
                for index in (0, 1):
                    choice = {"index": index, "delta": {"content": f"{word}{index}"}, "finish_reason": end}
                    yield Part(self._json(request, "chat.completion.chunk", choice))
            yield Part(b"", Usage(input_tokens=10, output_tokens=4))

    async with serving(redis_server, Two("a"), policies=[limited("single", cost_usd=0.002)]) as service:
        answer = (await service.chat(n=2)).json()
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["four0 it is0", "four1 it is1"]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "stop"]
        assert answer["object"] == "chat.completion"
        assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
        assert (await used(service))["cost_usd"] == pytest.approx(18e-6)
        refused = await service.chat(best_of=3)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")


async def test_an_aggregator_that_is_cut_off_is_charged_its_own_prompt(redis_server: RedisProcess) -> None:
    class Late(FakeExpert):
        async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
            await asyncio.sleep(30)
            yield Part(b"{}")

    proposers = [FakeExpert(name, (f"{name} " * 1000,)) for name in "ab"]
    options = {"proposers": 2, "aggregator": "c"}
    served = policy(strategy={"name": "mixture_of_agents", "options": options}, timeout_s=1.0)
    async with serving(redis_server, *proposers, Late("c"), policies=[served]) as service:
        assert (await service.chat()).status_code == 200
        calls = (await used(service))["calls"]
        assert calls[-1]["expert"] == "c"
        assert calls[-1]["input_tokens"] > 900  # two proposals of 2,000 characters
