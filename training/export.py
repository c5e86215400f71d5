"""Observations from what the service really did: its ledger, joined with the feedback on its answers.

An answer becomes a row when exactly one expert gave it, its text was kept (`ROUTER_LEDGER_TEXT=true`) and somebody
rated it. What nobody rated says nothing of quality and is left out, as are mixtures, whose rating is no one expert's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

from routers.contracts import Observation
from training.observations import ObservedQuery
from training.prompts import split_of


class Export:
    """What became of the entries of a ledger: `rows`, and in `left_out` why the others made none.

    `ratings` are the last ones given, 0..1, by answer id and the API key that gave them: what a key says of another
    key's answer does not count. `experts` are those that there still are.
    """

    def __init__(
        self,
        entries: Iterable[Mapping[str, Any]],
        ratings: Mapping[tuple[str, str], float],
        experts: Container[str],
        test_share: float,
    ) -> None:
        self.rows: list[ObservedQuery] = []
        self.left_out: Counter[str] = Counter()
        for entry in entries:
            reason = _why_not(entry, ratings, experts)
            if reason:
                self.left_out[reason] += 1
            else:
                self.rows.append(_row(entry, ratings[entry["id"], entry["key"]], test_share))


def _why_not(entry: Mapping[str, Any], ratings: Mapping[tuple[str, str], float], experts: Container[str]) -> str | None:
    if entry["status"] != 200:
        return "failed"
    if (entry["id"], entry["key"]) not in ratings:
        return "not rated"
    if not entry["text"]:
        return "text not kept"
    answered = _answered(entry)
    if len(answered) != 1:
        return "not one expert's answer"
    return None if answered[0]["expert"] in experts else "expert no longer there"


def _row(entry: Mapping[str, Any], quality: float, test_share: float) -> ObservedQuery:
    (call,) = _answered(entry)
    observed = Observation(
        query_id=entry["id"],
        expert=call["expert"],
        quality=quality,
        cost_usd=call["cost_usd"],
        input_tokens=call["input_tokens"],
        output_tokens=call["output_tokens"],
        latency_s=call["latency_s"],
        observed_at=entry["at"],
    )
    split = split_of(entry["text"], test_share)
    return ObservedQuery(id=entry["id"], query=entry["text"], split=split, experts=[observed])


def _answered(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The calls that gave an answer: those without an error, and not beside another's."""
    return [call for call in entry["calls"] if not call["error"] and not call.get("beside")]
