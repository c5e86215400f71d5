"""`router_r1`: the strategy. The policy model thinks and asks; this calls the experts, within bounds, and streams.

What the policy model writes is trusted with nothing: only experts of the decision's ranking can be asked, at most
`max_calls` times, each with a bound on time, on its reply's length and on its cost, and its reply is read by the policy
as text alone. A call that fails is `NO_REPLY` to the policy, which may ask somebody else. Where the policy itself fails
or keeps not to the protocol, the expert ranked first answers in its stead, as in `single`.

A client that streams sees the thoughts, and who was asked what and replied what, as deltas of `reasoning_content`, and
the answer as deltas of `content`; a plain answer has both in its message.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from experts.cards import ExpertCard
from experts.errors import ExpertError, ExpertRequestError, ExpertUnavailableError
from experts.expert import ExpertRequest, Part, Usage
from routers.contracts import Call, Decision
from routers.query import query_from_body
from routers.strategies.base import BaseStrategy, StrategyOptions
from routers.strategies.deadline import close, until
from routers.strategies.replies import Ask, Reply, check_one_choice, collect
from routers.strategies.router_r1.protocol import (
    MAX_CALLS,
    NO_REPLY,
    Message,
    Turn,
    first_turn,
    information,
    opening,
    parse,
    shown,
)
from routers.strategies.single import SingleStrategy

_CHARS_PER_TOKEN = 16
"""More than a token has in any tokenizer, but for runs of spaces: where a model ignores its bound, it is cut here."""

_CUT = Part(b'{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}')


class RouterR1Options(StrategyOptions):
    """Which expert is the policy (`policy`), what it is told before the cards, and what bounds its calls.

    A call of an expert may take `call_timeout_s` seconds and write `reply_tokens`, fewer where more would cost above
    `call_usd`; the policy reads `reply_chars` characters of it. A turn of the policy is at most `turn_tokens`. The
    first `most_experts` of the ranking are listed, by name: alike openings let an engine keep what it has read.
    """

    policy: str
    instructions: str = ""
    max_calls: Annotated[int, Field(ge=1, le=MAX_CALLS)] = MAX_CALLS
    most_experts: Annotated[int, Field(ge=1, le=100)] = 20
    turn_tokens: Annotated[int, Field(ge=16, le=8192)] = 512
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    call_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    call_usd: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    reply_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    reply_chars: Annotated[int, Field(ge=1, le=32768)] = 2000


class RouterR1Strategy(BaseStrategy[RouterR1Options]):
    """A policy model asks experts in turn and answers."""

    name = "router_r1"
    options_type = RouterR1Options

    @property
    def experts(self) -> frozenset[str]:
        """The policy model."""
        return frozenset({self.options.policy})

    @property
    def least_calls(self) -> int:
        """The policy asks, an expert replies, the policy answers."""
        return 3

    @property
    def most_calls(self) -> int:
        """Every turn of the policy, and every call that it may make between them."""
        return 2 * self.options.max_calls + 1

    async def run(self, decision: Decision, request: ExpertRequest, call: Call) -> AsyncGenerator[Part, None]:
        """The thoughts and the answer.

        Raises `ExpertRequestError` for what no text can answer (tools, several choices, completions), `ExpertError`
        where the policy breaks off an answer that had begun, or where nobody could answer.
        """
        _check(request)
        episode = _Episode(self.options, decision, request, call)
        try:
            async with aclosing(episode.parts()) as parts:
                async for part in parts:
                    yield part
            return
        except ExpertError as error:
            if episode.answering:
                raise
            failed = f"fallback: {self.options.policy} failed: {error}"
        left = max(episode.deadline - asyncio.get_running_loop().time(), 0.001)
        async with aclosing(self._instead(decision, replace(request, timeout_s=left), call, failed)) as parts:
            async for part in parts:
                yield part

    async def _instead(
        self, decision: Decision, request: ExpertRequest, call: Call, failed: str
    ) -> AsyncGenerator[Part, None]:
        """The answer of the first of the ranking that answers."""

        def named(expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
            return call(expert, request, why=f"{failed}; {why}")

        async with aclosing(SingleStrategy(self.fallbacks).run(decision, request, named)) as parts:
            async for part in parts:
                yield part


def _check(request: ExpertRequest) -> None:
    check_one_choice(request)
    for name in ("tools", "functions", "response_format", "logprobs"):
        if request.body.get(name):
            message = f"this policy's strategy writes text alone: {name!r} must be left out"
            raise ExpertRequestError(message, param=name, code="unsupported_parameter")
    if request.endpoint != "chat/completions":
        message = f"this policy's strategy answers chats, not {request.endpoint}"
        raise ExpertRequestError(message, param="model", code="unsupported_endpoint")


@dataclass(slots=True)
class _Episode:
    """One question on its way: the conversation with the policy, and what is left of calls and time."""

    options: RouterR1Options
    decision: Decision
    request: ExpertRequest
    call: Call
    answering: bool = False
    deadline: float = field(init=False)
    cards: Mapping[str, ExpertCard] = field(init=False)
    messages: list[Message] = field(init=False)
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self.deadline = asyncio.get_running_loop().time() + self.request.timeout_s
        ranked = [one for one in self.decision.ranking if one.expert != self.options.policy]
        listed = sorted(ranked[: self.options.most_experts], key=lambda one: one.expert)
        self.cards = {one.expert: one.card for one in listed}
        question = query_from_body(self.request.endpoint, self.request.body).text
        self.messages = opening(list(self.cards.values()), question, self.options.instructions)

    async def parts(self) -> AsyncGenerator[Part, None]:
        """What the client gets. Raises `ExpertError` where the policy fails or breaks the protocol."""
        writer = _Writer(self.request, self.options.policy)
        for calls in range(self.options.max_calls + 1):
            turn = Turn("broken", "it wrote nothing")
            async with aclosing(self._turn(calls)) as steps:
                async for so_far, thought, answer in steps:
                    turn = so_far
                    self.answering = self.answering or bool(answer and self.request.stream)
                    for part in writer.write(thought, answer):
                        yield part
            if turn.kind == "answer":
                for part in writer.end(self.usage):
                    yield part
                return
            if turn.kind == "broken" or turn.expert is None:
                raise ExpertUnavailableError(f"policy {self.options.policy!r} kept not to the protocol: {turn.text}")
            if calls == self.options.max_calls:
                break
            reply = await self._asked(turn.expert, turn.text, calls + 1)
            for part in writer.write(f"\n{turn.expert}: {turn.text}\n{reply}\n", ""):
                yield part
            last = calls + 1 == self.options.max_calls
            told = information(reply, self.options.reply_chars, last=last)
            self.messages.append({"role": "user", "content": told})
        raise ExpertUnavailableError(f"policy {self.options.policy!r} asked on when it had to answer")

    async def _turn(self, calls: int) -> AsyncGenerator[tuple[Turn, str, str], None]:
        """One turn of the policy as it comes: the turn so far, and what is new of its thought and of its answer."""
        options = self.options
        body = {
            "messages": list(self.messages),
            "stream": True,
            "temperature": options.temperature,
            "max_tokens": options.turn_tokens,
        }
        sent = replace(self.request, body=body, timeout_s=self._left())
        reply, thought, answer = Reply(options.policy), "", ""
        source = self.call(options.policy, sent, why=f"policy, turn {calls + 1}")
        try:
            async with until(self.deadline, f"policy {options.policy!r} did not finish its turn in time"):
                async for part in source:
                    reply.add(part)
                    said = first_turn(reply.text)
                    new_thought, new_answer = shown(said)
                    yield Turn("broken", "its turn has no end"), new_thought[len(thought) :], new_answer[len(answer) :]
                    thought, answer = new_thought, new_answer
                    self._count(part)
                    if len(said) < len(reply.text) or len(said) > options.turn_tokens * _CHARS_PER_TOKEN:
                        break
        finally:
            await close(source)
        said = first_turn(reply.text)
        self.messages.append({"role": "assistant", "content": said})
        turn = parse(said, tuple(self.cards))
        yield turn, "", turn.text[len(answer) :] if turn.kind == "answer" else ""

    async def _asked(self, expert: str, sub_query: str, number: int) -> str:
        """An expert's reply, or `NO_REPLY`."""
        options, card = self.options, self.cards[expert]
        messages = [{"role": "user", "content": sub_query}]
        tokens = _affordable(card, sub_query, options)
        if tokens < 1:
            return NO_REPLY
        body = {"messages": messages, "temperature": 0, "max_tokens": tokens}
        ask = Ask(expert=expert, body=body, why=f"asked by {options.policy}, call {number}")
        by = min(self.deadline, asyncio.get_running_loop().time() + options.call_timeout_s)
        try:
            reply = await collect(self._cut, ask, self.request, by=by)
        except ExpertError:
            return NO_REPLY
        for part in reply.parts:
            self._count(part)
        return reply.text.strip() or NO_REPLY

    async def _cut(self, expert: str, request: ExpertRequest, *, why: str) -> AsyncGenerator[Part, None]:
        """A call that ends once it has written as much as the policy reads, whatever its expert was told."""
        reply, source = Reply(expert), self.call(expert, request, why=why)
        try:
            async for part in source:
                yield part
                reply.add(part)
                if len(reply.text) > self.options.reply_chars:
                    yield _CUT
                    return
        finally:
            await close(source)

    def _left(self) -> float:
        return max(self.deadline - asyncio.get_running_loop().time(), 0.001)

    def _count(self, part: Part) -> None:
        if part.usage:
            self.usage = Usage(
                self.usage.input_tokens + part.usage.input_tokens, self.usage.output_tokens + part.usage.output_tokens
            )


def _affordable(card: ExpertCard, sub_query: str, options: RouterR1Options) -> int:
    """How many tokens a reply may have; a token for each byte of the sub-query is the most that it can be."""
    if options.call_usd is None or not card.output_price:
        return options.reply_tokens
    left = options.call_usd - card.cost(Usage(input_tokens=len(sub_query.encode())))
    return min(options.reply_tokens, math.floor(left / card.cost(Usage(output_tokens=1))))


class _Writer:
    """Writes thought and answer as the client wants them: as chunks, or as one message at the end."""

    def __init__(self, request: ExpertRequest, policy: str) -> None:
        self._stream = request.stream
        self._show_usage = bool((request.body.get("stream_options") or {}).get("include_usage"))
        self._head = {"id": request.id, "created": int(time.time()), "model": policy}
        self._policy = policy
        self._begun = False
        self._thought = ""
        self._answer = ""

    def write(self, thought: str, answer: str) -> list[Part]:
        """The chunks for what is new of either."""
        self._thought += thought
        self._answer += answer
        deltas = [{name: text} for name, text in (("reasoning_content", thought), ("content", answer)) if text]
        if not self._stream or not deltas:
            return []
        if not self._begun:
            self._begun = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        return [self._chunk([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]

    def end(self, usage: Usage) -> list[Part]:
        """The last chunks, or the whole answer; `usage` is of all calls together."""
        total = usage.input_tokens + usage.output_tokens
        told = {
            "prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens, "total_tokens": total
        }  # fmt: skip
        if not self._stream:
            message = {"role": "assistant", "content": self._answer, "reasoning_content": self._thought.strip()}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
            return [self._part({"object": "chat.completion", "choices": [choice], "usage": told}, usage)]
        parts = [self._chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}], usage)]
        if self._show_usage:
            parts.append(self._part({"object": "chat.completion.chunk", "choices": [], "usage": told}, usage))
        return parts

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> Part:
        return self._part({"object": "chat.completion.chunk", "choices": choices}, usage)

    def _part(self, body: dict[str, Any], usage: Usage | None) -> Part:
        return Part(json.dumps({**self._head, **body}).encode(), usage=usage, expert=self._policy)
