"""`mixture_of_agents` and `self_moa`: several answers at once, then one expert writes the answer from them.

Mixture-of-Agents (arXiv 2406.04692) asks different experts and has one aggregate; Self-MoA (arXiv 2502.00674) samples
the single best expert several times instead, and found that better than mixing. One round of proposals, one aggregation
(`routers.strategies.aggregation`), which is streamed as it comes. Proposals that all say the same are the answer: there
is nothing to aggregate.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, TypeVar

from pydantic import Field, field_validator

from experts.errors import ExpertError
from experts.expert import ExpertRequest, Part
from routers.contracts import Call, Candidate, Decision
from routers.strategies.aggregation import PROMPT, aggregation_body
from routers.strategies.base import StrategyOptions
from routers.strategies.chosen import chosen, last_word
from routers.strategies.replies import Ask, Reply, collect_all
from routers.strategies.several import SeveralStrategy
from routers.strategies.single import all_failed, another_may
from routers.strategies.vote import sampled

_PROPOSALS_SHARE = 0.6
"""Of the request's time; the rest is the aggregator's."""


class AggregationOptions(StrategyOptions):
    """Who aggregates (`aggregator`; by default the expert ranked first) and with which `prompt`."""

    aggregator: str | None = None
    prompt: str = PROMPT

    @field_validator("prompt")
    @classmethod
    def _has_places(cls, value: str) -> str:
        question, answers = value.find("{question}"), value.find("{answers}")
        if not 0 <= question < answers:
            raise ValueError("must contain {question} and, after it, {answers}")
        return value


class MixtureOfAgentsOptions(AggregationOptions):
    """Who proposes: `experts`, else the first `proposers` of the ranking."""

    experts: tuple[str, ...] = ()
    proposers: Annotated[int, Field(ge=2, le=20)] = 3


class SelfMoaOptions(AggregationOptions):
    """Who proposes: `expert` (by default the one ranked first), `samples` times at `temperature`."""

    expert: str | None = None
    samples: Annotated[int, Field(ge=2, le=20)] = 4
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.7


OptionsT = TypeVar("OptionsT", bound=AggregationOptions)


class _Aggregating(SeveralStrategy[OptionsT]):
    """What both have in common: propose, then aggregate. A subclass says who is asked what."""

    def _asks(self, decision: Decision, request: ExpertRequest) -> list[Ask]:
        raise NotImplementedError

    async def answer(self, decision: Decision, request: ExpertRequest, call: Call) -> AsyncGenerator[Part, None]:
        """The aggregator's answer, as it comes.

        Proposals that fail or are late are left out. Where the aggregator fails before it has begun, the proposal that
        most agree on is the answer. Raises `ExpertError` where nobody proposed anything.
        """
        deadline = asyncio.get_running_loop().time() + request.timeout_s
        proposals = await self._propose(decision, request, call)
        if len({proposal.key for proposal in proposals}) == 1:
            for part in proposals[0].for_client(request, logprobs=False):
                yield part
            return
        left = max(deadline - asyncio.get_running_loop().time(), 0.001)
        parts = self._aggregate(decision, replace(request, timeout_s=left), call, proposals)
        async with aclosing(parts):
            async for part in parts:
                yield part

    async def _propose(self, decision: Decision, request: ExpertRequest, call: Call) -> list[Reply]:
        """The proposals in the order of their asks, not of their coming."""
        by = asyncio.get_running_loop().time() + self.attempt_s(request.timeout_s * _PROPOSALS_SHARE)
        asks = self._asks(decision, request)
        found: dict[int, Reply] = {}
        failures: dict[str, ExpertError] = {}
        async with aclosing(collect_all(call, asks, request, by=by)) as replies:
            async for place, reply in replies:
                if isinstance(reply, Reply):
                    found[place] = reply
                elif another_may(reply):
                    failures[f"{asks[place].expert} (proposal {place + 1})"] = reply
                else:
                    raise reply
        if not found:
            raise all_failed(failures)
        return [found[place] for place in sorted(found)]

    async def _aggregate(
        self, decision: Decision, request: ExpertRequest, call: Call, proposals: Sequence[Reply]
    ) -> AsyncGenerator[Part, None]:
        body = aggregation_body(request.body, [proposal.shown for proposal in proposals], self.options.prompt)
        why = f"aggregates {len(proposals)} proposals"
        ask, begun = Ask(expert=self._aggregator(decision).expert, body=body, why=why), False
        try:
            last = last_word(decision, request, call, ask, begin_s=self.attempt_s(request.timeout_s))
            async with aclosing(last) as parts:
                async for part in parts:
                    begun = True
                    yield part
        except ExpertError:
            if begun:
                raise
            for part in _most_agreed(proposals).for_client(request, logprobs=False):
                yield part

    def _aggregator(self, decision: Decision) -> Candidate:
        return chosen(decision, [self.options.aggregator] if self.options.aggregator else [])[0]


class MixtureOfAgentsStrategy(_Aggregating[MixtureOfAgentsOptions]):
    """Different experts propose, one aggregates."""

    name = "mixture_of_agents"
    options_type = MixtureOfAgentsOptions

    @property
    def experts(self) -> frozenset[str]:
        """The proposers named, and the aggregator."""
        return frozenset({*self.options.experts, *filter(None, [self.options.aggregator])})

    @property
    def least_calls(self) -> int:
        """Every proposal, and the aggregation."""
        return (len(self.options.experts) or self.options.proposers) + 1

    def _asks(self, decision: Decision, request: ExpertRequest) -> list[Ask]:
        named = self.options.experts
        proposers = chosen(decision, named) if named else decision.ranking[: self.options.proposers]
        return [
            Ask(expert=proposer.expert, body=request.body, why=f"proposal {number}")
            for number, proposer in enumerate(proposers, 1)
        ]


class SelfMoaStrategy(_Aggregating[SelfMoaOptions]):
    """One expert proposes several times, then one aggregates."""

    name = "self_moa"
    options_type = SelfMoaOptions

    @property
    def experts(self) -> frozenset[str]:
        """The expert sampled, and the aggregator."""
        return frozenset(filter(None, [self.options.expert, self.options.aggregator]))

    @property
    def least_calls(self) -> int:
        """Every sample, and the aggregation."""
        return self.options.samples + 1

    def _asks(self, decision: Decision, request: ExpertRequest) -> list[Ask]:
        expert = chosen(decision, [self.options.expert] if self.options.expert else [])[0].expert
        return [
            Ask(expert=expert, body=sampled(request.body, n, self.options.temperature), why=f"sample {n + 1}")
            for n in range(self.options.samples)
        ]


def _most_agreed(proposals: Sequence[Reply]) -> Reply:
    """The first of the proposals that most others say too."""
    keys = [proposal.key for proposal in proposals]
    return max(proposals, key=lambda proposal: keys.count(proposal.key))
