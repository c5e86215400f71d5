"""The contracts of routing: queries, observations, estimates, routers, decisions, strategies.

Estimating (a `Router`) is apart from choosing (a `Policy`), and choosing from executing (a `Strategy`), so that any
router works with any policy and any strategy. Arrays are float32 of shape [B queries, E experts] unless said otherwise.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from experts.cards import ExpertCard, Feature, Modality
from experts.expert import Endpoint, ExpertRequest, Part

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is routed. A query never carries its true task label.

    `text` is what routers embed: the whole conversation condensed, not only its last message. `input_tokens` is an
    estimate by length (4 characters a token) until an expert has counted; `max_output_tokens` is the caller's bound on
    each of its `choices`.
    """

    text: str
    endpoint: Endpoint = "chat/completions"
    messages: Sequence[Mapping[str, Any]] = ()
    session: str | None = None
    tags: frozenset[str] = frozenset()
    needs_features: frozenset[Feature] = frozenset()
    needs_modalities: frozenset[Modality] = frozenset({"text"})
    input_tokens: int = 0
    max_output_tokens: int | None = None
    choices: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one expert was observed to do with one query. Quality in 0..1, cost in USD, latency in seconds.

    `confidence` in 0..1 is the geometric mean probability of its answer's tokens. `None` stands for what was not
    measured.
    """

    query_id: str
    expert: str
    quality: float
    cost_usd: float
    input_tokens: int | None = None
    output_tokens: int | None = None
    latency_s: float | None = None
    observed_at: float | None = None
    confidence: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """Many observations as a table: Q queries by the experts of `cards`, NaN where a pair was not observed.

    `confidence` is None where no expert told any.

    `tasks` are the data's own labels: for evaluation and offline tables, never an input of `Router.estimate`.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    tasks: Sequence[str]
    cards: Sequence[ExpertCard]
    quality: FloatArray
    cost_usd: FloatArray
    input_tokens: FloatArray
    output_tokens: FloatArray
    latency_s: FloatArray
    confidence: FloatArray | None = None

    def rows(self, index: npt.NDArray[np.intp]) -> Observations:
        """The queries at `index` ([n] integers), in that order."""
        return Observations(
            ids=[self.ids[i] for i in index],
            texts=[self.texts[i] for i in index],
            tasks=[self.tasks[i] for i in index],
            cards=self.cards,
            quality=self.quality[index],
            cost_usd=self.cost_usd[index],
            input_tokens=self.input_tokens[index],
            output_tokens=self.output_tokens[index],
            latency_s=self.latency_s[index],
            confidence=None if self.confidence is None else self.confidence[index],
        )

    def without(self, expert: str) -> Observations:
        """The same table without one expert's column."""
        keep = [i for i, card in enumerate(self.cards) if card.name != expert]
        return Observations(
            ids=self.ids,
            texts=self.texts,
            tasks=self.tasks,
            cards=[self.cards[i] for i in keep],
            quality=self.quality[:, keep],
            cost_usd=self.cost_usd[:, keep],
            input_tokens=self.input_tokens[:, keep],
            output_tokens=self.output_tokens[:, keep],
            latency_s=self.latency_s[:, keep],
            confidence=None if self.confidence is None else self.confidence[:, keep],
        )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """What a router expects: quality in 0..1, cost in USD, latency in seconds, each [B, E]; never NaN.

    `uncertainty` is the standard error of `quality`, where the router knows one.
    """

    quality: FloatArray
    cost_usd: FloatArray
    latency_s: FloatArray
    uncertainty: FloatArray | None = None


class Router(Protocol):
    """Estimates quality, cost and latency of every expert for a batch of queries; choosing is the policy's work.

    A query's estimates are the same alone and in a batch; the same seed and data give the same router. `estimate` takes
    any cards: those never observed are estimated from their card, removed ones are simply not passed.
    """

    @property
    def name(self) -> str:
        """The name it is registered by."""
        ...

    def fit(self, observations: Observations) -> Self:
        """Learn from `observations` (all of it: callers split). Returns itself."""
        ...

    def add_expert(self, card: ExpertCard, observations: Observations | None = None) -> None:
        """Learn of a new expert from its card and, where there are any, a few observations, without refitting."""
        ...

    def estimate(self, queries: Sequence[Query], cards: Sequence[ExpertCard]) -> Estimates:
        """Estimates of shape [len(queries), len(cards)]. Thread safe. Raises `RouterNotFittedError`."""
        ...

    def save(self, folder: Path) -> None:
        """Write `router.json` (name, config, cards) and `router.safetensors` (arrays) into `folder`."""
        ...

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The router that `save` wrote."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One expert of a decision with its card and its numbers; `score` is the utility by the policy's objective.

    `context_length` is its card's, in tokens.
    """

    expert: str
    card: ExpertCard
    context_length: int
    score: float
    quality: float
    cost_usd: float
    latency_s: float
    uncertainty: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a policy chose: the ranking (best first), what each constraint removed, and one sentence that says why."""

    policy: str
    router: str
    strategy: str
    ranking: Sequence[Candidate]
    removed: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def expert(self) -> str:
        """The expert that stands first."""
        return self.ranking[0].expert


class Call(Protocol):
    """Calls one expert for a strategy. The service behind it meters, records and bounds the call."""

    def __call__(self, expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
        """The expert's reply, part by part; raises what `Expert.generate` raises. `why` goes into the trace."""
        ...


class Strategy(Protocol):
    """What is done with a decision. Holds no state of a request and knows nothing of the service but `call`."""

    @property
    def name(self) -> str:
        """The name it is registered by."""
        ...

    @property
    def most_calls(self) -> int:
        """How many calls it makes at most, where nothing fails."""
        ...

    def run(self, decision: Decision, request: ExpertRequest, call: Call) -> AsyncIterator[Part]:
        """Answer `request` by calling experts of `decision`; the parts go to the client as they come."""
        ...
