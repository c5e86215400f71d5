"""Choose a policy's strategy and thresholds for a quality target, by evaluation: what `policies tune` does.

Every candidate is played on the train split with estimates by routers that had not seen the queries (cross-fitting),
choosing with the policy itself, its constraints included: `single` over a range of what a right answer is worth, and
`cascade` over steps, chains of two of the best experts, and acceptance thresholds. The cheapest that
keeps the target wins, and is measured once on the test split, which nothing was chosen on. Strategies whose answer is
none of the experts' own (`vote`, `mixture_of_agents`, `self_moa`) cannot be played from a table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from routers.contracts import Candidate, Decision, Estimates, Observations, Query
from routers.errors import NoExpertError, ObservationError
from routers.policy import Objective, Policy, StrategyChoice, Target
from routers.registry import create_router
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

_FOLDS = 4
_WORTHS = tuple(float(f"{worth:.3g}") for worth in np.geomspace(1e-6, 1.0, 25))
"""USD that a right answer may be worth."""
_THRESHOLDS = (*(round(0.05 * step, 2) for step in range(1, 20)), 0.97, 0.99)
_STEPS = (2, 3)
_CHAINED = 5  # of the experts of the best means, any two make a chain, the cheaper one first
_ONE = {"steps": 1}  # `single` is a cascade of one step
_NOBODY = (0.0, 0.0, 0)
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a candidate did: quality and cost (USD) of every query [Q], and the mean number of calls."""

    quality: metrics.Floats
    cost_usd: metrics.Floats
    calls: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The policy chosen, whether it kept the target on train, and figures of the test split.

    `best_single` is the expert of the best train mean; `quality` and `cost_usd_per_1k` are the policy's,
    `share_of_cost` is against the best single expert's.
    """

    policy: Policy
    kept: bool
    tried: int
    best_single: str
    train_quality: float
    train_target: float
    quality: Interval
    best_quality: Interval
    difference: Interval
    cost_usd_per_1k: Interval
    best_cost_usd_per_1k: Interval
    share_of_cost: float
    calls: float

    def __str__(self) -> str:
        kept = "kept" if self.kept else "NOT kept: this is the best there is"
        return (
            f"Target {self.train_target:.3f} {kept} on train ({self.train_quality:.3f}). On test: quality "
            f"{self.quality.value:.3f} against {self.best_quality.value:.3f} of {self.best_single}, at "
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
    """The cheapest way to `target` for `policy`'s router, by one of `strategies`.

    Raises `ObservationError` and `RouterConfigError`.
    """
    if len(table.train) < 2 * _FOLDS or not len(table.test):
        raise ObservationError("to tune a policy, a table needs rows of both splits, and some dozens to train on")
    options = dict(policy.router.options)
    estimated = _cross_fitted(policy.router.name, options, table.train, seed, on_step)
    acceptance = fit_acceptance(table.train, estimated.quality)
    best = int(column_means(table.train.quality).argmax())
    goal = target.quality or float(column_means(table.train.quality)[best]) - (target.within or 0.0)
    every = _candidates(policy, table.train, acceptance)
    candidates = [candidate for candidate in every if candidate.strategy.name in strategies]
    decided: dict[Objective, list[Decision | None]] = {}
    played = []
    for number, candidate in enumerate(candidates):
        on_step("try: policies", number, len(candidates))
        if candidate.objective not in decided:
            decided[candidate.objective] = decide(candidate, estimated, table.train)
        played.append(play(candidate.strategy, decided[candidate.objective], table.train))
    on_step("try: policies", len(candidates), len(candidates))
    place = _cheapest(played, goal)
    chosen = candidates[place].model_copy(update={"target": target})
    fitted = create_router(policy.router.name, options).fit(table.train)
    on_test = fitted.estimate([Query(text=text) for text in table.test.texts], table.test.cards)
    result = play(chosen.strategy, decide(chosen, on_test, table.test), table.test)
    kept = float(np.nanmean(played[place].quality)) >= goal
    return _measured(
        chosen, result, table.test, best, kept, goal, float(np.nanmean(played[place].quality)), len(candidates)
    )


def decide(policy: Policy, estimates: Estimates, observed: Observations) -> list[Decision | None]:
    """The policy's decision for every query of `observed`; None where it leaves the query to nobody."""

    def one(row: int) -> Decision | None:
        try:
            return policy.choose(estimates, observed.cards, Query(text=observed.texts[row]), row=row)
        except NoExpertError:
            return None

    return [one(row) for row in range(len(observed))]


def play(strategy: StrategyChoice, decisions: Sequence[Decision | None], observed: Observations) -> Played:
    """What `strategy` (`single` or `cascade`) would have done with the queries of `observed`."""
    options = CascadeOptions.model_validate(dict(strategy.options) if strategy.name == "cascade" else _ONE)
    places = {card.name: e for e, card in enumerate(observed.cards)}
    rows = [
        (0.0, 0.0, 0)
        if decision is None
        else _play_row(cascade_steps(decision, options), options, observed, row, places)
        for row, decision in enumerate(decisions)
    ]
    quality, cost, calls = np.array(rows, np.float64).T
    return Played(quality=quality, cost_usd=cost, calls=float(calls.mean()))


def _play_row(
    steps: Sequence[Candidate], options: CascadeOptions, observed: Observations, row: int, places: Mapping[str, int]
) -> tuple[float, float, int]:
    """Quality, cost and calls. Experts not observed on the query are passed over; nobody's answer has quality 0."""
    cost, calls, quality = 0.0, 0, 0.0
    for candidate in steps:
        place = places[candidate.expert]
        if np.isnan(observed.quality[row, place]):
            continue
        calls, cost = calls + 1, cost + float(observed.cost_usd[row, place])
        quality = float(observed.quality[row, place])
        told = np.nan if observed.confidence is None else float(observed.confidence[row, place])
        score = options.acceptance.score(candidate.quality, None if np.isnan(told) else told)
        if score >= options.threshold:
            break
    return quality, cost, calls


def _candidates(policy: Policy, train: Observations, acceptance: Acceptance) -> Iterator[Policy]:
    objectives = [Objective(quality=worth, cost=1, latency=policy.objective.latency) for worth in _WORTHS]
    for objective in objectives:
        yield _with(policy, objective, StrategyChoice(name="single"))
    names, costs = [card.name for card in train.cards], column_means(train.cost_usd)
    able = column_means(train.quality).argsort()[::-1][:_CHAINED].tolist()
    chains = [(names[a], names[b]) for a in able for b in able if costs[a] < costs[b]]
    shapes: list[tuple[Objective, dict[str, Any]]] = [(policy.objective, {"experts": list(chain)}) for chain in chains]
    shapes += [(objective, {"steps": steps}) for objective in objectives[::3] for steps in _STEPS]
    for objective, shape in shapes:
        for threshold in _THRESHOLDS:
            options = {**shape, "threshold": threshold, "acceptance": acceptance.model_dump()}
            yield _with(policy, objective, StrategyChoice(name="cascade", options=options))


def _with(policy: Policy, objective: Objective, strategy: StrategyChoice) -> Policy:
    return policy.model_copy(update={"objective": objective, "strategy": strategy})


def _cheapest(played: Sequence[Played], goal: float) -> int:
    """The cheapest that keeps the goal; the best where none does."""
    quality = np.array([float(p.quality.mean()) for p in played])
    cost = np.array([float(p.cost_usd.mean()) for p in played])
    keeps = quality >= goal
    return int(np.where(keeps, cost, np.inf).argmin()) if keeps.any() else int(quality.argmax())


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


def _measured(
    policy: Policy, played: Played, test: Observations, best: int, kept: bool, goal: float, reached: float, tried: int
) -> Tuned:
    draws = metrics.bootstrap(len(test), resamples=_RESAMPLES, seed=0)
    quality = metrics.weighted_mean(played.quality, draws)
    best_quality = metrics.weighted_mean(test.quality, draws)[:, best]
    cost = 1000 * metrics.weighted_mean(played.cost_usd, draws)
    best_cost = 1000 * metrics.weighted_mean(test.cost_usd, draws)[:, best]
    return Tuned(
        policy=policy,
        kept=kept,
        tried=tried,
        best_single=test.cards[best].name,
        train_quality=reached,
        train_target=goal,
        quality=_interval(quality),
        best_quality=_interval(best_quality),
        difference=_interval(quality - best_quality),
        cost_usd_per_1k=_interval(cost),
        best_cost_usd_per_1k=_interval(best_cost),
        share_of_cost=float(cost[0] / best_cost[0]) if best_cost[0] else float("nan"),
        calls=played.calls,
    )


def _interval(values: metrics.Floats) -> Interval:
    found = Interval.of(values)
    if found is None:
        raise ObservationError("the test split has no observation of the best single expert")
    return found
