"""Calling experts for a strategy: every call is bounded, metered and recorded, whoever makes it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from experts.cards import ExpertCard
from experts.errors import ExpertError, ExpertRequestError, ExpertTimeoutError, ExpertUnavailableError
from experts.expert import Expert, ExpertRequest, Part, Usage
from router_service.core.steering import Steering
from router_service.core.trace import CallRecord, Trace
from router_service.metrics import Metrics
from routers.ceilings import ASSUMED_OUTPUT, BYTES_PER_TOKEN, CostCeiling, Grant
from routers.policy import Ceilings
from routers.query import query_from_body
from routers.strategies.deadline import close
from routers.strategies.replies import Reply, as_stream

logger = logging.getLogger(__name__)

_SLACK_S = 0.25
"""A call may outlive the deadline by this much: its first call need not be made anew for the microseconds since."""


class Lane:
    """One expert with its card and the calls that are under way to it; `steering` is what its gates are told."""

    def __init__(self, card: ExpertCard, expert: Expert, *, limit: int, steering: Steering | None = None) -> None:
        self.card = card
        self.expert = expert
        self.steering = steering
        self._limit = limit
        self._under_way = 0

    def enter(self) -> None:
        """Take a place. Raises `ExpertUnavailableError` if none is left."""
        if self._under_way >= self._limit:
            message = f"expert {self.card.name!r} has {self._limit} calls under way, which is its limit"
            raise ExpertUnavailableError(message, retry_after_s=1.0)
        self._under_way += 1

    def leave(self) -> None:
        """Give the place back."""
        self._under_way -= 1


@dataclass(slots=True)
class _Open:
    """A call under way. `sent`: its expert was asked; `grant`: what it may use; `usage`: what it said that it used."""

    record: CallRecord
    lane: Lane
    request: ExpertRequest
    grant: Grant | None = None
    usage: Usage | None = None
    sent: bool = False
    started: float = field(default_factory=time.perf_counter)

    def take(self, part: Part) -> None:
        """Count a part of its reply."""
        if part.data:
            if self.record.first_part_s is None:
                self.record.first_part_s = time.perf_counter() - self.started
            self.record.parts += 1
        self.usage = part.usage or self.usage


class Caller:
    """The `Call` of one request: its calls share a deadline (`time.monotonic`) and the policy's ceilings.

    `ceiling_usd` stops further calls once so much is spent; `ceilings.cost_usd` is never exceeded
    (`routers.ceilings`). Under it a whole answer is asked for as a stream too, so that one without an end is seen to
    grow, and can be ended. A call that no ceiling lets be sent is recorded, and counts as none.

    A gate's instruction is written by a call beside the one that it is for, which has its share of the ceilings first:
    where they leave no more, the answer comes without the instruction.
    """

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        trace: Trace,
        metrics: Metrics,
        *,
        deadline: float,
        ceiling_usd: float | None = None,
        ceilings: Ceilings | None = None,
    ) -> None:
        self._lanes = lanes
        self._trace = trace
        self._metrics = metrics
        self._deadline = deadline
        self._ceiling_usd = ceiling_usd
        self._most_calls = ceilings.calls if ceilings else None
        self._cost = CostCeiling(ceilings.cost_usd) if ceilings and ceilings.cost_usd else None
        self._sent = 0
        self._opened: list[AsyncGenerator[Part]] = []

    def __call__(self, expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
        """The expert's reply, part by part."""
        return self._open(expert, request, why)

    def _beside(self, expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
        """The reply to a call for another call's sake, made for the same tenant."""
        return self._open(expert, replace(request, tenant=self._trace.key), why, beside=True)

    def _open(self, expert: str, request: ExpertRequest, why: str, *, beside: bool = False) -> AsyncIterator[Part]:
        parts = self._call(expert, request, why, beside)
        self._opened.append(parts)
        return parts

    async def close(self) -> None:
        """Stop every call that is still under way; one that ends badly, or not in time, is logged and left."""
        ends = await asyncio.gather(*map(close, self._opened), return_exceptions=True)
        for end in ends:
            if end is not None:
                logger.error("a call did not end well", exc_info=end)

    async def embed(self, expert: str, request: ExpertRequest, *, why: str) -> Part:
        """The expert's embeddings."""
        with self._recorded(expert, request, why) as opened:
            opened.sent = True
            part = await opened.lane.expert.embed(opened.request)
            opened.usage = part.usage
            return part

    async def _call(self, expert: str, request: ExpertRequest, why: str, beside: bool) -> AsyncGenerator[Part]:
        with self._recorded(expert, request, why, beside) as opened:
            if opened.lane.steering and not beside:
                told = await opened.lane.steering.told(opened.request, self._beside)
                opened.request = self._bounded(told)
            opened.sent = True
            whole = Reply(expert) if self._cost and not request.stream else None
            if whole:
                opened.request = replace(opened.request, body=_streamed(opened.request.body))
            generated = cast("AsyncGenerator[Part]", opened.lane.expert.generate(opened.request))
            async with aclosing(generated) as parts:
                async for part in parts:
                    opened.take(part)
                    if part.work:
                        self._metrics.count_work(expert, part.work)
                    self._check_cost(opened, part)
                    if whole is None:
                        yield part
                    else:
                        whole.add(part)
            if whole:
                whole.check_ended()
                for part in whole.for_client(request, logprobs=False):
                    yield part

    @contextmanager
    def _recorded(self, expert: str, request: ExpertRequest, why: str, beside: bool = False) -> Iterator[_Open]:
        """Bracket one call: its place, time and money are taken before it, its record is complete after it."""
        record, lane = self._begin(expert, why, beside)
        record.asked = self._asked(request)
        opened = _Open(record, lane, request)
        free = False
        try:
            opened.request = self._bounded(request)
            if self._cost:
                opened.grant, opened.request = self._cost.grant(lane.card, opened.request)
            self._sent += 1
            yield opened
        except ExpertError as error:
            free = not record.parts and not isinstance(error, ExpertTimeoutError)
            _note(record, error)
            if not opened.sent and record.outcome == "error":
                record.outcome = "not_sent"
            raise
        except GeneratorExit:
            _cut_off(opened)
            raise
        except asyncio.CancelledError as stopped:
            if stopped.args:  # by a strategy's deadline, which says why
                _note(record, ExpertTimeoutError(stopped.args[0]))
            else:
                _cut_off(opened)
            raise
        finally:
            if free or not opened.sent:
                opened.usage = opened.usage or Usage()
            self._end(opened)

    def _begin(self, expert: str, why: str, beside: bool) -> tuple[CallRecord, Lane]:
        lane = self._lanes.get(expert)
        if lane is None:
            raise ExpertUnavailableError(f"there is no expert {expert!r}")
        if self._ceiling_usd is not None and self._sent and self._trace.cost_usd >= self._ceiling_usd:
            raise ExpertUnavailableError(f"the policy's ceiling of {self._ceiling_usd} USD a request is reached")
        if self._most_calls is not None and self._sent >= self._most_calls:
            raise ExpertUnavailableError(f"the policy's ceiling of {self._most_calls} calls a request is reached")
        lane.enter()
        record = CallRecord(expert, why, beside=beside)
        self._trace.calls.append(record)
        return record, lane

    def _end(self, opened: _Open) -> None:
        record, card, grant = opened.record, opened.lane.card, opened.grant
        opened.lane.leave()
        record.latency_s = time.perf_counter() - opened.started
        record.usage = opened.usage or _guess(opened)
        record.estimated = record.usage.estimated
        record.cost_usd = card.cost(record.usage)
        if self._cost and grant:
            self._cost.settle(grant, None if record.estimated else record.cost_usd)
            if record.cost_usd > grant.usd:
                _note_excess(record, grant.usd)
        if opened.sent:
            self._metrics.count_call(record)

    def _check_cost(self, opened: _Open, part: Part) -> None:
        if self._cost and opened.grant and part.data and not self._cost.take(opened.grant, opened.lane.card, part.data):
            message = f"expert {opened.record.expert!r} wrote more than the policy's ceiling of cost pays for"
            raise ExpertUnavailableError(message)

    def _bounded(self, request: ExpertRequest) -> ExpertRequest:
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise ExpertTimeoutError("the request's time is up")
        if request.timeout_s <= remaining_s + _SLACK_S:
            return request
        return replace(request, timeout_s=remaining_s)

    def _asked(self, request: ExpertRequest) -> str | None:
        """The last message where a strategy wrote it, if texts are kept."""
        messages = request.body.get("messages")
        said = messages[-1].get("content") if messages else None
        return said if self._trace.text is not None and isinstance(said, str) and said != self._trace.text else None


def _streamed(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a whole answer as one that asks for a stream. Raises `ExpertRequestError` where there is none."""
    if (body.get("best_of") or 1) > 1:
        message = "this policy has a ceiling of cost, under which 'best_of' must be 1: it has no stream"
        raise ExpertRequestError(message, param="best_of", code="invalid_value")
    return as_stream(body)


def _guess(opened: _Open) -> Usage:
    """The likely usage of a call that never told it: its own prompt, and of output what was seen of a stream.

    Of a whole answer nothing is seen before its end: it may have used all that it was allowed.
    """
    request, record, grant = opened.request, opened.record, opened.grant
    query = query_from_body(request.endpoint, request.body)
    if request.stream:
        written = max(record.parts, grant.used // BYTES_PER_TOKEN if grant else 0)
    else:
        bound = ASSUMED_OUTPUT if query.max_output_tokens is None else query.max_output_tokens
        written = 0 if record.parts else bound * query.choices
    return Usage(input_tokens=query.input_tokens, output_tokens=written, estimated=True)


def _cut_off(opened: _Open) -> None:
    if not opened.usage:
        opened.record.outcome, opened.record.error = "cut_off", "cut off"


def _note(record: CallRecord, error: ExpertError) -> None:
    record.outcome = "refused" if isinstance(error, ExpertRequestError) else "error"
    record.error = f"{type(error).__name__}: {error}"


def _note_excess(record: CallRecord, allowed_usd: float) -> None:
    """Charge what was allowed; where the expert claims more, that is its fault."""
    if not record.estimated and not record.error:
        used = f"{record.usage.input_tokens} tokens read and {record.usage.output_tokens} written"
        message = f"expert {record.expert!r} says that it used more than it was allowed: {used}"
        _note(record, ExpertUnavailableError(f"{message}, {record.cost_usd:g} USD of {allowed_usd:g}"))
    record.cost_usd = allowed_usd
