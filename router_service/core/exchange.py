"""One question and its answer."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from experts.cards import ExpertCard
from experts.embedding.request import texts_of
from experts.expert import Endpoint, ExpertRequest, Part, Usage
from router_service.core.admission import Reservation
from router_service.core.caching import digest_of, is_complete, is_deterministic, reissue
from router_service.core.calls import Caller
from router_service.core.embeddings import embed_routed
from router_service.core.routing import Plan, stay_with
from router_service.core.service import Service
from router_service.core.trace import Trace
from router_service.errors import BadRequestError, StateError, UnavailableError
from router_service.state.ledger import LEDGER
from routers.ceilings import ASSUMED_OUTPUT
from routers.contracts import Decision, Query
from routers.guide import writer_usage
from routers.policy import Ceilings, check_able
from routers.query import query_from_body

logger = logging.getLogger(__name__)

_MAX_REQUEST_ID = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question: the client's JSON body, whose fields for the service itself are taken out.

    `id` is the answer's; `request_id` is by what the client, or a proxy before us, follows the request.
    """

    id: str
    request_id: str
    key: str
    endpoint: Endpoint
    body: Mapping[str, Any]
    session: str | None = None


class Exchange:
    """Answers one question: `start`, then `piece` until it returns `None`, and always `finish`."""

    def __init__(self, service: Service, ask: Ask) -> None:
        self._service = service
        self._ask = ask
        self._started = time.perf_counter()
        model = ask.body.get("model")
        self.plan, self.expert = service.resolve(model, ask.endpoint)
        self.query = query_from_body(ask.endpoint, ask.body, session=ask.session)
        if self.expert:  # that its context is long enough it says itself: it counts tokens, we estimate them
            check_able(service.cards[self.expert], replace(self.query, input_tokens=0, max_output_tokens=None))
        self._check_gate_load()
        policy_timeout_s = self.plan.policy.timeout_s if self.plan else None
        self.timeout_s = min(service.settings.request_timeout_s, policy_timeout_s or math.inf)
        self.trace = Trace(
            id=ask.id,
            request_id=ask.request_id[:_MAX_REQUEST_ID],
            at=time.time(),
            key=ask.key,
            endpoint=ask.endpoint,
            model=str(model),
            stream=bool(ask.body.get("stream")),
            policy=self.plan.policy.name if self.plan else None,
            text=self.query.text if service.settings.ledger_text else None,
            session=self.query.session,
        )
        self.reservation = Reservation()
        self._caller: Caller | None = None
        self._parts: AsyncIterator[Part] | None = None
        self._replay: list[bytes] = []
        self._digest: str | None = None
        self._kept: list[bytes] = []
        self._finished = False

    def _check_gate_load(self) -> None:
        """Raise `BadRequestError` where the load of a gate is asked of what has none; a local model knows its own."""
        kind = self._service.cards[self.expert].kind if self.expert else "policy"
        if self._ask.body.get("gate_load") and kind not in ("local", "adapter"):
            raise BadRequestError(
                f"'gate_load' needs a model with a gate, BASE+gate:NAME or a mixture of the fleet, and no {kind}",
                param="gate_load",
                code="invalid_value",
            )

    async def start(self) -> None:
        """Admit the question, and find the answer in the cache or decide who gives it."""
        self.reservation = await self._admit()
        if await self._find_cached():
            return
        if self.plan and self._ask.endpoint == "embeddings":
            decisions = await self._decide_each(self.plan)
            self._parts = embed_routed(decisions, self._request, self._call(), self.plan.policy.fallbacks)
        else:
            self._parts = self._run(await self._decide(self.plan) if self.plan else None)

    async def piece(self) -> bytes | None:
        """The answer's next piece: the JSON of a chunk, or of the whole. `None` at the end."""
        if self._replay:
            return self._replay.pop(0)
        if self._parts is None:
            return None
        async for part in self._parts:
            self.trace.answered_by = part.expert or self.trace.answered_by
            if part.data:
                if self.trace.first_part_s is None:
                    self.trace.first_part_s = time.perf_counter() - self._started
                if self._digest:
                    self._kept.append(part.data)
                return part.data
        return None

    async def finish(self, status: int, error: str | None = None) -> None:
        """Stop what still runs, and record what was used. Only the first call counts."""
        if self._finished:
            return
        self._finished = True
        self.trace.status, self.trace.error = status, error
        try:
            if self._parts is not None:
                await cast("AsyncGenerator[Part]", self._parts).aclose()
            if self._caller is not None:
                await self._caller.close()
        finally:
            self._record()

    async def _admit(self) -> Reservation:
        if self._service.ledger.full:
            raise UnavailableError("usage cannot be recorded now", retry_after_s=1.0)
        query = self.query
        bound = ASSUMED_OUTPUT if query.max_output_tokens is None else query.max_output_tokens
        output = bound * query.choices
        usage = Usage(input_tokens=query.input_tokens, output_tokens=output)
        written = writer_usage(query.text)
        cards = self.plan.cards if self.plan else [self._service.cards[cast("str", self.expert)]]
        ceilings = self.plan.policy.ceilings if self.plan else Ceilings()
        calls = self.plan.strategy.most_calls if self.plan else 1
        calls = min(calls, ceilings.calls or calls)
        beside = [self._service.cards[writer].cost(written) for writer in self._writers(cards)]
        cost_usd = calls * (max(card.cost(usage) for card in cards) + max(beside, default=0))
        tokens = query.input_tokens + output + (written.input_tokens + written.output_tokens if beside else 0)
        return await self._service.admission.admit(
            self._ask.key,
            tokens=calls * tokens,
            cost_usd=min(cost_usd, ceilings.cost_usd or cost_usd),
            policy=self.trace.policy,
            policy_usd_per_day=self.plan.policy.usd_per_day if self.plan else None,
        )

    def _writers(self, cards: Sequence[ExpertCard]) -> set[str]:
        """Who may be asked for an instruction, where one of these experts answers."""
        lanes = (self._service.lanes[card.name] for card in cards)
        guides = (lane.steering.guide(self._ask.body) for lane in lanes if lane.steering)
        return {guide.writer for guide in guides if guide and guide.writer}

    async def _find_cached(self) -> bool:
        if (
            not self.plan
            or not self.plan.policy.cache_ttl_s
            or not is_deterministic(self._ask.endpoint, self._ask.body)
        ):
            return False
        self._digest = digest_of(self._ask.key, self._ask.endpoint, self._ask.body)
        self.trace.cache = "miss"
        try:
            pieces = await self._service.cache.get(self._digest)
        except StateError:
            return False
        if pieces:
            self.trace.cache = "hit"
            self._digest = None
            self._replay = [reissue(piece, self._ask.id) for piece in pieces]
        return bool(pieces)

    async def _decide(self, plan: Plan) -> Decision:
        started = time.perf_counter()
        self.trace.decision = await decide(self._service, plan, self.query, self._ask.key)
        self.trace.decision_s = time.perf_counter() - started
        return self.trace.decision

    async def _decide_each(self, plan: Plan) -> list[Decision]:
        """A decision for each text. The trace has that of the first, and to whom each text went."""
        started = time.perf_counter()
        queries = [replace(self.query, text=text, input_tokens=0) for text in texts_of(self._ask.body)]
        down = self._service.health.down
        decisions = await asyncio.gather(*(plan.decide(query, down) for query in queries))
        self.trace.decision = decisions[0]
        self.trace.routed = [decision.expert for decision in decisions]
        self.trace.decision_s = time.perf_counter() - started
        return decisions

    @property
    def _request(self) -> ExpertRequest:
        ask = self._ask
        return ExpertRequest(id=ask.id, endpoint=ask.endpoint, body=ask.body, timeout_s=self.timeout_s, tenant=ask.key)

    def _call(self) -> Caller:
        self._caller = Caller(
            self._service.lanes,
            self.trace,
            self._service.metrics,
            deadline=time.monotonic() + self.timeout_s,
            ceiling_usd=self.plan.policy.max_cost_usd if self.plan else None,
            ceilings=self.plan.policy.ceilings if self.plan else None,
        )
        return self._caller

    def _run(self, decision: Decision | None) -> AsyncIterator[Part]:
        request, caller = self._request, self._call()
        if self.plan and decision:
            return self.plan.strategy.run(decision, request, caller)
        expert = cast("str", self.expert)
        if self._ask.endpoint == "embeddings":
            return _embed(caller, expert, request)
        return caller(expert, request, why=_NAMED)

    def _record(self) -> None:
        trace, service = self.trace, self._service
        trace.latency_s = time.perf_counter() - self._started
        entry = {**trace.to_json(), "key": trace.key, "session": trace.session, "text": trace.text}
        charges = self.reservation.settle(tokens=trace.tokens, cost_usd=trace.cost_usd)
        service.ledger.record(LEDGER, entry, charges)
        service.metrics.count_answer(trace)
        service.health.suspect(call.expert for call in trace.calls if call.outcome == "error")
        if trace.status == 200:
            self._remember()

    def _remember(self) -> None:
        """Keep the answer and the session's expert, in the background."""
        if not self.plan:
            return
        policy = self.plan.policy
        if self._digest and policy.cache_ttl_s and is_complete(self._kept):
            put = self._service.cache.put(self._digest, self._kept, ttl_s=policy.cache_ttl_s)
            self._service.spawn(put)
        if policy.session_ttl_s and self.query.session and self.trace.expert:
            session = (self._ask.key, policy.name, self.query.session)
            self._service.spawn(self._service.sessions.put(session, self.trace.expert, ttl_s=policy.session_ttl_s))


_NAMED = "the caller named it"


async def decide(service: Service, plan: Plan, query: Query, key: str) -> Decision:
    """The plan's decision; the session's expert stands first where the policy keeps sessions together."""
    decision = await plan.decide(query, service.health.down)
    if not plan.policy.session_ttl_s or not query.session:
        return decision
    try:
        held = await service.sessions.get((key, plan.policy.name, query.session))
    except StateError:
        return decision
    return stay_with(decision, held) if held else decision


async def _embed(caller: Caller, expert: str, request: ExpertRequest) -> AsyncIterator[Part]:
    yield await caller.embed(expert, request, why=_NAMED)
