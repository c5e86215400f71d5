"""What the nodes of GraphRouter's graph are at serving time: arrays, and the messages that make an expert's node.

Query nodes carry features f [B, F]. A query attends to the T task nodes, p = softmax(f W + b), and reads what every
expert's node holds of them. For one outcome (effect, or answer length over the expert's mean length) the estimate is

    p . tasks[:, e] + f . directions[:, e]

Expert nodes are constants, so no graph is needed to serve. A node is made of messages along the expert's observed edges
alone: each observed query sends its surprise (what was observed less what is expected so far), first to the expert's
level, then split over the tasks that the query attends to, then along the directions of its features. Every sum is
shrunk towards a prior as if that many more observations had shown it, so that 16 edges and 4,000 are one formula, and
an expert that joins later needs no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import numpy as np
import numpy.typing as npt

from routers.artefact import AnyArray, Artefact
from routers.contracts import FloatArray

LEVEL_COUNTS_AS = 8.0
"""Observations that the prior of an expert's level counts as: (noise of one / spread of experts around it) squared."""
DIRECTION_COUNTS_AS = 50.0
"""Observations that 'no direction matters' counts as; learnt gains scale what comes of it."""
TASK_COUNTS_AS = 1.0
"""Observations that 'this task is as hard as any' counts as, for what all experts show of a task together."""

EFFECT, LENGTH = 0, 1
OUTCOMES = 2


@dataclass(frozen=True, slots=True)
class QuerySide:
    """Features to attention over tasks: `centre` [F], `tasks` [F, T], `bias` [T]; `directions` [F, P] whiten them."""

    centre: FloatArray
    tasks: FloatArray
    bias: FloatArray
    directions: FloatArray

    def attention(self, features: FloatArray) -> FloatArray:
        """How much each query of centred `features` [B, F] is of each task [B, T]; rows sum to 1."""
        logits = features @ self.tasks + self.bias
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return cast("FloatArray", weights / weights.sum(1, keepdims=True))

    def arrays(self) -> dict[str, AnyArray]:
        """For an artefact."""
        return {f"graph.{name}": getattr(self, name) for name in ("centre", "tasks", "bias", "directions")}

    @classmethod
    def restore(cls, artefact: Artefact) -> Self:
        """From an artefact."""
        tasks = artefact.array("graph.tasks", None, None)
        features, count = tasks.shape
        return cls(
            centre=artefact.array("graph.centre", features),
            tasks=tasks,
            bias=artefact.array("graph.bias", count),
            directions=artefact.array("graph.directions", features, None),
        )


@dataclass(frozen=True, slots=True)
class Learnt:
    """What training decides about messages, per outcome: `task_counts_as` [2] observations, gains [2, P] of directions.

    `shared_gains` weigh what all experts show of a direction together, `own_gains` what each shows beyond it.
    """

    task_counts_as: FloatArray
    shared_gains: FloatArray
    own_gains: FloatArray


@dataclass(frozen=True, slots=True)
class ExpertNode:
    """One expert and outcome: `level`, `tasks` [T] beside it, `own` [P] along directions; `counts` [T] observed."""

    level: float
    tasks: FloatArray
    own: FloatArray
    counts: FloatArray

    def expected(self, attention: FloatArray, along: FloatArray) -> FloatArray:
        """For queries with `attention` [B, T] and projections `along` [B, P], without what experts share: [B]."""
        return cast("FloatArray", self.level + attention @ self.tasks + along @ self.own)


def expert_node(
    values: FloatArray,
    attention: FloatArray,
    along: FloatArray,
    shared: FloatArray,
    *,
    prior: tuple[float, FloatArray],
    task_counts_as: float,
    own_gains: FloatArray,
) -> ExpertNode:
    """The node that N observed `values` make; `shared` [N] is what experts share along the queries' directions.

    `prior` is the level and the tasks [T] that are expected before anything is observed.
    """
    count, level, tasks = len(values), _level(values, prior[0]), prior[1]
    counts = attention.sum(0)
    tasks = (attention.T @ (values - level) + task_counts_as * tasks) / (counts + task_counts_as)
    surprise = values - level - attention @ tasks - shared
    own = own_gains * (along.T @ surprise) / (count + DIRECTION_COUNTS_AS)
    return ExpertNode(level, tasks.astype(np.float32), own.astype(np.float32), counts.astype(np.float32))


@dataclass(frozen=True, slots=True)
class Nodes:
    """Constants of serving: per outcome `tasks` [2, T, K] with levels, `directions` [2, F, K]; `own` [2, P, K].

    `levels` [2, K] and `counts` [T, K] are what the nodes stand on; `shared` [2, P] is in `directions` already.
    """

    levels: FloatArray
    tasks: FloatArray
    own: FloatArray
    shared: FloatArray
    counts: FloatArray
    directions: FloatArray

    @classmethod
    def of(
        cls, levels: FloatArray, tasks: FloatArray, own: FloatArray, shared: FloatArray, counts: FloatArray,
        side: QuerySide,
    ) -> Self:  # fmt: skip
        directions = np.einsum("fp,opk->ofk", side.directions, own + shared[:, :, None]).astype(np.float32)
        return cls(levels, tasks, own, shared, counts, directions)

    def columns(self, keep: npt.NDArray[np.intp]) -> Self:
        """Of the experts at `keep` alone."""
        return replace(
            self,
            levels=self.levels[:, keep],
            tasks=self.tasks[:, :, keep],
            own=self.own[:, :, keep],
            counts=self.counts[:, keep],
            directions=self.directions[:, :, keep],
        )

    def expected(self, outcome: int, attention: FloatArray, features: FloatArray) -> FloatArray:
        """The estimates [B, K]."""
        found: FloatArray = attention @ self.tasks[outcome] + features @ self.directions[outcome]
        return found

    def with_expert(self, made: Sequence[ExpertNode], side: QuerySide) -> Self:
        """With one more expert, whose nodes are `made`, one for each outcome."""
        one = _stacked([[node] for node in made], self.shared, side)
        levels, tasks, own, counts = (
            np.concatenate([getattr(self, name), getattr(one, name)], -1)
            for name in ("levels", "tasks", "own", "counts")
        )
        return self.of(levels, tasks, own, self.shared, counts, side)


def make_nodes(effect: FloatArray, length: FloatArray, features: FloatArray, side: QuerySide, learnt: Learnt) -> Nodes:
    """Every expert's node from a whole table [Q, K]: what the network's forward pass over the whole graph gives.

    Expert by expert, so that memory goes with the edges. NaN is where nothing was observed; an edge needs an effect.
    """
    attention, along = side.attention(features), features @ side.directions
    made, shared = zip(
        *(
            _make_outcome(effect, values, attention, along, learnt, outcome)
            for outcome, values in ((EFFECT, effect), (LENGTH, length))
        ),
        strict=True,
    )
    return _stacked(made, np.stack(shared), side)


def _make_outcome(
    effect: FloatArray, values: FloatArray, attention: FloatArray, along: FloatArray, learnt: Learnt, outcome: int
) -> tuple[list[ExpertNode], FloatArray]:
    """The experts' nodes for one outcome, and what they share along the directions [P]."""
    rows = [np.flatnonzero(np.isfinite(effect[:, e]) & np.isfinite(values[:, e])) for e in range(values.shape[1])]
    observed = [values[seen, e] for e, seen in enumerate(rows)]
    mean = float(np.concatenate(observed).mean()) if any(map(len, observed)) else 0.0
    seen_by = np.bincount(np.concatenate(rows), minlength=len(values)).astype(np.float32)
    trust, zero = float(learnt.task_counts_as[outcome]), np.zeros(along.shape[1], np.float32)
    surprise, hardness = np.zeros((2, len(values)), np.float64)
    for seen, found in zip(rows, observed, strict=True):
        surprise[seen] += found - _level(found, mean)
    common = (attention.T @ surprise / (attention.T @ seen_by + TASK_COUNTS_AS)).astype(np.float32)

    def node(e: int, shared: FloatArray, gains: FloatArray) -> ExpertNode:
        seen = rows[e]
        return expert_node(
            observed[e], attention[seen], along[seen], along[seen] @ shared, prior=(mean, common),
            task_counts_as=trust, own_gains=gains,
        )  # fmt: skip

    nodes = [node(e, zero, zero) for e in range(len(rows))]
    for seen, found, made in zip(rows, observed, nodes, strict=True):
        hardness[seen] += found - made.expected(attention[seen], along[seen])
    hardness /= np.maximum(seen_by, 1)
    shared = learnt.shared_gains[outcome] * (along.T @ hardness) / ((seen_by > 0).sum() + DIRECTION_COUNTS_AS)
    shared = shared.astype(np.float32)
    own_gains = learnt.own_gains[outcome]
    return [node(e, shared, own_gains) for e in range(len(rows))] if own_gains.any() else nodes, shared


def _stacked(made: Sequence[Sequence[ExpertNode]], shared: FloatArray, side: QuerySide) -> Nodes:
    levels = np.array([[node.level for node in row] for row in made], np.float32)
    tasks = np.stack([np.stack([node.level + node.tasks for node in row], 1) for row in made]).astype(np.float32)
    own = np.stack([np.stack([node.own for node in row], 1) for row in made])
    counts = np.stack([node.counts for node in made[EFFECT]], 1)
    return Nodes.of(levels, tasks, own, shared, counts, side)


def _level(values: FloatArray, prior: float) -> float:
    return (float(values.sum()) + LEVEL_COUNTS_AS * prior) / (len(values) + LEVEL_COUNTS_AS)
