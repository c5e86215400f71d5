"""Choose a policy's strategy and thresholds for a quality target, by evaluation: what `policies tune` does.

Every candidate is played on the train split with estimates by routers that had not seen the queries (cross-fitting),
choosing with the policy itself, its constraints and ceilings included: `single` over a range of what a right answer is
worth, and `cascade` over steps, chains of two of the best experts, and acceptance thresholds. A candidate keeps the
target if it does so in 95 of 100 bootstrap resamples of the queries: a mean alone would keep it half of the time by
luck, and the cheapest of many more often still. The cheapest that keeps it wins, and is measured once on the test
split, which nothing was chosen on.

A table says how right and how dear each expert's own answer was, so strategies that hand on one of these can be played
from it. For the others `NOT_PLAYED` says what the table lacks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experts.errors import ExpertUnavailableError
from experts.expert import ExpertRequest
from routers.artefact import read_header
from routers.ceilings import CostCeiling
from routers.contracts import Candidate, Decision, Estimates, Observations, Query
from routers.errors import NoExpertError, ObservationError
from routers.policy import Objective, Policy, RouterChoice, StrategyChoice, Target
from routers.registry import create_router
from routers.strategies import strategy_names
from routers.strategies.acceptance import Acceptance
from routers.strategies.cascade import CascadeOptions, cascade_steps
from training import metrics
from training.acceptance import fit_acceptance
from training.evaluation import column_means
from training.metrics import Interval
from training.observations import Table

OnStep = Callable[[str, int, int], None]

STRATEGIES = ("single", "cascade")
"""Those that can be played from a table."""
_NOT_PLAYED = {
    "vote": "a table says how right each answer was, not what it said, and so not which wrong answers agree",
    "mixture_of_agents": "what the aggregator makes of the proposals was not observed",
    "self_moa": "neither an expert's samples nor what the aggregator makes of them were observed",
}
NOT_PLAYED = {
    name: _NOT_PLAYED.get(name, "it makes calls that were not observed")
    for name in strategy_names()
    if name not in STRATEGIES
}
"""By strategy: why it cannot be played from a table."""

_FOLDS = 4
_WORTHS = tuple(float(f"{worth:.3g}") for worth in np.geomspace(1e-6, 1.0, 25))
"""USD that a right answer may be worth."""
_THRESHOLDS = (*(round(0.05 * step, 2) for step in range(1, 20)), 0.97, 0.99)
_STEPS = (2, 3)
_CHAINED = 5  # of the experts of the best means, any two make a chain, the cheaper one first
_NOBODY = (0.0, 0.0, 0.0)
_NOT_OBSERVED = (math.nan, math.nan, math.nan)
_LEAST_PLAYED = 0.5  # of the queries; a candidate that was not observed on as many is not judged
_RESAMPLES = 1000
_DIGITS = 9  # beyond which margins differ by rounding alone
_RISK = 5.0  # percent of the resamples in which a candidate may miss the target


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a candidate did: quality, cost (USD) and number of calls of every query [Q], NaN where not observed."""

    quality: metrics.Floats
    cost_usd: metrics.Floats
    calls: metrics.Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The policy chosen, whether it kept the target on train, and figures of the test split.

    `against` is the target's expert, else the one of the best train mean. `train_quality` is the policy's on train,
    `train_low` what it is at least in 95% of the resamples, both beside the `train_target` they are held against.
    `quality`, `cost_usd_per_1k`, `calls` are the policy's, `difference` and `share_of_cost` are against `against`.
    `acceptance_error` is the expected calibration error of a cascade's acceptance scores.
    """

    policy: Policy
    kept: bool
    tried: int
    not_tried: Mapping[str, str]
    against: str
    train_quality: float
    train_low: float
    train_target: float
    quality: Interval
    against_quality: Interval
    difference: Interval
    cost_usd_per_1k: Interval
    against_cost_usd_per_1k: Interval
    share_of_cost: float
    calls: float
    acceptance_error: Interval | None

    def __str__(self) -> str:
        kept = "kept" if self.kept else "NOT kept (this comes nearest)"
        gap = self.difference
        return (
            f"Target {self.train_target:.3f} {kept} on train: {self.train_quality:.3f}, with 95% confidence at least "
            f"{self.train_low:.3f}. On test: quality {self.quality.value:.3f}, {self.against} "
            f"{self.against_quality.value:.3f} (difference {gap.value:.3f}, {gap.low:.3f} to {gap.high:.3f}), at "
            f"{self.share_of_cost:.0%} of its cost."
        )


def policy_text(tuned: Tuned, path: Path) -> str:
    """The tuned policy as YAML for the file `path`, whose name it takes, with a comment that says what it did."""
    policy = tuned.policy.model_copy(update={"name": path.stem})
    fields = policy.model_dump(mode="json", exclude_defaults=True)
    if artefact := policy.router.artefact:
        fields["router"]["artefact"] = os.path.relpath(artefact, path.resolve().parent)
    return f"# {tuned}\n{yaml.safe_dump(fields, sort_keys=False)}"


def to_json(tuned: Tuned) -> dict[str, Any]:
    """Policy and figures."""
    return {**asdict(tuned), "policy": tuned.policy.model_dump(mode="json", exclude_defaults=True)}


def tune_policy(
    policy: Policy,
    table: Table,
    target: Target,
    *,
    strategies: Sequence[str] = STRATEGIES,
    seed: int = 0,
    on_step: OnStep = lambda step, done, total: None,
) -> Tuned:
    """The cheapest way to `target` for `policy`'s router and ceilings, by one of `strategies`.

    Raises `ObservationError` and `RouterConfigError`.
    """
    if len(table.train) < 2 * _FOLDS or not len(table.test):
        raise ObservationError("to tune a policy, a table needs rows of both splits, and some dozens to train on")
    options = _options(policy.router)
    against = _against(policy, target, table.train)
    estimated = _cross_fitted(policy.router.name, options, table.train, seed, on_step)
    acceptance = fit_acceptance(table.train, estimated.quality)
    candidates = [one for one in _candidates(policy, table.train, acceptance) if one.strategy.name in strategies]
    decided: dict[Objective, list[Decision | None]] = {}
    played = []
    for number, candidate in enumerate(candidates):
        on_step("try: policies", number, len(candidates))
        if candidate.objective not in decided:
            decided[candidate.objective] = decide(candidate, estimated, table.train)
        played.append(play(candidate, decided[candidate.objective], table.train))
    on_step("try: policies", len(candidates), len(candidates))
    goal = _goal(target, table.train, against)
    least = _least_margins(played, goal)
    place = _cheapest(played, least)
    chosen = candidates[place].model_copy(update={"target": target})
    fitted = create_router(policy.router.name, options).fit(table.train)
    on_test = fitted.estimate([Query(text=text) for text in table.test.texts], table.test.cards)
    decisions = decide(chosen, on_test, table.test)
    result = play(chosen, decisions, table.test)
    mean_goal = float(np.nanmean(goal))
    return _measured(
        result,
        table.test,
        against,
        acceptance_error=acceptance_error(chosen, decisions, table.test),
        policy=chosen,
        kept=bool(least[place] >= 0),
        tried=len(candidates),
        not_tried=NOT_PLAYED,
        train_quality=float(np.nanmean(played[place].quality)),
        train_low=mean_goal + float(least[place]),
        train_target=mean_goal,
    )


def _options(router: RouterChoice) -> dict[str, Any]:
    """With which the router is fitted anew: its own, or its artefact's."""
    return dict(read_header(router.artefact)["config"] if router.artefact else router.options)


def decide(policy: Policy, estimates: Estimates, observed: Observations) -> list[Decision | None]:
    """The policy's decision for every query of `observed`; None where it leaves the query to nobody."""

    def one(row: int) -> Decision | None:
        try:
            return policy.choose(estimates, observed.cards, Query(text=observed.texts[row]), row=row)
        except NoExpertError:
            return None

    return [one(row) for row in range(len(observed))]


def acceptance_error(policy: Policy, decisions: Sequence[Decision | None], observed: Observations) -> Interval | None:
    """The expected calibration error of the scores of all answers that a cascade may accept; None of other strategies.

    Those of a last step are not scored.
    """
    if policy.strategy.name != "cascade":
        return None
    options = CascadeOptions.model_validate(dict(policy.strategy.options))
    places = {card.name: e for e, card in enumerate(observed.cards)}
    pairs = [
        (
            _score(candidate, options, _Purse(policy, observed, row), places),
            observed.quality[row, places[candidate.expert]],
        )
        for row, decision in enumerate(decisions)
        if decision
        for candidate in cascade_steps(decision, options)[:-1]
    ]
    if not np.isfinite([quality for _, quality in pairs]).any():
        return None
    scores, qualities = np.array(pairs, np.float64).T
    draws = metrics.bootstrap(len(pairs), resamples=_RESAMPLES, seed=0)
    return _interval(metrics.calibration(scores[:, None], qualities[:, None], draws).error)


def play(policy: Policy, decisions: Sequence[Decision | None], observed: Observations) -> Played:
    """What `policy` (`single` or `cascade`) would have done with the queries of `observed`, within its ceilings."""
    cascade = (
        CascadeOptions.model_validate(dict(policy.strategy.options)) if policy.strategy.name == "cascade" else None
    )
    places = {card.name: e for e, card in enumerate(observed.cards)}
    rows = []
    for row, decision in enumerate(decisions):
        if decision is None:
            rows.append(_NOBODY)
            continue
        purse = _Purse(policy, observed, row)
        if cascade:
            steps = cascade_steps(decision, cascade)
            others = [one for one in decision.ranking if one not in steps][: policy.fallbacks.max_attempts - 1]
            rows.append(_play_cascade(steps, others, cascade, purse, places))
        else:
            rows.append(_play_single(decision.ranking[: policy.fallbacks.max_attempts], purse, places))
    quality, cost, calls = np.array(rows, np.float64).T
    return Played(quality=quality, cost_usd=cost, calls=calls)


class _Purse:
    """Makes the calls of one query as the service would, within the policy's ceilings, from what was observed."""

    def __init__(self, policy: Policy, observed: Observations, row: int) -> None:
        self.cost_usd, self.calls = 0.0, 0
        self._policy, self._observed, self._row = policy, observed, row
        limit = policy.ceilings.cost_usd
        self._ceiling = CostCeiling(limit) if limit else None

    def call(self, place: int) -> float | None:
        """The quality of an expert's answer, NaN where it was not observed, None where no ceiling lets it be asked."""
        most_calls, most_usd = self._policy.ceilings.calls, self._policy.max_cost_usd
        if most_calls is not None and self.calls >= most_calls:
            return None
        if most_usd is not None and self.calls and self.cost_usd >= most_usd:
            return None
        cost = float(self._observed.cost_usd[self._row, place])
        quality = float(self._observed.quality[self._row, place])
        if self._ceiling:
            request = chat_request(self._observed.texts[self._row])
            try:
                grant, bounded = self._ceiling.grant(self._observed.cards[place], request)
            except ExpertUnavailableError:
                return None
            if self._observed.output_tokens[self._row, place] > bounded.body["max_tokens"]:
                cost, quality = min(cost, grant.usd), min(quality, 0.0)  # cut short: not the answer observed
            self._ceiling.settle(grant, cost)
        self.calls, self.cost_usd = self.calls + 1, self.cost_usd + cost
        return quality

    def confidence(self, place: int) -> float | None:
        """How sure the expert was of its answer, where it told."""
        told = np.nan if self._observed.confidence is None else float(self._observed.confidence[self._row, place])
        return None if np.isnan(told) else told

    def paid(self, quality: float) -> tuple[float, float, float]:
        """The row: quality, cost, calls."""
        return quality, self.cost_usd, self.calls


def chat_request(text: str) -> ExpertRequest:
    """A query of a table as a client asks it."""
    return ExpertRequest(id="", endpoint="chat/completions", body={"messages": [{"role": "user", "content": text}]})


def _play_single(ranking: Sequence[Candidate], purse: _Purse, places: Mapping[str, int]) -> tuple[float, float, float]:
    """The first of the ranking that may be asked."""
    for candidate in ranking:
        quality = purse.call(places[candidate.expert])
        if quality is not None:
            return _NOT_OBSERVED if np.isnan(quality) else purse.paid(quality)
    return purse.paid(0.0)


def _play_cascade(
    steps: Sequence[Candidate],
    others: Sequence[Candidate],
    options: CascadeOptions,
    purse: _Purse,
    places: Mapping[str, int],
) -> tuple[float, float, float]:
    """The first answer accepted, or the last step's; where that may not be asked, the best of those rejected.

    Where no step may be asked, the first of the `others` that may answers.
    """
    rejected: list[tuple[float, float]] = []
    for candidate in steps:
        place = places[candidate.expert]
        quality = purse.call(place)
        if quality is None:
            continue
        if np.isnan(quality):
            return _NOT_OBSERVED
        score = _score(candidate, options, purse, places)
        if score >= options.threshold or candidate is steps[-1]:
            return purse.paid(quality)
        rejected.append((score, quality))
    if not rejected:
        return _play_single(others, purse, places)
    return purse.paid(max(rejected, key=lambda found: found[0])[1])


def _score(candidate: Candidate, options: CascadeOptions, purse: _Purse, places: Mapping[str, int]) -> float:
    """How likely the cascade thinks that the candidate's answer is right."""
    confidence = purse.confidence(places[candidate.expert]) if options.logprobs else None
    return options.acceptance.score(candidate.quality, confidence)


def _candidates(policy: Policy, train: Observations, acceptance: Acceptance) -> Iterator[Policy]:
    silent = policy.strategy.name == "cascade" and policy.strategy.options.get("logprobs") is False
    kept = {"logprobs": False} if silent else {}
    objectives = [Objective(quality=worth, cost=1, latency=policy.objective.latency) for worth in _WORTHS]
    for objective in objectives:
        yield _with(policy, objective, StrategyChoice(name="single"))
    means, costs = column_means(train.quality), column_means(train.cost_usd)
    allowed = [e for e, card in enumerate(train.cards) if policy.admits(card)]
    able = sorted(allowed, key=lambda e: -means[e])[:_CHAINED]
    chains = [(a,) for a in able] + [(a, b) for a in able for b in able if costs[a] < costs[b]]
    named = [[train.cards[e].name for e in chain] for chain in chains]
    shapes: list[tuple[Objective, dict[str, Any]]] = [(policy.objective, {"experts": chain}) for chain in named]
    shapes += [(objective, {"steps": steps}) for objective in objectives[::3] for steps in _STEPS]
    for objective, shape in shapes:
        for threshold in _THRESHOLDS:
            options = {**shape, **kept, "threshold": threshold, "acceptance": acceptance.model_dump()}
            yield _with(policy, objective, StrategyChoice(name="cascade", options=options))


def _with(policy: Policy, objective: Objective, strategy: StrategyChoice) -> Policy:
    return policy.model_copy(update={"objective": objective, "strategy": strategy})


def _against(policy: Policy, target: Target, train: Observations) -> int:
    """The column of the expert that the target speaks of, else of the best that the policy admits."""
    names = [card.name for card in train.cards]
    if target.expert:
        if target.expert not in names:
            raise ObservationError(f"the target's expert {target.expert!r} is not in the table")
        return names.index(target.expert)
    means = column_means(train.quality)
    admitted = [e for e, card in enumerate(train.cards) if policy.admits(card)]
    if not admitted:
        raise ObservationError(f"policy {policy.name!r} admits no expert of the table")
    return max(admitted, key=lambda e: means[e])


def _goal(target: Target, train: Observations, against: int) -> metrics.Floats:
    """The quality to keep, query by query [Q], so that differences are paired."""
    if target.quality is not None:
        return np.full(len(train), target.quality)
    return train.quality[:, against].astype(np.float64) - (target.within or 0.0)


def _least_margins(played: Sequence[Played], goal: metrics.Floats) -> metrics.Floats:
    """How far above the goal each candidate's mean quality is at least, in all but `_RISK` percent of the resamples."""
    margins = np.stack([p.quality for p in played], axis=1) - goal[:, None]
    means = metrics.weighted_mean(margins, metrics.bootstrap(len(goal), resamples=_RESAMPLES, seed=0))
    least: metrics.Floats = np.percentile(means[1:], _RISK, axis=0)
    judged = np.isfinite(margins).mean(axis=0) >= _LEAST_PLAYED
    return np.where(judged & np.isfinite(least), np.round(least, _DIGITS), -np.inf)


def _cheapest(played: Sequence[Played], least: metrics.Floats) -> int:
    """The cheapest that keeps the goal; the one that comes nearest where none does."""
    keeps = least >= 0
    cost = np.array([np.nanmean(p.cost_usd) if kept else np.inf for p, kept in zip(played, keeps, strict=True)])
    return int(cost.argmin()) if keeps.any() else int(least.argmax())


def _cross_fitted(name: str, options: dict[str, Any], train: Observations, seed: int, on_step: OnStep) -> Estimates:
    """Estimates of every train query by a router fitted on the other folds."""
    shape = train.quality.shape
    quality, cost, latency = (np.zeros(shape, np.float32) for _ in range(3))
    folds = np.random.default_rng(seed).permutation(len(train)) % _FOLDS
    for fold in range(_FOLDS):
        on_step(f"fit: {name}", fold, _FOLDS)
        here, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        router = create_router(name, options).fit(train.rows(others))
        found = router.estimate([Query(text=train.texts[i]) for i in here.tolist()], train.cards)
        quality[here], cost[here], latency[here] = found.quality, found.cost_usd, found.latency_s
    on_step(f"fit: {name}", _FOLDS, _FOLDS)
    return Estimates(quality=quality, cost_usd=cost, latency_s=latency)


def _measured(played: Played, test: Observations, against: int, **chosen: Any) -> Tuned:
    draws = metrics.bootstrap(len(test), resamples=_RESAMPLES, seed=0)
    both = np.isfinite(played.quality) & np.isfinite(test.quality[:, against])

    def mean(values: metrics.Floats) -> metrics.Floats:
        """Under each draw, over the queries on which both were observed."""
        return metrics.weighted_mean(np.where(both, values, np.nan), draws)

    other_quality, other_cost = (table[:, against].astype(np.float64) for table in (test.quality, test.cost_usd))
    return Tuned(
        **chosen,
        against=test.cards[against].name,
        quality=_interval(mean(played.quality)),
        against_quality=_interval(mean(other_quality)),
        difference=_interval(mean(played.quality - other_quality)),
        cost_usd_per_1k=_interval(1000 * mean(played.cost_usd)),
        against_cost_usd_per_1k=_interval(1000 * mean(other_cost)),
        share_of_cost=_ratio(float(played.cost_usd[both].sum()), float(other_cost[both].sum())),
        calls=float(np.nanmean(played.calls)),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _interval(values: metrics.Floats) -> Interval:
    found = Interval.of(values)
    if found is None:
        raise ObservationError("the test split has no observation of what is to be compared")
    return found
