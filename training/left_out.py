"""What a router knows of an expert that it was not fitted on: each is left out, then added from its card and a little.

An expert is taken out of the train table, the router is fitted on the others, and the expert is added with its card and
0, 16 or 64 of its train observations. The router then routes the test split among *all* experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from routers.contracts import Estimates, Observations, Query
from routers.registry import AnyRouter, create_router
from training import metrics
from training.evaluation import Bench, Evaluation, OnStep
from training.metrics import Floats
from training.observations import Table

COUNTS = (0, 16, 64)


@dataclass(frozen=True)
class LeftOut:
    """One router with one expert added from `count` observations. Figures per draw [D].

    `brier` is the mean squared error of the added expert's estimated quality, `offset` that estimate's mean less what
    was observed.
    """

    expert: str
    count: int
    measured: Evaluation
    brier: Floats
    offset: Floats


@dataclass(frozen=True)
class LeftOutReport:
    """All experts left out in turn; `full` and `full_brier` (by expert) are of the router fitted on all of them."""

    router: str
    full: Evaluation
    full_brier: Mapping[str, Floats]
    added: Sequence[LeftOut]


def left_out(
    table: Table,
    name: str,
    *,
    counts: Sequence[int] = COUNTS,
    seed: int = 0,
    resamples: int = 1000,
    on_step: OnStep = lambda step, done, total: None,
) -> LeftOutReport:
    """Leave out each expert of `table` in turn. Raises `RouterConfigError` and `ObservationError`."""
    bench = Bench(table, resamples=resamples)
    draws = metrics.bootstrap(len(table.test), resamples=resamples)
    queries = [Query(text=text) for text in table.test.texts]
    full = create_router(name, {"seed": seed}).fit(table.train).estimate(queries, table.test.cards)
    added = []
    for place, card in enumerate(table.cards):
        on_step(f"left out: {name}, {card.name}", place, len(table.cards))
        router = create_router(name, {"seed": seed}).fit(table.train.without(card.name))
        for count in counts:
            add_some(router, table.train, place, count, seed)
            estimates = router.estimate(queries, table.test.cards)
            error = _error(estimates, table.test, place)
            added.append(
                LeftOut(
                    expert=card.name,
                    count=count,
                    measured=bench.measure(name, estimates),
                    brier=metrics.weighted_mean(error**2, draws),
                    offset=metrics.weighted_mean(error, draws),
                )
            )
    on_step(f"left out: {name}", len(table.cards), len(table.cards))
    brier = {
        card.name: metrics.weighted_mean(_error(full, table.test, place) ** 2, draws)
        for place, card in enumerate(table.cards)
    }
    return LeftOutReport(router=name, full=bench.measure(name, full), full_brier=brier, added=added)


def add_some(router: AnyRouter, train: Observations, place: int, count: int, seed: int) -> None:
    """Add the expert at `place` with `count` of its observations, drawn at random."""
    seen = np.flatnonzero(np.isfinite(train.quality[:, place]))
    few = np.random.default_rng(seed).permutation(seen)[:count]
    router.add_expert(train.cards[place], train.rows(few) if count else None)


def _error(estimates: Estimates, test: Observations, place: int) -> Floats:
    """Estimated less observed quality of one expert [Q], NaN where it was not observed."""
    return (estimates.quality[:, place] - test.quality[:, place]).astype(np.float64)
