"""What routing is worth: frontiers, their areas, shares saved, and bootstrap intervals of all of them.

Every metric takes `draws`, the bootstrap's weights of the test queries [D, Q], and gives one figure per draw [D].
Draw 0 weighs every query alike, so that it is the value itself; the other draws are resamples. Because the weights
depend on nothing but the number of queries and the seed, the figures of two routers under the same draws are *paired*:
subtract them draw by draw to get the interval of their difference.

Costs are USD a query, qualities are in 0..1. Q queries, E experts, L cost weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from routers.contracts import Estimates, FloatArray

Floats = npt.NDArray[np.float64]

COST_WEIGHTS: Floats = np.concatenate([[0.0], np.logspace(-2, 6, 161)])
"""The swept weights lambda of utility = quality - lambda * cost, in quality per USD."""

REWARD_SETTINGS = {"performance_first": (1.0, 0.0), "balance": (0.5, 0.5), "cost_first": (0.2, 0.8)}
"""GraphRouter's weights (alpha of the quality, beta of the cost scaled to 0..1)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the 95% percentile bootstrap interval around it."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Floats) -> Interval | None:
        """From the figures of all draws [D], the first being the value. None where the figure does not exist.

        Draws in which it does not exist (NaN: a quality that this resample does not reach) are left out.
        """
        if not np.isfinite(figures[0]):
            return None
        resampled = figures[1:][np.isfinite(figures[1:])]
        low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (figures[0], figures[0])
        return cls(float(figures[0]), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a router's choices gave: quality and cost [Q, L], one column per operating point; NaN where unobserved."""

    quality: Floats
    cost_usd: Floats


@dataclass(frozen=True)
class Frontier:
    """Mean cost and mean quality of each operating point under each draw, both [D, L]."""

    cost_usd: Floats
    quality: Floats

    @cached_property
    def hulls(self) -> list[tuple[Floats, Floats]]:
        """The vertices of each draw's upper hull: costs [H] and qualities [H], rising."""
        return [upper_hull(cost, quality) for cost, quality in zip(self.cost_usd, self.quality, strict=True)]


def bootstrap(queries: int, *, resamples: int = 1000, seed: int = 0) -> FloatArray:
    """Weights of the queries [1 + resamples, Q]: all alike, then how often each was drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(queries, np.full(queries, 1 / queries), size=resamples)
    return np.vstack([np.ones((1, queries)), drawn]).astype(np.float32)


def weighted_mean(values: npt.NDArray[np.floating], draws: FloatArray) -> Floats:
    """Mean of `values` [Q, ...] over the queries under each draw: [D, ...]. NaN values weigh nothing."""
    flat = values.reshape(len(values), -1)
    known = ~np.isnan(flat)
    total = draws.astype(np.float64) @ np.where(known, flat, 0.0)
    weight = draws.sum(axis=1, keepdims=True) if known.all() else draws @ known.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Floats = (total / weight).reshape(len(draws), *values.shape[1:])
    return means


def choose(quality: Floats, cost_usd: Floats, allowed: npt.NDArray[np.bool_], weight: float) -> npt.NDArray[np.intp]:
    """The expert of the highest quality - weight * cost for each query [Q], among those `allowed` [Q, E].

    Of equals the cheaper is taken, then the first.
    """
    utility = np.where(allowed, quality - weight * cost_usd, -np.inf)
    best = utility >= utility.max(axis=1, keepdims=True)
    chosen: npt.NDArray[np.intp] = np.where(best, cost_usd, np.inf).argmin(axis=1)
    return chosen


def sweep(estimates: Estimates, quality: FloatArray, cost_usd: FloatArray) -> Outcomes:
    """What choosing by `estimates` gives at every cost weight, on what was observed of each pair [Q, E].

    A query is routed among the experts that were observed on it.
    """
    allowed, rows = ~np.isnan(quality), np.arange(len(quality))
    expected = estimates.quality.astype(np.float64), estimates.cost_usd.astype(np.float64)
    chosen = np.stack([choose(*expected, allowed, weight) for weight in COST_WEIGHTS], axis=1)
    return Outcomes(
        quality[rows[:, None], chosen].astype(np.float64), cost_usd[rows[:, None], chosen].astype(np.float64)
    )


def frontier(outcomes: Outcomes, draws: FloatArray) -> Frontier:
    """The frontier of `outcomes` under each draw."""
    return Frontier(weighted_mean(outcomes.cost_usd, draws), weighted_mean(outcomes.quality, draws))


def upper_hull(cost: Floats, quality: Floats) -> tuple[Floats, Floats]:
    """The vertices of the non-decreasing upper convex hull of points, by rising cost. Both [L] -> both [H]."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(set(zip(cost.tolist(), quality.tolist(), strict=True)), key=lambda point: (point[0], -point[1])):
        if hull and y <= hull[-1][1]:
            continue
        while len(hull) >= 2 and _bends_up(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    xs, ys = zip(*hull, strict=True)
    return np.array(xs), np.array(ys)


def _bends_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) <= (c[1] - b[1]) * (b[0] - a[0])


def area(cost: Floats, quality: Floats, low: float, high: float) -> float:
    """Area under hull vertices between two costs: 0 left of the first vertex, flat right of the last."""
    if high <= cost[0]:
        return 0.0
    start = max(low, cost[0])
    xs = np.unique(np.concatenate([[start, high], cost[(cost > start) & (cost < high)]]))
    return float(np.trapezoid(np.interp(xs, cost, quality), xs))


def aiq(front: Frontier, expert_cost: Floats) -> Floats:
    """Average quality over all budgets from 0 to the dearest expert's mean cost [D].

    The area under the frontier's non-decreasing upper hull, 0 left of the cheapest point and flat after the dearest,
    divided by that cost. `expert_cost` [D, E] is each expert's mean cost under each draw.
    """
    return _mean_height(front, np.zeros(len(expert_cost)), np.nanmax(expert_cost, axis=1))


def aiq_routerbench(front: Frontier, expert_cost: Floats) -> Floats:
    """RouterBench's AIQ (arXiv 2403.12031) [D]: the area between the cheapest and dearest expert, over that range."""
    return _mean_height(front, np.nanmin(expert_cost, axis=1), np.nanmax(expert_cost, axis=1))


def _mean_height(front: Frontier, low: Floats, high: Floats) -> Floats:
    areas = [area(*hull, *bounds) for hull, *bounds in zip(front.hulls, low, high, strict=True)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(high > low, np.array(areas) / (high - low), np.nan)


def saved(front: Frontier, best_cost: Floats, best_quality: Floats) -> Floats:
    """Share of the best single expert's cost that is saved where the frontier reaches its quality [D].

    NaN where the frontier does not reach it, or where the best expert costs nothing.
    """
    costs = np.array([cost_at(*hull, target) for hull, target in zip(front.hulls, best_quality, strict=True)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(best_cost > 0, 1 - costs / best_cost, np.nan)


def cost_at(cost: Floats, quality: Floats, target: float) -> float:
    """The cost at which a hull (vertices by rising cost) reaches `target` quality; NaN where it does not."""
    return float("nan") if quality[-1] < target else float(np.interp(target, quality, cost))


@dataclass(frozen=True, slots=True)
class PairCurve:
    """Two experts: performance gap recovered (PGR) as calls move from the weak to the strong one, per draw [D, G + 1].

    `share` is the share of calls that go to the strong expert. As in RouteLLM (arXiv 2406.18665), PGR is 0 where all go
    to the weak and 1 where all go to the strong expert; queries of equal score move together.
    """

    share: Floats
    recovered: Floats

    def apgr(self) -> Floats:
        """PGR averaged over all shares of calls [D]."""
        return np.asarray(np.trapezoid(self.recovered, self.share, axis=1))

    def cpt(self, recovered: float) -> Floats:
        """The least share of calls to the strong expert that recovers that much of the gap [D]; NaN without a gap."""
        enough = self.recovered >= recovered
        reached = enough.argmax(axis=1)
        rows, before = np.arange(len(reached)), np.maximum(reached - 1, 0)
        low, high = self.recovered[rows, before], self.recovered[rows, reached]
        with np.errstate(invalid="ignore", divide="ignore"):
            part = np.where(high > low, (recovered - low) / (high - low), 0.0)
        left = self.share[rows, before]
        return np.where(enough.any(axis=1), left + part * (self.share[rows, reached] - left), np.nan)


def pair_curve(score: FloatArray, weak: FloatArray, strong: FloatArray, draws: FloatArray) -> PairCurve:
    """The curve of sending queries to the strong expert by falling `score` [Q], with both experts' qualities [Q]."""
    known = ~(np.isnan(weak) | np.isnan(strong))
    score, gap, weights = score[known], (strong - weak)[known].astype(np.float64), draws[:, known].astype(np.float64)
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf) != 0)
    calls = np.add.reduceat(weights[:, order], starts, axis=1).cumsum(axis=1)
    gains = np.add.reduceat(weights[:, order] * gap[order], starts, axis=1).cumsum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recovered = np.where(gains[:, -1:] > 0, gains / gains[:, -1:], np.nan)
    return PairCurve(_from_zero(calls / calls[:, -1:]), _from_zero(recovered))


def _from_zero(curve: Floats) -> Floats:
    return np.hstack([np.zeros((len(curve), 1)), curve])


@dataclass(frozen=True, slots=True)
class CostScale:
    """Costs scaled so that the cheapest call of the train table is 0 and the dearest 1."""

    low: float
    high: float

    @classmethod
    def over(cls, cost_usd: FloatArray) -> CostScale:
        """From the costs of a train table [Q, E]."""
        return cls(float(np.nanmin(cost_usd)), float(np.nanmax(cost_usd)))

    def __call__(self, cost_usd: npt.NDArray[np.floating]) -> Floats:
        return np.asarray((cost_usd.astype(np.float64) - self.low) / ((self.high - self.low) or 1.0))


def reward(estimates: Estimates, quality: FloatArray, cost_usd: FloatArray, scale: CostScale, setting: str) -> Floats:
    """GraphRouter's reward of each query [Q]: alpha * quality - beta * scaled cost, choosing by its estimate."""
    alpha, beta = REWARD_SETTINGS[setting]
    expected = alpha * estimates.quality - beta * scale(estimates.cost_usd)
    chosen = np.where(np.isnan(quality), -np.inf, expected).argmax(axis=1)
    rows = np.arange(len(quality))
    return np.asarray(alpha * quality[rows, chosen] - beta * scale(cost_usd[rows, chosen]))


@dataclass(frozen=True, slots=True)
class Bin:
    """A bar of a reliability diagram: how many estimates fell into it, their mean, and the mean observed."""

    count: int
    estimated: float
    observed: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Does an estimated .8 mean .8? Expected calibration error (ECE) per draw [D], and the reliability diagram."""

    error: Floats
    bins: list[Bin]


def calibration(estimated: FloatArray, observed: FloatArray, draws: FloatArray, *, bins: int = 10) -> Calibration:
    """Calibration of quality estimates over all observed pairs [Q, E], in `bins` bins of equal width."""
    known = ~np.isnan(observed)
    place = np.clip((estimated * bins).astype(int), 0, bins - 1)
    error, filled = np.zeros(len(draws)), []
    for index in range(bins):
        inside = known & (place == index)
        off = np.where(inside, estimated - np.where(known, observed, 0), 0).sum(axis=1)
        error += np.abs(draws @ off)
        if count := int(inside.sum()):
            filled.append(Bin(count, float(estimated[inside].mean()), float(observed[inside].mean())))
    return Calibration(error / (draws @ known.sum(axis=1)), filled)
