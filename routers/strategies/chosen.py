"""Who of a decision's ranking takes part in a strategy, and how the one that has the last word answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace

from experts.expert import ExpertRequest, Part
from routers.contracts import Call, Candidate, Decision
from routers.policy import Fallbacks
from routers.strategies.replies import Ask, collect
from routers.strategies.single import SingleStrategy


def chosen(decision: Decision, experts: Sequence[str]) -> list[Candidate]:
    """The candidates that `experts` names, in that order, as far as the policy left them; the first ranked if none."""
    ranked = {candidate.expert: candidate for candidate in decision.ranking}
    return [ranked[expert] for expert in experts if expert in ranked] or [decision.ranking[0]]


async def last_word(
    decision: Decision, request: ExpertRequest, call: Call, ask: Ask, *, begin_s: float
) -> AsyncGenerator[Part, None]:
    """The parts of one expert's answer: as they come for a client that streams, else put together at the end.

    It has `begin_s` seconds to begin, and a whole answer begins when it is complete. Raises
    `ExpertError`, as `single` does without a fallback.
    """
    if not request.stream:
        by = asyncio.get_running_loop().time() + begin_s
        for part in (await collect(call, ask, request, by=by)).for_client(request, logprobs=False):
            yield part
        return

    def named(expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
        return call(expert, request, why=ask.why)

    only = replace(decision, ranking=[candidate for candidate in decision.ranking if candidate.expert == ask.expert])
    parts = SingleStrategy(Fallbacks(max_attempts=1, attempt_timeout_s=begin_s)).run(
        only, replace(request, body=ask.body), named
    )
    async with aclosing(parts):
        async for part in parts:
            yield replace(part, expert=ask.expert)
