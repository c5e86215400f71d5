"""`single`: fallback for plain answers and for streams, before and after content, within its time."""

from __future__ import annotations

import asyncio

import pytest

from experts.errors import ExpertError, ExpertRequestError, ExpertTimeoutError, ExpertUnavailableError
from experts.expert import Part
from routers.errors import RouterConfigError
from routers.policy import Fallbacks, Policy
from routers.strategies import create_strategy
from routers.strategies.single import SingleStrategy
from tests.routers.scripted import DEAD, EMPTY, END, ROLE, WHOLE, FakeFleet, chunk, collect, decision, request


async def answer(
    fleet: FakeFleet, *, stream: bool, timeout_s: float = 5.0, fallbacks: Fallbacks | None = None
) -> list[Part]:
    strategy = SingleStrategy(fallbacks)
    seen: list[Part] = []
    await collect(strategy.run(decision(*fleet.scripts), request(stream=stream, timeout_s=timeout_s), fleet), seen)
    return seen


async def test_the_first_expert_answers() -> None:
    fleet = FakeFleet(a=[WHOLE], b=[WHOLE])
    assert await answer(fleet, stream=False) == [WHOLE]
    assert [(expert, why) for expert, why, _ in fleet.calls] == [("a", "ranked first")]


@pytest.mark.parametrize("error", [DEAD, ExpertTimeoutError("slow")])
async def test_a_plain_answer_falls_back(error: ExpertError) -> None:
    fleet = FakeFleet(a=[error], b=[error], c=[WHOLE])
    assert await answer(fleet, stream=False) == [WHOLE]
    assert [why for _, why, _ in fleet.calls] == [
        "ranked first", f"fallback: a failed: {error}", f"fallback: b failed: {error}"
    ]  # fmt: skip


@pytest.mark.parametrize("before", [[], [ROLE], [ROLE, EMPTY]])
async def test_a_stream_falls_back_before_its_content(before: list[Part]) -> None:
    hello, world = chunk(content="Hello"), chunk(content=" world")
    fleet = FakeFleet(a=[*before, DEAD], b=[ROLE, hello, world, END])
    assert await answer(fleet, stream=True) == [ROLE, hello, world, END]  # nothing of a's
    assert fleet.called == ["a", "b"]


@pytest.mark.parametrize(
    "content", [chunk(content="x"), chunk(tool_calls=[{"index": 0}]), chunk(refusal="no"), Part(b"not json")]
)
async def test_a_stream_that_has_begun_is_not_begun_again(content: Part) -> None:
    fleet = FakeFleet(a=[ROLE, content, DEAD], b=[ROLE, content, END])
    seen: list[Part] = []
    parts = SingleStrategy().run(decision("a", "b"), request(stream=True), fleet)
    with pytest.raises(ExpertUnavailableError, match="connection lost"):
        await collect(parts, seen)
    assert seen == [ROLE, content]
    assert fleet.called == ["a"]


async def test_an_empty_answer_is_an_answer() -> None:
    stop = Part(b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}')
    assert await answer(FakeFleet(a=[ROLE, stop, END], b=[WHOLE]), stream=True) == [ROLE, stop, END]


async def test_no_answer_is_a_failure() -> None:
    assert await answer(FakeFleet(a=[], b=[WHOLE]), stream=False) == [WHOLE]
    with pytest.raises(ExpertUnavailableError, match="'a' ended without an answer"):
        await answer(FakeFleet(a=[ROLE, END]), stream=True)


async def test_parts_go_out_as_they_come() -> None:
    fleet = FakeFleet(a=[ROLE, chunk(content="now"), 30.0])
    parts = SingleStrategy().run(decision("a"), request(stream=True), fleet)
    async with asyncio.timeout(2):
        assert [await anext(parts), await anext(parts)] == [ROLE, chunk(content="now")]
    await parts.aclose()
    assert fleet.closed == ["a"]  # a client that hangs up stops the generation


async def test_failed_calls_are_closed() -> None:
    fleet = FakeFleet(a=[ROLE, 30.0], b=[ROLE, DEAD], c=[WHOLE])
    await answer(fleet, stream=True, fallbacks=Fallbacks(attempt_timeout_s=0.05))
    assert fleet.closed == ["a", "b", "c"]


async def test_a_request_at_fault_is_not_tried_elsewhere() -> None:
    fleet = FakeFleet(a=[ExpertRequestError("temperature is too high", param="temperature")], b=[WHOLE])
    with pytest.raises(ExpertRequestError, match="temperature"):
        await answer(fleet, stream=False)
    assert fleet.called == ["a"]


async def test_a_fault_of_this_expert_alone_is() -> None:
    unknown = ExpertRequestError("no such model", code="model_not_found")
    assert await answer(FakeFleet(a=[unknown], b=[WHOLE]), stream=False) == [WHOLE]
    with pytest.raises(ExpertRequestError, match="no such model"):
        await answer(FakeFleet(a=[unknown], b=[DEAD]), stream=False)


async def test_a_prompt_that_is_too_long_for_one_goes_to_those_with_a_longer_context() -> None:
    too_long = ExpertRequestError("too long", code="context_length_exceeded")
    fleet = FakeFleet(a=[too_long], b=[WHOLE], C=[WHOLE])
    assert await answer(fleet, stream=False) == [WHOLE]
    assert fleet.called == ["a", "C"]
    with pytest.raises(ExpertRequestError, match="too long"):
        await answer(FakeFleet(a=[too_long], b=[WHOLE]), stream=False)


async def test_a_plain_answer_may_take_all_the_time_there_is() -> None:
    fleet = FakeFleet(a=[0.25, WHOLE], b=[WHOLE])
    assert await answer(fleet, stream=False, timeout_s=0.4) == [WHOLE]
    assert fleet.called == ["a"]


async def test_a_silent_stream_leaves_time_for_the_next() -> None:
    fleet = FakeFleet(a=[30.0], b=[30.0], c=[chunk(content="x")])
    assert await answer(fleet, stream=True, timeout_s=0.4) == [chunk(content="x")]
    budgets = [timeout for _, _, timeout in fleet.calls]
    assert budgets[0] == pytest.approx(0.4, abs=0.05)
    assert budgets[1] <= 0.25
    assert budgets[2] <= 0.15


async def test_the_request_s_time_bounds_a_stream_that_has_begun() -> None:
    fleet = FakeFleet(a=[chunk(content="x"), 30.0], b=[WHOLE])
    with pytest.raises(ExpertTimeoutError, match="'a' did not finish"):
        await answer(fleet, stream=True, timeout_s=0.1)
    assert fleet.called == ["a"]


async def test_attempts_are_bounded() -> None:
    fleet = FakeFleet(a=[DEAD], b=[DEAD], c=[WHOLE])
    with pytest.raises(ExpertUnavailableError, match="no expert could answer: a: connection lost; b: connection lost"):
        await answer(fleet, stream=False, fallbacks=Fallbacks(max_attempts=2))
    assert fleet.called == ["a", "b"]


async def test_all_too_late_is_a_timeout_else_when_to_come_back() -> None:
    late = ExpertTimeoutError("late")
    with pytest.raises(ExpertTimeoutError):
        await answer(FakeFleet(a=[late], b=[late]), stream=False)
    busy = [ExpertUnavailableError("busy", retry_after_s=wait) for wait in (7.0, 3.0)]
    with pytest.raises(ExpertUnavailableError) as caught:
        await answer(FakeFleet(a=[busy[0]], b=[busy[1]], c=[late]), stream=False)
    assert caught.value.retry_after_s == 3.0


def test_strategies_by_name() -> None:
    policy = Policy(name="p", fallbacks=Fallbacks(max_attempts=2))
    strategy = create_strategy(policy)
    assert isinstance(strategy, SingleStrategy)
    assert strategy.fallbacks.max_attempts == 2
    with pytest.raises(RouterConfigError, match=r"no strategy is named 'none'; known are .*single"):
        create_strategy(Policy.model_validate({"name": "p", "strategy": {"name": "none"}}))
    with pytest.raises(RouterConfigError, match=r"(?s)strategy 'single'.*spin"):
        create_strategy(Policy.model_validate({"name": "p", "strategy": {"name": "single", "options": {"spin": 1}}}))
