"""What happened to one request: written while it happens, read for headers, the body's trace and the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from experts.expert import Endpoint, Usage
from routers.contracts import Candidate, Decision


@dataclass(slots=True)
class CallRecord:
    """One call of one expert. Times are seconds, cost is USD.

    `outcome` tells whose fault an `error` is: the request was `refused` (the client's), the call was `not_sent` (no
    ceiling or time was left for it), it was `cut_off` (nobody waits for it any more), or the expert failed.
    `asked` is the last message, where it is not the client's own (a strategy wrote it) and the ledger may keep texts.
    `estimated` says that the expert never told its usage (the call was cut off, or its API tells none), so that it was
    counted from outside. `beside` marks a call that answers nothing: a gate's instruction was written for another call.
    """

    expert: str
    why: str
    beside: bool = False
    usage: Usage = field(default_factory=Usage)
    cost_usd: float = 0.0
    latency_s: float = 0.0
    first_part_s: float | None = None
    parts: int = 0
    estimated: bool = False
    outcome: Literal["ok", "refused", "not_sent", "cut_off", "error"] = "ok"
    error: str | None = None
    asked: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return {
            "expert": self.expert,
            "why": self.why,
            **({"beside": True} if self.beside else {}),
            **({"asked": self.asked} if self.asked is not None else {}),
            "input_tokens": self.usage.input_tokens,
            "output_tokens": self.usage.output_tokens,
            "cached_input_tokens": self.usage.cached_input_tokens,
            "cost_usd": self.cost_usd,
            "latency_s": self.latency_s,
            "first_part_s": self.first_part_s,
            "estimated": self.estimated,
            "error": self.error,
        }


@dataclass(slots=True, kw_only=True)
class Trace:
    """One request. `at` is Unix time; `status` the HTTP status, 499 where the client hung up.

    Where the texts of a request are routed one by one, `routed` has each one's expert and `decision` is the first's.
    """

    id: str
    request_id: str
    at: float
    key: str
    endpoint: Endpoint | Literal["search"]
    model: str
    stream: bool
    policy: str | None = None
    decision: Decision | None = None
    routed: list[str] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    answered_by: str | None = None
    cache: Literal["hit", "miss", "off"] = "off"
    text: str | None = None
    session: str | None = None
    decision_s: float | None = None
    first_part_s: float | None = None
    latency_s: float = 0.0
    status: int = 0
    error: str | None = None

    @property
    def cost_usd(self) -> float:
        """What all calls cost together."""
        return sum(call.cost_usd for call in self.calls)

    @property
    def tokens(self) -> int:
        """What all calls read and wrote together."""
        return sum(call.usage.input_tokens + call.usage.output_tokens for call in self.calls)

    @property
    def expert(self) -> str | None:
        """Who answered, or was asked last."""
        asked = (call.expert for call in reversed(self.calls) if not call.beside)
        return self.answered_by or next(asked, None)

    def to_json(self) -> dict[str, Any]:
        """The trace as it goes into the answer's body and the ledger."""
        return {
            "id": self.id,
            "request_id": self.request_id,
            "at": self.at,
            "endpoint": self.endpoint,
            "model": self.model,
            "stream": self.stream,
            "policy": self.policy,
            "expert": self.expert,
            "decision": decision_to_json(self.decision) if self.decision else None,
            **({"routed": self.routed} if self.routed else {}),
            "calls": [call.to_json() for call in self.calls],
            "cache": self.cache,
            "cost_usd": self.cost_usd,
            "decision_s": self.decision_s,
            "first_part_s": self.first_part_s,
            "latency_s": self.latency_s,
            "status": self.status,
            "error": self.error,
        }


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """A decision as JSON, best expert first."""
    return {
        "policy": decision.policy,
        "router": decision.router,
        "strategy": decision.strategy,
        "ranking": [_candidate_to_json(candidate) for candidate in decision.ranking],
        "removed": dict(decision.removed),
        "reason": decision.reason,
    }


def _candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "expert": candidate.expert,
        "score": candidate.score,
        "quality": candidate.quality,
        "cost_usd": candidate.cost_usd,
        "latency_s": candidate.latency_s,
        "uncertainty": candidate.uncertainty,
    }
