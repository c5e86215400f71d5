"""Calling experts for a strategy: every call is bounded, metered and recorded, whoever makes it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from experts.cards import ExpertCard
from experts.errors import ExpertError, ExpertRequestError, ExpertTimeoutError, ExpertUnavailableError
from experts.expert import Expert, ExpertRequest, Part, Usage
from router_service.core.ceilings import CostCeiling, Grant
from router_service.core.trace import CallRecord, Trace
from router_service.metrics import Metrics
from routers.policy import Ceilings

_SLACK_S = 0.25
"""A call may outlive the deadline by this much: its first call need not be made anew for the microseconds since."""


class Lane:
    """One expert with its card and the calls that are under way to it."""

    def __init__(self, card: ExpertCard, expert: Expert, *, limit: int) -> None:
        self.card = card
        self.expert = expert
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


class Caller:
    """The `Call` of one request: its calls share a deadline (`time.monotonic`) and the policy's ceilings.

    `ceiling_usd` stops further calls once so much is spent; `ceilings.cost_usd` is never exceeded.
    `input_tokens` is the prompt's estimated length, by which a call that was cut off is charged.
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
        input_tokens: int = 0,
    ) -> None:
        self._lanes = lanes
        self._trace = trace
        self._metrics = metrics
        self._deadline = deadline
        self._ceiling_usd = ceiling_usd
        self._most_calls = ceilings.calls if ceilings else None
        self._cost = CostCeiling(ceilings.cost_usd) if ceilings and ceilings.cost_usd else None
        self._input_tokens = input_tokens
        self._opened: list[AsyncGenerator[Part]] = []

    def __call__(self, expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
        """The expert's reply, part by part."""
        parts = self._call(expert, request, why)
        self._opened.append(parts)
        return parts

    async def close(self) -> None:
        """Stop every call that is still under way."""
        for parts in self._opened:
            await parts.aclose()

    async def embed(self, expert: str, request: ExpertRequest, *, why: str) -> Part:
        """The expert's embeddings."""
        record, lane = self._begin(expert, why)
        started = time.perf_counter()
        try:
            part = await lane.expert.embed(self._bounded(request))
            record.usage = part.usage or Usage()
            return part
        except ExpertError as error:
            _note(record, error)
            raise
        finally:
            self._end(lane, record, started)

    async def _call(self, expert: str, request: ExpertRequest, why: str) -> AsyncGenerator[Part]:
        record, lane = self._begin(expert, why)
        record.asked = self._asked(request)
        started = time.perf_counter()
        usage: Usage | None = None
        grant: Grant | None = None
        refused = False
        try:
            request = self._bounded(request)
            if self._cost:
                grant, request = self._cost.grant(lane.card, request)
            async with aclosing(cast("AsyncGenerator[Part]", lane.expert.generate(request))) as parts:
                async for part in parts:
                    if part.data:
                        if record.first_part_s is None:
                            record.first_part_s = time.perf_counter() - started
                        record.parts += 1
                    usage = part.usage or usage
                    if grant and request.stream and part.data and not grant.take(part.data):
                        raise ExpertUnavailableError(f"expert {expert!r} wrote more than {grant.output_tokens} tokens")
                    yield part
        except ExpertError as error:
            refused = not record.parts and not isinstance(error, ExpertTimeoutError)
            _note(record, error)
            raise
        except GeneratorExit:
            if not usage:
                record.outcome, record.error = "cut_off", "cut off"
            raise
        except asyncio.CancelledError as stopped:
            if stopped.args:  # by a strategy's deadline, which says why
                _note(record, ExpertTimeoutError(stopped.args[0]))
            elif not usage:
                record.outcome, record.error = "cut_off", "cut off"
            raise
        finally:
            record.usage = usage or (Usage() if refused else self._guess(record, grant))
            self._end(lane, record, started)
            if self._cost and grant:
                self._cost.settle(grant, record.cost_usd)

    def _begin(self, expert: str, why: str) -> tuple[CallRecord, Lane]:
        lane = self._lanes.get(expert)
        if lane is None:
            raise ExpertUnavailableError(f"there is no expert {expert!r}")
        if self._ceiling_usd is not None and self._trace.calls and self._trace.cost_usd >= self._ceiling_usd:
            raise ExpertUnavailableError(f"the policy's ceiling of {self._ceiling_usd} USD a request is reached")
        if self._most_calls is not None and len(self._trace.calls) >= self._most_calls:
            raise ExpertUnavailableError(f"the policy's ceiling of {self._most_calls} calls a request is reached")
        lane.enter()
        record = CallRecord(expert, why)
        self._trace.calls.append(record)
        return record, lane

    def _end(self, lane: Lane, record: CallRecord, started: float) -> None:
        lane.leave()
        record.latency_s = time.perf_counter() - started
        record.cost_usd = lane.card.cost(record.usage)
        self._metrics.count_call(record)

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

    def _guess(self, record: CallRecord, grant: Grant | None) -> Usage:
        """The usage of a call that never told it: the prompt, and a token for each part."""
        record.estimated = True
        written = record.parts if grant is None else min(grant.used, grant.output_tokens)
        return Usage(input_tokens=self._input_tokens, output_tokens=written)


def _note(record: CallRecord, error: ExpertError) -> None:
    record.outcome = "refused" if isinstance(error, ExpertRequestError) else "error"
    record.error = f"{type(error).__name__}: {error}"
