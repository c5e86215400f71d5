"""Policies: what an operator wants of routing, in YAML, and the choice that follows from estimates.

    name: auto
    objective: {quality: 0.001}          # a right answer is worth a tenth of a cent
    constraints: {max_cost_usd: 0.01, min_quality: 0.5, deny: {tags: [experimental]}}
    router: {name: knn, artefact: ../routers/pocket-knn}
    fallbacks: {max_attempts: 3}

A policy that contradicts itself is refused when it is read, one that names experts the fleet lacks by `check_fleet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experts.cards import ExpertCard, Feature
from routers.contracts import Candidate, Decision, Estimates, FloatArray, Query
from routers.errors import NoExpertError, RouterConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bound = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# Estimates are the same alone and in a batch up to float rounding. Choosing looks at fewer digits than that, so that
# experts which are equal tie, and ties are settled by rule.
_DIGITS = 5


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Objective(_Model):
    """The utility of an expert for a query: quality * `quality` - USD * `cost` - seconds * `latency`.

    With `cost` 1, utility is in USD: `quality` is what a right answer (quality 1 instead of 0) is worth, `latency` what
    a second of waiting costs. Only the ratios count: all three times ten choose the same. `cost: 0` takes the best at
    any price, `quality: 0` the cheapest; equal utility is settled by quality, then cost, then name.
    """

    quality: Weight = 0.01
    cost: Weight = 1.0
    latency: Weight = 0.0

    @model_validator(mode="after")
    def _wants_something(self) -> Self:
        if not (self.quality or self.cost or self.latency):
            raise ValueError("objective: at least one weight must be above 0, else every expert is as good as any")
        return self


class Selection(_Model):
    """Experts by name or by tag: one that matches either is selected."""

    names: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.names or self.tags)

    def has(self, card: ExpertCard) -> bool:
        """Whether `card` is selected."""
        return card.name in self.names or not self.tags.isdisjoint(card.tags)


class Constraints(_Model):
    """What an expert must keep to, for one request and by estimate.

    `allow` (when given) and `deny` select experts. `max_cost_usd` and `max_latency_s` are hard, as are the context
    length, endpoint, modalities and features that the request needs. `min_quality` gives way when no expert reaches it
    (`floor: relax`): the best of those left answers, and the decision says so; `floor: strict` refuses instead.
    """

    max_cost_usd: Bound | None = None
    max_latency_s: Bound | None = None
    min_quality: Annotated[float, Field(gt=0, le=1)] | None = None
    floor: Literal["relax", "strict"] = "relax"
    allow: Selection = Selection()
    deny: Selection = Selection()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if both := sorted(self.allow.names & self.deny.names):
            raise ValueError(f"constraints: {both} are both allowed and denied")
        if both := sorted(self.allow.tags & self.deny.tags):
            raise ValueError(f"constraints: the tags {both} are both allowed and denied")
        return self


class RouterChoice(_Model):
    """Which router estimates: by name, with `options` to fit it with, or fitted, in the folder `artefact`.

    A relative folder is relative to the policy's file.
    """

    name: str = "knn"
    options: Mapping[str, Any] = {}
    artefact: Path | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.options and self.artefact:
            raise ValueError("router: an artefact has its options in it; give `options` or `artefact`")
        return self


class StrategyChoice(_Model):
    """What is done with the decision: a strategy's name and its own options."""

    name: str = "single"
    options: Mapping[str, Any] = {}


class Fallbacks(_Model):
    """Who answers when the chosen expert fails before its answer has begun.

    At most `max_attempts` experts are tried, the chosen one included: after it those of `experts` in that order (as far
    as the request allows them), then as ranked. An attempt has `attempt_timeout_s` to begin its answer (a plain answer
    begins when it is complete); by default half of the time that the request has left, the last attempt all of it.
    Those that a strategy asks together, or one after the other, are one attempt, with `attempt_timeout_s` for each.
    """

    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    experts: tuple[str, ...] = ()
    attempt_timeout_s: Bound | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.experts and self.max_attempts == 1:
            raise ValueError("fallbacks: `max_attempts: 1` leaves no attempt to the experts named")
        if len(set(self.experts)) < len(self.experts):
            raise ValueError("fallbacks: an expert is named twice")
        return self


class Ceilings(_Model):
    """What one request may use at most, whatever its experts do; its time is bounded by the policy's `timeout_s`.

    `calls` counts every call of an expert. `cost_usd` holds for all calls together: before each, the most that it can
    cost is set aside, and the call bounded to that; a call that it does not leave room for is not made.
    """

    calls: Annotated[int, Field(ge=1)] | None = None
    cost_usd: Bound | None = None


class Target(_Model):
    """The quality that `router-service policies tune` looks for the cheapest way to.

    That of the best single expert, or of `expert`, less `within` (below 0: so much above it); or `quality` itself.
    """

    expert: str | None = None
    within: Annotated[float, Field(ge=-1, le=1)] | None = None
    quality: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.within is None) == (self.quality is None):
            raise ValueError("target: name `within`, how far below the best single expert, or `quality`")
        if self.expert and self.within is None:
            raise ValueError("target: `expert` is whose quality `within` is about; `quality` stands by itself")
        return self


class Budget(_Model):
    """What may be spent under this policy by all its callers together; then requests are refused until the next day."""

    usd_per_day: Bound | None = None


class Policy(_Model):
    """One way of routing. Times are seconds; `null` is none.

    `serves` says which kind of request: `generation` chooses among experts that answer, `embeddings` among those that
    embed, for each text of a request.

    `session_ttl_s` keeps a session with its expert so long after its last request; `cache_ttl_s` is how long an answer
    may be given again to the same request; `timeout_s` bounds a request.
    """

    name: Name
    description: str = ""
    serves: Literal["generation", "embeddings"] = "generation"
    objective: Objective = Objective()
    constraints: Constraints = Constraints()
    router: RouterChoice = RouterChoice()
    strategy: StrategyChoice = StrategyChoice()
    fallbacks: Fallbacks = Fallbacks()
    target: Target | None = None
    ceilings: Ceilings = Ceilings()
    budget: Budget = Budget()
    session_ttl_s: Bound | None = None
    cache_ttl_s: Bound | None = None
    timeout_s: Bound | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if denied := sorted(self.constraints.deny.names & set(self.fallbacks.experts)):
            raise ValueError(f"fallbacks: {denied} are denied by the constraints")
        names = self.constraints.allow.names
        if names and not self.constraints.allow.tags and (others := sorted(set(self.fallbacks.experts) - names)):
            raise ValueError(f"fallbacks: {others} are not among the experts allowed")
        return self

    @property
    def max_cost_usd(self) -> float | None:
        """What one request may cost, by estimate."""
        return self.constraints.max_cost_usd

    @property
    def usd_per_day(self) -> float | None:
        """What all requests of a day may cost."""
        return self.budget.usd_per_day

    def check_fleet(self, cards: Sequence[ExpertCard]) -> None:
        """Raise `RouterConfigError` if the policy names an expert or tag that no card has."""
        names, tags = {card.name for card in cards}, {tag for card in cards for tag in card.tags}
        selections = (self.constraints.allow, self.constraints.deny)
        targets = {self.target.expert} if self.target and self.target.expert else set()
        lost = {*self.fallbacks.experts, *targets}.union(*(s.names for s in selections)) - names
        lost_tags = frozenset().union(*(s.tags for s in selections)) - tags
        if lost or lost_tags:
            what = ", ".join([*map(repr, sorted(lost)), *(f"tag {tag!r}" for tag in sorted(lost_tags))])
            raise RouterConfigError(f"policy {self.name!r} speaks of {what}, which the fleet has not")

    def admits(self, card: ExpertCard) -> bool:
        """Whether `allow` and `deny` leave the expert, whatever the request."""
        return self._barred(card) is None

    def choose(self, estimates: Estimates, cards: Sequence[ExpertCard], query: Query, *, row: int = 0) -> Decision:
        """Rank `cards` for `query`, whose estimates are in `row`. Raises `NoExpertError` where none is left."""
        candidates = self._candidates(estimates, row, cards)
        removed = {
            card.name: why
            for card, candidate in zip(cards, candidates, strict=True)
            if (why := self._barred(card) or lacking(card, query) or self._beyond(candidate))
        }
        kept = [candidate for candidate in candidates if candidate.expert not in removed]
        under_floor = {c.expert: why for c in kept if (why := self._under_floor(c))}
        relaxed = len(under_floor) == len(kept) and self.constraints.floor == "relax"
        if not relaxed:
            removed |= under_floor
            kept = [candidate for candidate in kept if candidate.expert not in under_floor]
        if not kept:
            raise _no_expert(f"policy {self.name!r} has no expert for this request", removed)
        ranking = sorted(kept, key=_by_quality if relaxed else _by_score)
        return Decision(
            policy=self.name,
            router=self.router.name,
            strategy=self.strategy.name,
            ranking=self._with_fallbacks(ranking),
            removed=removed,
            reason=self._reason(ranking, relaxed=relaxed, removed=len(removed)),
        )

    def _candidates(self, estimates: Estimates, row: int, cards: Sequence[ExpertCard]) -> list[Candidate]:
        quality = [round(value, _DIGITS) for value in estimates.quality[row].tolist()]
        cost, latency = _rounded(estimates.cost_usd[row]), _rounded(estimates.latency_s[row])
        errors = [None] * len(cards) if estimates.uncertainty is None else estimates.uncertainty[row].tolist()
        weights = self.objective
        return [
            Candidate(
                expert=card.name,
                card=card,
                context_length=card.context_length,
                score=quality[e] * weights.quality - cost[e] * weights.cost - latency[e] * weights.latency,
                quality=quality[e],
                cost_usd=cost[e],
                latency_s=latency[e],
                uncertainty=errors[e],
            )
            for e, card in enumerate(cards)
        ]

    def _barred(self, card: ExpertCard) -> str | None:
        if self.constraints.deny.has(card):
            return "it is denied"
        if self.constraints.allow and not self.constraints.allow.has(card):
            return "it is not among the experts allowed"
        return None

    def _beyond(self, candidate: Candidate) -> str | None:
        most_cost, most_latency = self.constraints.max_cost_usd, self.constraints.max_latency_s
        if most_cost is not None and candidate.cost_usd > most_cost:
            return f"its estimated cost of {_usd(candidate.cost_usd)} is above {_usd(most_cost)}"
        if most_latency is not None and candidate.latency_s > most_latency:
            return f"its estimated latency of {candidate.latency_s:.3g} s is above {most_latency:g} s"
        return None

    def _under_floor(self, candidate: Candidate) -> str | None:
        floor = self.constraints.min_quality
        if floor is None or candidate.quality >= floor:
            return None
        return f"its estimated quality of {candidate.quality:.2f} is below {floor:g}"

    def _with_fallbacks(self, ranking: Sequence[Candidate]) -> list[Candidate]:
        """The best, then the fallbacks named, then the others in their order."""
        named = {expert: place for place, expert in enumerate(self.fallbacks.experts)}
        return [ranking[0], *sorted(ranking[1:], key=lambda candidate: named.get(candidate.expert, len(named)))]

    def _reason(self, ranking: Sequence[Candidate], *, relaxed: bool, removed: int) -> str:
        first, others = ranking[0], ranking[1:]
        best = "best quality" if relaxed else "best utility"
        parts = [f"{_numbers(first)}, {best} of {len(ranking)}" if others else f"{_numbers(first)}, the only one left"]
        if relaxed:
            parts.append(f"none reaches the quality floor of {self.constraints.min_quality:g}")
        if others:
            parts.append(f"next {_numbers(others[0])}")
        if removed:
            parts.append(f"{removed} removed")
        return "; ".join(parts)


def lacking(card: ExpertCard, query: Query) -> str | None:
    """What `card` lacks of what `query` needs, or None where it can answer."""
    if (card.kind == "embedding") != (query.endpoint == "embeddings"):
        return f"it does not serve {query.endpoint}"
    if missing := query.needs_modalities - card.modalities:
        return f"it does not take {' or '.join(sorted(missing))}"
    if missing_features := query.needs_features - card.features:
        return f"it does not offer {' or '.join(sorted(missing_features))}"
    needed = query.input_tokens + (query.max_output_tokens or 0)
    if needed > card.context_length:
        return f"its context of {card.context_length} tokens is too short for about {needed}"
    return None


_FIELDS: Mapping[Feature, str] = {"tools": "tools", "json": "response_format", "logprobs": "logprobs"}
"""The field of a request that asks for a feature."""


def check_able(card: ExpertCard, query: Query) -> None:
    """Raise `NoExpertError` if the expert of `card`, named by the caller, cannot do what `query` needs."""
    if why := lacking(card, query):
        missing = sorted(query.needs_features - card.features)
        param = _FIELDS[missing[0]] if missing else None
        raise _no_expert("the expert named cannot answer this request", {card.name: why}, param=param)


def load_policy(path: Path) -> Policy:
    """The policy in a YAML file, which is named as the policy is. Raises `RouterConfigError`."""
    try:
        given = yaml.safe_load(path.read_text("utf-8"))
        policy = Policy.model_validate(given)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise RouterConfigError(f"policy file {str(path)!r}: {error}") from error
    if policy.name != path.stem:
        raise RouterConfigError(f"policy file {str(path)!r} holds the policy {policy.name!r}: names must be the same")
    artefact = policy.router.artefact
    if artefact is None:
        return policy
    found = (path.parent / artefact.expanduser()).resolve()
    return policy.model_copy(update={"router": policy.router.model_copy(update={"artefact": found})})


def load_policies(folder: Path) -> dict[str, Policy]:
    """Every policy of `folder` (*.yaml) by name. Raises `RouterConfigError`, also where there is none."""
    policies = {path.stem: load_policy(path) for path in sorted(folder.glob("*.yaml"))}
    if not policies:
        raise RouterConfigError(f"folder {str(folder)!r} has no policy (*.yaml)")
    return policies


def _no_expert(message: str, removed: Mapping[str, str], *, param: str | None = None) -> NoExpertError:
    names: dict[str, list[str]] = {}
    for name, why in removed.items():
        names.setdefault(why, []).append(name)
    told = "; ".join(f"{', '.join(those)}: {why}" for why, those in names.items())
    return NoExpertError(f"{message} ({told})" if told else message, dict(removed), param=param)


def _by_score(candidate: Candidate) -> tuple[float, float, float, str]:
    return -candidate.score, -candidate.quality, candidate.cost_usd, candidate.expert


def _by_quality(candidate: Candidate) -> tuple[float, float, str]:
    return -candidate.quality, candidate.cost_usd, candidate.expert


def _numbers(candidate: Candidate) -> str:
    return f"{candidate.expert}: estimated quality {candidate.quality:.2f} at {_usd(candidate.cost_usd)}"


def _usd(amount: float) -> str:
    """Two significant digits, never in powers of ten: $0.000012."""
    return f"${np.format_float_positional(amount, precision=2, fractional=False, trim='-')}"


def _rounded(values: FloatArray) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
