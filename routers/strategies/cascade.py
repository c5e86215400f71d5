"""`cascade`: experts one after the other, cheapest first, until an answer is likely enough to be right.

FrugalGPT (arXiv 2305.05176), AutoMix (arXiv 2310.12963). An answer's score (`routers.strategies.acceptance`) is a
calibrated probability, and `threshold` the least that is accepted: `router-service policies tune` fits the one and
chooses the other for a quality target. The last step's answer goes out as it comes, for nobody is left to do better.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field, model_validator

from experts.errors import ExpertError
from experts.expert import ExpertRequest, Part
from routers.contracts import Call, Candidate, Decision
from routers.strategies.acceptance import Acceptance
from routers.strategies.base import StrategyOptions
from routers.strategies.chosen import chosen, last_word
from routers.strategies.replies import Ask, Reply, collect
from routers.strategies.several import SeveralStrategy
from routers.strategies.single import all_failed, another_may


class CascadeOptions(StrategyOptions):
    """The steps: all of `experts` in that order, else the first `steps` of the ranking, cheapest first.

    `logprobs`: ask experts whose card has that feature for their tokens' probabilities, which `acceptance` reads.
    """

    experts: Annotated[tuple[str, ...], Field(max_length=10)] = ()
    steps: Annotated[int, Field(ge=1, le=10)] = 3
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.8
    logprobs: bool = True
    acceptance: Acceptance = Acceptance()

    @model_validator(mode="after")
    def _agrees(self) -> CascadeOptions:
        if len(set(self.experts)) < len(self.experts):
            raise ValueError("an expert is named twice")
        if self.experts and "steps" in self.model_fields_set:
            raise ValueError("`experts` are the steps, all of them: leave `steps` out")
        return self


def cascade_steps(decision: Decision, options: CascadeOptions) -> Sequence[Candidate]:
    """Who is asked, in this order, at most."""
    if options.experts:
        return chosen(decision, options.experts)
    return sorted(decision.ranking[: options.steps], key=lambda candidate: candidate.cost_usd)


class CascadeStrategy(SeveralStrategy[CascadeOptions]):
    """Cheapest first, accepted by a calibrated score."""

    name = "cascade"
    options_type = CascadeOptions

    @property
    def experts(self) -> frozenset[str]:
        """Those named as steps."""
        return frozenset(self.options.experts)

    @property
    def most_calls(self) -> int:
        """Every step."""
        return len(self.options.experts) or self.options.steps

    async def answer(self, decision: Decision, request: ExpertRequest, call: Call) -> AsyncGenerator[Part, None]:
        """The parts of the first answer accepted, or of the last step's.

        A step that fails is passed over; where the last one fails, the rejected answer of the highest score is better
        than none. Raises `ExpertError` where nobody answered.
        """
        steps = cascade_steps(decision, self.options)
        state = _State(deadline=asyncio.get_running_loop().time() + request.timeout_s)
        for candidate in steps[:-1]:
            reply = await self._try(candidate, request, call, state)
            if reply is not None and state.scores[reply.expert] >= self.options.threshold:
                for part in self._shown(reply, request):
                    yield part
                return
        async with aclosing(self._last(decision, steps[-1], request, call, state)) as parts:
            async for part in parts:
                yield part

    async def _try(self, candidate: Candidate, request: ExpertRequest, call: Call, state: _State) -> Reply | None:
        """One step's reply with its score; None where it failed. A step has half of the time that is left."""
        now = asyncio.get_running_loop().time()
        adds = self._adds_logprobs(request) and "logprobs" in candidate.card.features
        body = {**request.body, "logprobs": True} if adds else request.body
        ask = Ask(expert=candidate.expert, body=body, why=f"cascade: {state.last}")
        try:
            by = now + self.attempt_s((state.deadline - now) / 2)
            reply = await collect(call, ask, request, by=by)
        except ExpertError as error:
            if not another_may(error):
                raise
            state.fail(candidate.expert, error)
            return None
        state.take(reply, self.options.acceptance.score(candidate.quality, reply.confidence))
        return reply

    async def _last(
        self, decision: Decision, candidate: Candidate, request: ExpertRequest, call: Call, state: _State
    ) -> AsyncGenerator[Part, None]:
        """The last step's answer as it comes; the best of those rejected where it fails before it has begun."""
        left = max(state.deadline - asyncio.get_running_loop().time(), 0.001)
        ask = Ask(expert=candidate.expert, body=request.body, why=f"cascade, last step: {state.last}")
        begun = False
        try:
            last = last_word(decision, replace(request, timeout_s=left), call, ask, begin_s=self.attempt_s(left))
            async with aclosing(last) as parts:
                async for part in parts:
                    begun = True
                    yield part
        except ExpertError as error:
            if begun or not another_may(error):
                raise
            if not state.replies:
                raise all_failed({**state.failures, candidate.expert: error}) from error
            best = max(state.replies, key=lambda reply: state.scores[reply.expert])
            for part in self._shown(best, request):
                yield part

    def _adds_logprobs(self, request: ExpertRequest) -> bool:
        return self.options.logprobs and request.endpoint == "chat/completions" and not request.body.get("logprobs")

    def _shown(self, reply: Reply, request: ExpertRequest) -> list[Part]:
        return reply.for_client(request, logprobs=self._adds_logprobs(request))


@dataclass(slots=True)
class _State:
    """What has come of one request so far; `last` is what was said of the step before."""

    deadline: float
    replies: list[Reply] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    failures: dict[str, ExpertError] = field(default_factory=dict)
    last: str = "ranked first"

    def take(self, reply: Reply, score: float) -> None:
        self.replies.append(reply)
        self.scores[reply.expert] = score
        self.last = f"{reply.expert} scored {score:.2f}"

    def fail(self, expert: str, error: ExpertError) -> None:
        self.failures[expert] = error
        self.last = f"{expert} failed: {error}"
