"""Who of a decision's ranking takes part in a strategy, and under what name its calls stand in the trace."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from experts.expert import ExpertRequest, Part
from routers.contracts import Call, Candidate, Decision


def chosen(decision: Decision, experts: Sequence[str]) -> list[Candidate]:
    """The candidates that `experts` names, in that order, as far as the policy left them; the first ranked if none."""
    ranked = {candidate.expert: candidate for candidate in decision.ranking}
    return [ranked[expert] for expert in experts if expert in ranked] or [decision.ranking[0]]


def labelled(call: Call, reason: str) -> Call:
    """`call`, with `reason` in the trace."""

    def named(expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
        return call(expert, request, why=reason)

    return named
