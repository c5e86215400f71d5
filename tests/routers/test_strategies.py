"""`cascade`, `vote`, `mixture_of_agents`, `self_moa`: who is asked, who answers, what the client gets, what fails."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from experts.cards import ExpertCard
from experts.errors import ExpertRequestError, ExpertTimeoutError, ExpertUnavailableError
from experts.expert import ExpertRequest, Part
from routers.contracts import Decision
from routers.errors import RouterConfigError
from routers.policy import Policy
from routers.strategies import create_strategy, deadline, replies
from routers.strategies.acceptance import Acceptance, Logistic
from routers.strategies.aggregation import aggregation_body, aggregation_text
from tests.routers.scripted import (
    DEAD,
    END,
    ROLE,
    STOP,
    WHOLE,
    FakeFleet,
    Step,
    chunk,
    collect,
    decision,
    request,
    says,
    text_of,
)


class KeepingFleet(FakeFleet):
    """Keeps every body that was sent; an expert may have a script for each of its calls."""

    def __init__(self, **scripts: Sequence[Step]) -> None:
        super().__init__(**scripts)
        self.bodies: list[Mapping[str, Any]] = []
        self.queues: dict[str, list[Sequence[Step]]] = {}

    async def __call__(self, expert: str, request: ExpertRequest, *, why: str) -> AsyncGenerator[Part, None]:
        self.bodies.append(request.body)
        if queue := self.queues.get(expert):
            self.scripts = {**self.scripts, expert: queue.pop(0)}
        async for part in super().__call__(expert, request, why=why):
            yield part


def ranked(**numbers: tuple[float, float]) -> Decision:
    """A decision by expert: estimated quality and cost."""
    plain = decision(*numbers)
    ranking = [
        replace(candidate, quality=numbers[candidate.expert][0], cost_usd=numbers[candidate.expert][1])
        for candidate in plain.ranking
    ]
    return replace(plain, ranking=ranking)


async def run(
    strategy: str, fleet: FakeFleet, made: Decision | None = None, *, stream: bool = False, timeout_s: float = 5.0,
    body: Mapping[str, Any] | None = None, fallbacks: Mapping[str, Any] | None = None, **options: Any,
) -> list[Part]:  # fmt: skip
    choice = {"name": strategy, "options": options}
    policy = Policy.model_validate({"name": "p", "strategy": choice, "fallbacks": fallbacks or {}})
    asked = request(stream=stream, timeout_s=timeout_s)
    given = {"messages": [{"role": "user", "content": "What is 4 + 5?"}], "stream": stream}
    asked = replace(asked, body={**given, **(body or {})})
    seen: list[Part] = []
    await collect(create_strategy(policy).run(made or decision(*fleet.scripts), asked, fleet), seen)
    return seen


async def said(strategy: str, fleet: FakeFleet, made: Decision | None = None, **given: Any) -> tuple[str, str | None]:
    """The answer's text, and whose it is."""
    parts = await run(strategy, fleet, made, **given)
    whose = next((part.expert for part in parts if part.expert), None)
    return text_of(parts, stream=given.get("stream", False)), whose


STRICT = {"acceptance": {"told": {"quality": 0, "confidence": 1}}, "threshold": 0.8}

# Cascade


@pytest.mark.parametrize("stream", [False, True])
async def test_a_sure_answer_is_accepted(stream: bool) -> None:
    fleet = KeepingFleet(small=says("nine it is", probability=0.9), large=says("9"))
    assert await said("cascade", fleet, stream=stream, **STRICT) == ("nine it is", "small")
    assert fleet.called == ["small"]
    assert fleet.bodies[0]["logprobs"] is True


async def test_the_client_sees_no_logprobs_it_did_not_ask_for() -> None:
    fleet = FakeFleet(small=says("nine", probability=0.9), large=says("9"))
    for stream in (False, True):
        parts = await run("cascade", fleet, stream=stream, **STRICT)
        assert not any(json.loads(part.data)["choices"][0].get("logprobs") for part in parts if part.data)
    (whole,) = await run("cascade", fleet, body={"logprobs": True}, **STRICT)
    assert len(json.loads(whole.data)["choices"][0]["logprobs"]["content"]) == 1


async def test_logprobs_are_asked_of_those_whose_card_has_them() -> None:
    made = decision("small", "large", "last")
    lacking = replace(made.ranking[0], card=ExpertCard(name="small"))
    fleet = KeepingFleet(**{name: says("9", probability=0.1) for name in ("small", "large", "last")})
    await run("cascade", fleet, replace(made, ranking=[lacking, *made.ranking[1:]]), threshold=1.0)
    assert [body.get("logprobs") for body in fleet.bodies] == [None, True, None]
    await run("cascade", fleet, made, threshold=1.0, logprobs=False)
    assert [body.get("logprobs") for body in fleet.bodies[3:]] == [None, None, None]


async def test_an_unsure_answer_goes_on_to_the_next_and_the_last_is_streamed() -> None:
    fleet = FakeFleet(small=says("eight", probability=0.5), large=says("nine"))
    assert await said("cascade", fleet, stream=True, **STRICT) == ("nine", "large")
    assert [why for _, why, _ in fleet.calls] == ["cascade: ranked first", "cascade, last step: small scored 0.50"]


async def test_cheapest_first_of_the_first_ranked_or_as_named() -> None:
    made = ranked(dear=(0.9, 3.0), fair=(0.8, 2.0), cheap=(0.7, 1.0), other=(0.1, 0.1))
    fleet = FakeFleet(**{name: says(name, probability=0.1) for name in ("dear", "fair", "cheap", "other")})
    await run("cascade", fleet, made, **STRICT)
    assert fleet.called == ["cheap", "fair", "dear"]
    fleet.calls.clear()
    await run("cascade", fleet, made, experts=["other", "gone", "dear"], **STRICT)
    assert fleet.called == ["other", "dear"]


async def test_every_expert_named_is_a_step() -> None:
    fleet = FakeFleet(**{name: says(name, probability=0.1) for name in "abcde"})
    assert await said("cascade", fleet, experts=list("edcba"), **STRICT) == ("a", "a")
    assert fleet.called == list("edcba")


async def test_a_step_that_fails_is_passed_over_and_a_last_one_leaves_the_best_rejected() -> None:
    fleet = FakeFleet(a=[DEAD], b=says("eight", probability=0.6), c=says("seven", probability=0.4), d=[ROLE, DEAD])
    assert await said("cascade", fleet, steps=4, **STRICT) == ("eight", "b")
    assert fleet.called == ["a", "b", "c", "d"]


async def test_a_slow_step_leaves_time_for_the_next() -> None:
    fleet = FakeFleet(a=[30.0], b=says("nine"))
    assert await said("cascade", fleet, timeout_s=0.3, **STRICT) == ("nine", "b")


async def test_nobody_answers() -> None:
    with pytest.raises(ExpertUnavailableError, match="no expert could answer: a: connection lost; b: connection lost"):
        await run("cascade", FakeFleet(a=[DEAD], b=[DEAD]), **STRICT)


async def test_a_request_at_fault_ends_it() -> None:
    fleet = FakeFleet(a=[ExpertRequestError("temperature is too high")], b=says("nine"))
    with pytest.raises(ExpertRequestError, match="temperature"):
        await run("cascade", fleet, **STRICT)
    assert fleet.called == ["a"]


def test_scores_are_probabilities_of_two_kinds_of_evidence() -> None:
    unfitted = Acceptance()
    assert unfitted.score(0.7, None) == pytest.approx(0.7)
    fitted = Acceptance(told=Logistic(bias=-1, quality=0.5, confidence=2))
    odds = -1 + 0.5 * math.log(0.7 / 0.3) + 2 * math.log(0.9 / 0.1)
    assert fitted.score(0.7, 0.9) == pytest.approx(1 / (1 + math.exp(-odds)))
    assert 0 < fitted.score(0.0, 0.0) < fitted.score(1.0, 1.0) < 1


# Vote


@pytest.mark.parametrize("stream", [False, True])
async def test_the_majority_answers(stream: bool) -> None:
    fleet = FakeFleet(a=says("8"), b=says(" Nine."), c=says("nine"))
    assert await said("vote", fleet, stream=stream) == (" Nine.", "b")


async def test_votes_run_beside_each_other_and_end_once_decided() -> None:
    fleet = FakeFleet(a=[30.0], b=[0.05, *says("nine")], c=[0.05, *says("nine")])
    async with asyncio.timeout(2):
        assert (await said("vote", fleet))[0] == "nine"
    assert sorted(fleet.closed) == ["a", "b", "c"]


async def test_a_tie_goes_to_the_highest_ranked_and_failures_do_not_vote() -> None:
    assert await said("vote", FakeFleet(a=[0.05, *says("8")], b=says("9"), c=[DEAD])) == ("8", "a")
    with pytest.raises(ExpertUnavailableError, match="no expert could answer"):
        await run("vote", FakeFleet(a=[DEAD], b=[DEAD]))


async def test_votes_may_weigh_by_estimated_quality() -> None:
    made = ranked(a=(0.95, 1.0), b=(0.6, 1.0), c=(0.6, 1.0))
    fleet = FakeFleet(a=says("9"), b=says("8"), c=says("8"))
    assert await said("vote", fleet, made) == ("8", "b")
    assert await said("vote", fleet, made, weight="quality") == ("9", "a")


async def test_what_an_answer_says_may_be_a_part_of_it() -> None:
    fleet = FakeFleet(a=says("By adding: 8"), b=says("It is 9"), c=says("Answer 9"))
    assert await said("vote", fleet, answer_pattern=r"\d+") == ("It is 9", "b")
    with pytest.raises(RouterConfigError, match="no regular expression"):
        await run("vote", fleet, answer_pattern="(")


async def test_samples_are_warm_and_differ() -> None:
    fleet = KeepingFleet(a=says("9"))
    await run("vote", fleet, voters=1, samples=3, temperature=0.5, body={"seed": 7})
    assert [(body["temperature"], body["seed"]) for body in fleet.bodies] == [(0.5, 7), (0.5, 8), (0.5, 9)]


async def test_tool_calls_are_votes_too() -> None:
    def calls(city: str) -> list[Step]:
        pieces = [{"name": "weather", "arguments": '{"city": '}, {"arguments": f'"{city}"}}'}]
        told = [chunk(tool_calls=[{"index": 0, "id": "x", "type": "function", "function": f}]) for f in pieces]
        return [*told, STOP]

    (whole,) = await run("vote", FakeFleet(a=calls("Rome"), b=calls("Oslo"), c=calls("Oslo")))
    message = json.loads(whole.data)["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}


async def test_calls_of_functions_in_the_old_way_are_votes_too() -> None:
    def calls(city: str) -> list[Step]:
        pieces = [{"name": "weather", "arguments": '{"city": '}, {"arguments": f'"{city}"}}'}]
        return [*(chunk(function_call=piece) for piece in pieces), STOP]

    (whole,) = await run("vote", FakeFleet(a=calls("Rome"), b=calls("Oslo"), c=calls("Oslo")))
    message = json.loads(whole.data)["choices"][0]["message"]
    assert message["function_call"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}


async def test_a_tie_of_samples_goes_to_the_highest_ranked_too() -> None:
    fleet = KeepingFleet(a=[], b=[])
    fleet.queues = {"a": [says("7"), says("8")], "b": [says("9"), says("9")]}
    fleet.queues["a"][1] = says("9")
    assert await said("vote", fleet, voters=2, samples=2) == ("9", "a")
    fleet.queues = {"a": [says("7"), says("8"), says("8")], "b": [says("9"), says("9"), says("6")]}
    assert await said("vote", fleet, voters=2, samples=3) == ("8", "a")


# Mixture of agents


async def test_the_aggregator_reads_the_proposals_and_is_streamed() -> None:
    fleet = KeepingFleet(a=says("8"), b=[0.02, *says("9")], c=says("10"), d=says("nine"))
    answer = await said("mixture_of_agents", fleet, stream=True, aggregator="d")
    assert answer[0] == "nine"
    assert fleet.called[:3] == ["a", "b", "c"]
    assert fleet.bodies[-1]["messages"][-1]["content"] == aggregation_text("What is 4 + 5?", ["8", "9", "10"])
    assert fleet.calls[-1][1] == "aggregates 3 proposals"


async def test_proposals_that_agree_need_no_aggregator() -> None:
    fleet = FakeFleet(a=says("9"), b=says("9."), c=[DEAD])
    assert await said("mixture_of_agents", fleet) == ("9", "a")
    assert len(fleet.calls) == 3


async def test_an_aggregator_that_fails_leaves_what_most_proposed() -> None:
    fleet = KeepingFleet(a=says("8"), b=says("9"), c=says("9"), d=[DEAD])
    assert await said("mixture_of_agents", fleet, aggregator="d") == ("9", "b")


async def test_self_moa_samples_one_expert() -> None:
    fleet = KeepingFleet(a=says("unused"), b=says("unused"))
    fleet.queues["a"] = [says("8"), says("9"), says("nine")]
    assert (await said("self_moa", fleet, samples=2))[0] == "nine"
    assert fleet.called == ["a", "a", "a"]
    assert [body.get("temperature") for body in fleet.bodies] == [0.7, 0.7, None]


async def test_proposals_leave_time_to_aggregate() -> None:
    fleet = KeepingFleet(a=says("8"), b=says("9"), c=[30.0], d=says("nine"))
    assert (await said("mixture_of_agents", fleet, timeout_s=0.5, aggregator="d"))[0] == "nine"


async def test_nobody_proposes() -> None:
    with pytest.raises(ExpertTimeoutError):
        await run("mixture_of_agents", FakeFleet(a=[30.0], b=[30.0]), timeout_s=0.1)


def test_the_answers_go_where_the_question_is() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [image, {"type": "text", "text": "What {is} it?"}]},
        ]
    }
    found = aggregation_body(body, ["a {cat}", "a dog"], "{question}|{answers}|")
    assert found["messages"][0] == body["messages"][0]
    assert found["messages"][1]["content"] == [image, {"type": "text", "text": "What {is} it?|1. a {cat}\n2. a dog|"}]
    assert aggregation_body({"prompt": "Q"}, ["x"], "{question}{answers}") == {"prompt": "Q1. x"}


# What is no answer

EVIL: dict[str, bytes] = {
    "choices that are a number": b'{"choices": 5}',
    "choices that are an object": b'{"choices": {"a": 1}}',
    "a choice that is text": b'{"choices": ["x"]}',
    "a delta that is a list": b'{"choices": [{"delta": [1]}]}',
    "content that is a list": b'{"choices": [{"delta": {"content": [1]}}]}',
    "content that is a number": b'{"choices": [{"delta": {"content": 7}}]}',
    "an index that is text": b'{"choices": [{"index": "a", "delta": {}}]}',
    "tool calls that are text": b'{"choices": [{"delta": {"tool_calls": "x"}}]}',
    "a tool's index that is text": b'{"choices": [{"delta": {"tool_calls": [{"index": "b"}]}}]}',
    "arguments that are a list": b'{"choices": [{"delta": {"tool_calls": [{"function": {"arguments": []}}]}}]}',
    "an end that is an object": b'{"choices": [{"delta": {}, "finish_reason": {}}]}',
    "logprobs that are a list": b'{"choices": [{"delta": {}, "logprobs": [1]}]}',
    "a logprob that is missing": b'{"choices": [{"delta": {}, "logprobs": {"content": [{"token": "x"}]}}]}',
    "a logprob that is null": b'{"choices": [{"delta": {}, "logprobs": {"content": [{"logprob": null}]}}]}',
    "a logprob that is huge": b'{"choices": [{"delta": {}, "logprobs": {"content": [{"logprob": 1e308}]}}]}',
    "a logprob beyond all": b'{"choices": [{"delta": {}, "logprobs": {"content": [{"logprob": 1e999}]}}]}',
    "a logprob of many digits": b'{"choices": [{"delta": {}, "logprobs": {"content": [{"logprob": 1%s}]}}]}'
    % (b"0" * 400),
    "a logprob that is no number": b'{"choices": [{"delta": {}, "logprobs": {"content": [{"logprob": NaN}]}}]}',
    "no object": b"[1, 2]",
    "no JSON": b"{",
    "a pit": b"[" * 100_000,
}


@pytest.mark.parametrize("strategy", ["cascade", "vote", "mixture_of_agents", "self_moa"])
@pytest.mark.parametrize("evil", EVIL)
async def test_what_is_no_chunk_is_a_failure_of_its_expert(strategy: str, evil: str) -> None:
    fleet = FakeFleet(a=[chunk(content="x"), Part(EVIL[evil]), STOP])
    with pytest.raises(ExpertUnavailableError, match="expert 'a' sent what is no chunk of an answer"):
        await run(strategy, fleet)
    assert fleet.closed == fleet.called


@pytest.mark.parametrize("evil", EVIL)
async def test_another_step_answers_in_its_stead(evil: str) -> None:
    fleet = FakeFleet(a=[Part(EVIL[evil])], b=says("nine"))
    assert await said("cascade", fleet, **STRICT) == ("nine", "b")


async def test_odd_logprobs_that_the_wire_format_allows() -> None:
    whole = {"content": [{"logprob": 1e-6}, {"logprob": -9999.0}]}
    told = {"choices": [{"index": 0, "delta": {"content": "nine"}, "logprobs": whole}]}
    fleet = FakeFleet(a=[Part(json.dumps(told).encode()), STOP], b=says("ten"))
    assert await said("cascade", fleet, **STRICT) == ("ten", "b")


@pytest.mark.parametrize("strategy", ["cascade", "vote", "mixture_of_agents", "self_moa"])
@pytest.mark.parametrize(
    ("script", "why"),
    [
        ([], "without an answer"),
        ([END], "without an answer"),
        ([ROLE, STOP, END], "without an answer"),
        ([ROLE, chunk(content="ni")], "in the middle of its answer"),
        ([ROLE], "in the middle of its answer"),
    ],
)
async def test_an_answer_that_is_empty_or_breaks_off_is_none(strategy: str, script: list[Step], why: str) -> None:
    with pytest.raises(ExpertUnavailableError, match=why):
        await run(strategy, FakeFleet(a=script))


async def test_how_an_answer_ended_is_what_its_expert_said() -> None:
    end = Part(b'{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}')
    (whole,) = await run("vote", FakeFleet(a=[chunk(content="9"), end]))
    assert json.loads(whole.data)["choices"][0]["finish_reason"] == "length"


async def test_a_call_that_will_not_end_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where an answer was decided without it, nor where the client hangs up meanwhile."""
    monkeypatch.setattr(replies, "CLOSING_S", 0.2)

    class Clinging(FakeFleet):
        async def __call__(self, expert: str, request: ExpertRequest, *, why: str) -> AsyncGenerator[Part, None]:
            self.calls.append((expert, why, request.timeout_s))
            try:
                for step in self.scripts[expert]:
                    if isinstance(step, Part):
                        yield step
                    elif isinstance(step, float):
                        await asyncio.sleep(step)
            finally:
                if expert == "a":
                    await asyncio.sleep(3)

    fleet = Clinging(a=[ROLE, 30.0], b=says("9"), c=says("9"))
    async with asyncio.timeout(1.5):
        assert await said("vote", fleet) == ("9", "b")

    async def holds() -> None:
        await run("vote", fleet)

    monkeypatch.setattr(replies, "CLOSING_S", 30.0)
    task = asyncio.create_task(holds())
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(1):
            await task


async def test_a_late_call_that_will_not_close_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "CLOSING_S", 0.1)

    class Stuck(FakeFleet):
        async def __call__(self, expert: str, request: ExpertRequest, *, why: str) -> AsyncGenerator[Part, None]:
            try:
                for step in self.scripts[expert]:
                    if isinstance(step, Part):
                        yield step
            finally:
                await asyncio.sleep(30 if expert == "a" else 0)

    fleet = Stuck(a=[Part(b"no chunk"), STOP], b=says("9"))
    async with asyncio.timeout(3):
        assert await said("cascade", fleet, **STRICT) == ("9", "b")


# All of them


@pytest.mark.parametrize("strategy", ["cascade", "vote", "mixture_of_agents", "self_moa"])
async def test_one_choice_alone(strategy: str) -> None:
    with pytest.raises(ExpertRequestError, match="'n' must be 1"):
        await run(strategy, FakeFleet(a=says("9")), body={"n": 2})


TWO: dict[str, dict[str, Any]] = {
    "cascade": {"steps": 2},
    "vote": {"voters": 2},
    "mixture_of_agents": {"proposers": 2},
    "self_moa": {"samples": 2, "expert": "b"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("strategy", TWO)
async def test_where_nobody_answered_the_others_are_asked(strategy: str, stream: bool) -> None:
    dead = {name: [DEAD] for name in "abc"}
    answers = says("nine") if stream else [WHOLE]
    made = decision("a", "b", "c", "d") if strategy != "self_moa" else decision("b", "c", "d")
    fleet = FakeFleet(**dead, d=answers)
    text, _ = await said(strategy, fleet, made, stream=stream, **TWO[strategy])
    assert text == ("nine" if stream else "four")
    assert fleet.called[-2:] == ["c", "d"]
    assert [why.partition(" failed: ")[0] for _, why, _ in fleet.calls[-2:]] == [f"fallback: {strategy}", "fallback: c"]

    for attempts, asked in ((1, ["b"]), (2, ["b", "c"])):
        fleet = FakeFleet(**dead, d=answers)
        with pytest.raises(ExpertUnavailableError, match="connection lost"):
            await run(strategy, fleet, made, fallbacks={"max_attempts": attempts}, **TWO[strategy])
        assert list(dict.fromkeys(fleet.called))[-len(asked) :] == asked


@pytest.mark.parametrize("strategy", TWO)
async def test_an_attempt_has_its_own_time(strategy: str) -> None:
    made = decision("a", "b", "c") if strategy != "self_moa" else decision("b", "c")
    fleet = FakeFleet(a=[3600.0], b=[3600.0], c=[WHOLE])
    patient = {"fallbacks": {"attempt_timeout_s": 0.05}, "timeout_s": 3600.0}
    async with asyncio.timeout(60):
        assert (await said(strategy, fleet, made, **patient, **TWO[strategy]))[0] == "four"


async def test_an_aggregator_has_an_attempts_time_to_begin() -> None:
    fleet = FakeFleet(a=says("8"), b=says("9"), c=[3600.0])
    patient = {"fallbacks": {"attempt_timeout_s": 0.2}, "timeout_s": 3600.0}
    for stream in (False, True):
        async with asyncio.timeout(60):
            answer = await said("mixture_of_agents", fleet, aggregator="c", proposers=2, stream=stream, **patient)
        assert answer == ("8", "a")


async def test_a_request_at_fault_is_asked_of_nobody_else() -> None:
    fleet = FakeFleet(a=[ExpertRequestError("temperature is too high")], b=says("nine"))
    with pytest.raises(ExpertRequestError, match="temperature"):
        await run("vote", fleet, voters=1)
    assert fleet.called == ["a"]


@pytest.mark.parametrize("strategy", ["cascade", "vote", "mixture_of_agents", "self_moa"])
@pytest.mark.parametrize("prompt", [["one", "two"], ["one"], [5, 6], [[5, 6], [7]]])
async def test_one_prompt_alone_and_as_text(strategy: str, prompt: list[Any]) -> None:
    policy = Policy.model_validate({"name": "p", "strategy": {"name": strategy}})
    fleet = FakeFleet(a=says("9"))
    asked = ExpertRequest(id="1", endpoint="completions", body={"prompt": prompt})
    with pytest.raises(ExpertRequestError, match="'prompt' must be a string") as caught:
        await collect(create_strategy(policy).run(decision("a"), asked, fleet), [])
    assert (caught.value.param, fleet.calls) == ("prompt", [])


@pytest.mark.parametrize("strategy", ["cascade", "vote", "mixture_of_agents", "self_moa"])
async def test_a_client_that_hangs_up_ends_every_call(strategy: str) -> None:
    fleet = FakeFleet(**{name: [ROLE, 30.0] for name in "abc"})
    task = asyncio.create_task(run(strategy, fleet))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(fleet.closed) == len(fleet.calls) >= 1


@pytest.mark.parametrize(
    ("strategy", "options", "wrong"),
    [
        ("cascade", {"threshold": 2}, "threshold"),
        ("cascade", {"experts": ["a", "a"]}, "named twice"),
        ("cascade", {"experts": ["a", "b"], "steps": 1}, "leave `steps` out"),
        ("vote", {"voters": 0}, "voters"),
        ("mixture_of_agents", {"prompt": "{answers}"}, r"must contain \{question\}"),
        ("self_moa", {"spin": 1}, "spin"),
    ],
)
def test_options_are_checked(strategy: str, options: dict[str, Any], wrong: str) -> None:
    policy = Policy.model_validate({"name": "p", "strategy": {"name": strategy, "options": options}})
    with pytest.raises(RouterConfigError, match=wrong):
        create_strategy(policy)


def test_a_ceiling_that_leaves_no_call_to_aggregate_is_refused() -> None:
    policy = Policy.model_validate({"name": "p", "strategy": {"name": "self_moa"}, "ceilings": {"calls": 4}})
    with pytest.raises(RouterConfigError, match=r"needs 5 calls, and `ceilings.calls` leaves it 4"):
        create_strategy(policy)
