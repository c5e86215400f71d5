"""Measure routers on a table: fit on its train split, choose on its test split, against what could be had without them.

All routers of an evaluation are measured under the same bootstrap draws of the test queries, so that any two of them
can be compared by the paired difference of their draws. A router that draws by chance is fitted once for each seed; its
figures are the mean over the seeds, draw by draw.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from routers.contracts import Estimates, FloatArray, Observations, Query
from routers.errors import NoExpertError, ObservationError
from routers.policy import Objective, Policy
from routers.registry import AnyRouter, create_router
from training import metrics
from training.metrics import Calibration, CostScale, Floats, Frontier, Interval, Outcomes
from training.observations import Table

OnStep = Callable[[str, int, int], None]
"""Hears of a step's name, how much of it is done, and how much there is."""

BEST_QUALITY = Policy(name="best-quality", objective=Objective(quality=1, cost=0))
"""Without a policy, the expert of the highest estimated quality answers."""

_TIMED_QUERIES = 500
_LATENCY_RESAMPLES = 200


@dataclass(frozen=True)
class Evaluation:
    """What one router, or one reference, reached. Figures are per draw [D], NaN where they do not exist.

    `figures` are in the units of their names; `saved` is the share of the best single expert's cost, `gain` quality
    above its own, `gap_closed` that over the oracle's: these three are over the queries on which that expert was
    observed. `decision_ms` are single decisions, timed beside the embedding.
    """

    router: str
    figures: Mapping[str, Floats]
    rewards: Mapping[str, Floats]
    frontier: Frontier
    seeds: Sequence[int] = ()
    calibration: Calibration | None = None
    decision_ms: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The routers asked for, and the references: `random`, `best_single`, `task_label` (if it were known), `oracle`."""

    cards: Sequence[str]
    best_single: str
    best_quality: Floats
    best_cost: Floats
    compared: int
    """Queries on which the best single expert was observed: `saved`, `gain` and `gap_closed` are over these."""
    queries: int
    evaluations: Sequence[Evaluation]
    references: Sequence[Evaluation]


def evaluate(
    table: Table,
    routers: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    policy: Policy = BEST_QUALITY,
    resamples: int = 1000,
    on_step: OnStep = lambda step, done, total: None,
) -> Report:
    """Fit and measure each of `routers`. Raises `RouterConfigError` and `ObservationError`."""
    bench = Bench(table, policy=policy, resamples=resamples)
    evaluations: list[Evaluation] = []
    total = len(routers) * len(seeds)
    for name in routers:
        runs: list[Evaluation] = []
        for seed in seeds:
            on_step(f"evaluate: {name}, seed {seed}", len(evaluations) * len(seeds) + len(runs), total)
            runs.append(bench.measure_router(create_router(name, {"seed": seed}).fit(table.train)))
        evaluations.append(replace(mean_over_seeds(runs), router=name, seeds=seeds))
    on_step("evaluate: done", total, total)
    return bench.report(evaluations)


class Bench:
    """One table's test split, made ready to measure any number of routers on."""

    def __init__(self, table: Table, *, policy: Policy = BEST_QUALITY, resamples: int = 1000, seed: int = 0) -> None:
        if not len(table.train) or not len(table.test):
            raise ObservationError("to evaluate, a table needs rows of both splits, 'train' and 'test'")
        self._train, self._test, self._policy = table.train, table.test, policy
        self._queries = [Query(text=text) for text in table.test.texts]
        self._draws = metrics.bootstrap(len(table.test), resamples=resamples, seed=seed)
        self._scale = CostScale.over(table.train.cost_usd)
        means = column_means(table.train.quality)
        self._best, self._weak = int(means.argmax()), int(means.argmin())
        self._expert_cost = metrics.weighted_mean(table.test.cost_usd, self._draws)
        self._best_quality = metrics.weighted_mean(table.test.quality, self._draws)[:, self._best]
        self._compared = ~np.isnan(table.test.quality[:, self._best])
        if not self._compared.any():
            raise ObservationError(f"{table.test.cards[self._best].name!r}, the best on train, has no test rows")
        oracle = metrics.sweep(_observed(table.test), table.test.quality, table.test.cost_usd)
        self._oracle_quality = self._compared_mean(oracle.quality[:, 0])

    def measure_router(self, router: AnyRouter) -> Evaluation:
        """Measure a fitted router, its calibration and its speed included."""
        estimates = router.estimate(self._queries, self._test.cards)
        measured = self.measure(router.name, estimates, self._chosen(estimates))
        calibrated = metrics.calibration(estimates.quality, self._test.quality, self._draws)
        return replace(measured, calibration=calibrated, decision_ms=self.decision_ms(router))

    def measure(self, name: str, estimates: Estimates, chosen: Outcomes | None = None) -> Evaluation:
        """Measure estimates of the test split; `chosen` are a policy's outcomes [Q, 1], else the best quality's."""
        swept = metrics.sweep(estimates, self._test.quality, self._test.cost_usd)
        rewards = {
            setting: metrics.reward(estimates, self._test.quality, self._test.cost_usd, self._scale, setting)
            for setting in metrics.REWARD_SETTINGS
        }
        score = estimates.quality[:, self._best] - estimates.quality[:, self._weak]
        return self._measured(name, swept, chosen or swept, rewards, score)

    def report(self, evaluations: Sequence[Evaluation]) -> Report:
        """`evaluations` beside the references."""
        return Report(
            cards=[card.name for card in self._test.cards],
            best_single=self._test.cards[self._best].name,
            best_quality=self._best_quality,
            best_cost=self._expert_cost[:, self._best],
            compared=int(self._compared.sum()),
            queries=len(self._test),
            evaluations=evaluations,
            references=self._references(),
        )

    def _references(self) -> list[Evaluation]:
        quality, cost = self._test.quality.astype(np.float64), self._test.cost_usd.astype(np.float64)
        evenly = Outcomes(np.nanmean(quality, axis=1)[:, None], np.nanmean(cost, axis=1)[:, None])
        best = Outcomes(quality[:, [self._best]], cost[:, [self._best]])
        return [
            self._fixed("random", evenly),
            self._fixed("best_single", best),
            self.measure("task_label", _by_task(self._train, self._test)),
            self.measure("oracle", _observed(self._test)),
        ]

    def _fixed(self, name: str, outcomes: Outcomes) -> Evaluation:
        """A rule that looks at no query: all of them are alike to it."""
        rewards = {
            setting: (alpha * outcomes.quality - beta * self._scale(outcomes.cost_usd))[:, 0]
            for setting, (alpha, beta) in metrics.REWARD_SETTINGS.items()
        }
        return self._measured(name, outcomes, outcomes, rewards, np.zeros(len(self._test), np.float32))

    def _measured(
        self, name: str, swept: Outcomes, chosen: Outcomes, rewards: Mapping[str, Floats], score: FloatArray
    ) -> Evaluation:
        front = self._frontier(swept)
        gain = self._compared_mean(chosen.quality[:, 0]) - self._best_quality
        gap = self._oracle_quality - self._best_quality
        figures = {
            "quality": metrics.weighted_mean(chosen.quality[:, 0], self._draws),
            "cost_usd_per_1k": 1000 * metrics.weighted_mean(chosen.cost_usd[:, 0], self._draws),
            "aiq": metrics.aiq(front, self._expert_cost),
            "aiq_routerbench": metrics.aiq_routerbench(front, self._expert_cost),
            "saved": metrics.saved(
                self._compared_frontier(swept, front), self._expert_cost[:, self._best], self._best_quality
            ),
            "gain": gain,
            "gap_closed": np.divide(gain, gap, out=np.full_like(gain, np.nan), where=gap > 0),
            **self._pair_figures(score),
        }
        mean_rewards = {name: metrics.weighted_mean(values, self._draws) for name, values in rewards.items()}
        return Evaluation(router=name, figures=figures, rewards=mean_rewards, frontier=front)

    def _pair_figures(self, score: FloatArray) -> dict[str, Floats]:
        """RouteLLM's figures where there are two experts, the strong one being the better on train; else NaN."""
        if len(self._test.cards) != 2:
            return {name: np.full(len(self._draws), np.nan) for name in ("apgr", "cpt50", "cpt80")}
        weak, strong = self._test.quality[:, self._weak], self._test.quality[:, self._best]
        curve = metrics.pair_curve(score, weak, strong, self._draws)
        return {"apgr": curve.apgr(), "cpt50": curve.cpt(0.5), "cpt80": curve.cpt(0.8)}

    def _frontier(self, outcomes: Outcomes) -> Frontier:
        return metrics.frontier(outcomes, self._draws)

    def _compared_mean(self, values: Floats) -> Floats:
        """Mean [D] of `values` [Q] over the queries on which the best single expert was observed."""
        return metrics.weighted_mean(np.where(self._compared, values, np.nan), self._draws)

    def _compared_frontier(self, outcomes: Outcomes, over_all: Frontier) -> Frontier:
        if self._compared.all():
            return over_all
        here = self._compared
        return metrics.frontier(Outcomes(outcomes.quality[here], outcomes.cost_usd[here]), self._draws[:, here])

    def _chosen(self, estimates: Estimates) -> Outcomes:
        """What the policy's choices gave. A query that it leaves to nobody has quality 0 and costs nothing; one that it
        leaves to experts of which none was observed there is unknown."""
        rows = [self._chosen_row(estimates, row) for row in range(len(self._queries))]
        quality, cost = np.array(rows, np.float64).T
        return Outcomes(quality[:, None], cost[:, None])

    def _chosen_row(self, estimates: Estimates, row: int) -> tuple[float, float]:
        """Quality and cost of the first expert in the policy's ranking that was observed on this query."""
        try:
            decision = self._policy.choose(estimates, self._test.cards, self._queries[row], row=row)
        except NoExpertError:
            return 0.0, 0.0
        place = {card.name: e for e, card in enumerate(self._test.cards)}
        for candidate in decision.ranking:
            quality = float(self._test.quality[row, place[candidate.expert]])
            if not np.isnan(quality):
                return quality, float(self._test.cost_usd[row, place[candidate.expert]])
        return np.nan, np.nan

    def decision_ms(self, router: AnyRouter) -> dict[str, Interval]:
        """p50 and p99 of deciding for one query alone, its embedding being known."""
        every = max(1, len(self._queries) // _TIMED_QUERIES)
        taken = np.array([_timed(router, self._policy, query, self._test) for query in self._queries[::every]])
        drawn = np.random.default_rng(0).choice(taken, (_LATENCY_RESAMPLES, len(taken)))
        samples = np.vstack([taken, drawn])
        figures = {f"p{percent}": np.percentile(samples, percent, axis=1) for percent in (50, 99)}
        return {name: found for name, values in figures.items() if (found := Interval.of(values))}


def _timed(router: AnyRouter, policy: Policy, query: Query, test: Observations) -> float:
    started = time.perf_counter()
    with suppress(NoExpertError):
        policy.choose(router.estimate([query], test.cards), test.cards, query)
    return 1000 * (time.perf_counter() - started)


def column_means(values: FloatArray) -> Floats:
    """Mean of what is known in each column [E]; minus infinity where nothing is."""
    seen = np.isfinite(values)
    sums = np.where(seen, values, 0).sum(0, dtype=np.float64)
    return np.where(seen.any(0), sums / np.maximum(seen.sum(0), 1), -np.inf)


def _observed(table: Observations) -> Estimates:
    """What really happened, as estimates; experts not observed on a query are never chosen there."""
    quality, cost = np.nan_to_num(table.quality), np.nan_to_num(table.cost_usd)
    return Estimates(quality=quality, cost_usd=cost, latency_s=np.zeros_like(cost))


def _by_task(train: Observations, test: Observations) -> Estimates:
    """Each expert's train means on the test query's own task; over all of train where it has none there."""
    shape = test.quality.shape
    quality = np.broadcast_to(_known_means(train.quality), shape).copy()
    cost = np.broadcast_to(_known_means(train.cost_usd), shape).copy()
    train_tasks, test_tasks = np.array(train.tasks), np.array(test.tasks)
    for task in set(test.tasks) & set(train.tasks):
        rows, here = train.rows(np.flatnonzero(train_tasks == task)), test_tasks == task
        quality[here] = _known_means(rows.quality, quality[0])
        cost[here] = _known_means(rows.cost_usd, cost[0])
    return Estimates(quality=quality, cost_usd=cost, latency_s=np.zeros_like(cost))


def _known_means(values: FloatArray, default: FloatArray | float = 0.0) -> FloatArray:
    means = column_means(values)
    return np.where(np.isfinite(means), means, default).astype(np.float32)


def mean_over_seeds(runs: Sequence[Evaluation]) -> Evaluation:
    """The mean over seeds, draw by draw. The reliability diagram is the first seed's, the error all seeds'."""
    first = runs[0]
    calibrations = [run.calibration for run in runs if run.calibration]
    return Evaluation(
        router=first.router,
        figures=_mean_of([run.figures for run in runs]),
        rewards=_mean_of([run.rewards for run in runs]),
        frontier=Frontier(
            np.mean([run.frontier.cost_usd for run in runs], axis=0),
            np.mean([run.frontier.quality for run in runs], axis=0),
        ),
        calibration=Calibration(np.mean([c.error for c in calibrations], axis=0), calibrations[0].bins),
        decision_ms=first.decision_ms,
    )


def _mean_of(runs: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    return {name: np.mean([run[name] for run in runs], axis=0) for name in runs[0]}
