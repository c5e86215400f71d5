"""What the nodes of GraphRouter's graph are at serving time: arrays, and the messages that make them.

A query has features f [F]. Task node t is the mean x_t of its queries' features, of its description's where that is all
there is. A query belongs to the tasks that it is near in the learnt projection P,

    p = softmax_t(b_t - |P'f - P'x_t - o_t|^2 / 2)

where the offset o_t and the bias b_t are learnt of tasks trained on; those that join have no offset. For one outcome
(effect, or answer length over the expert's mean length) an expert's node has a level and a number for each task beside
it, and the estimate is

    level[e] + p . tasks[:, e]

Task and expert nodes are constants, so no graph is needed to serve. A node is made of messages along observed edges
alone: each observed query sends its expert a surprise (what was observed less what is expected so far), first to the
expert's level, then split over the tasks that the query belongs to. Every sum is shrunk towards a prior as if that many
more observations had shown it, so that 16 edges and 4,000 are one formula, and an expert that joins later needs no
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, cast

import numpy as np
import numpy.typing as npt

from routers.contracts import FloatArray

LEVEL_COUNTS_AS = 8.0
"""Observations that the prior of an expert's level counts as: (noise of one / spread of experts around it) squared."""
TASK_COUNTS_AS = 1.0
"""Observations that 'this task is as hard as any' counts as, for what all experts show of a task together."""
DESCRIPTION_COUNTS_AS = 8.0
"""Queries that a task's description counts as."""

EFFECT, LENGTH = 0, 1
OUTCOMES = 2

_LEAD = 1.0  # of the logits of a task that joins over those of others, where it lies

MadeOf = Literal["queries", "description", "nearest tasks"]


@dataclass(frozen=True, slots=True)
class TaskNode:
    """A task: its name, what its node is made of, and the tasks near it and how near, which sum to 1.

    A node made of "queries" stands on what was observed of them, its description beside them where it has one. One made
    of its "description", or put among the "nearest tasks" of some examples, expects of every expert what its `nearest`
    tasks show.
    """

    name: str
    made_of: MadeOf
    nearest: dict[str, float]


@dataclass(frozen=True, slots=True)
class Tasks:
    """The T task nodes: `features` [T, F], `offsets` [T, P] and `bias` [T]; `projection` [F, P] in which near is alike.

    `reach` [T] is the cosine to its embedding that nearly all of a task's own queries have.
    """

    nodes: tuple[TaskNode, ...]
    features: FloatArray
    offsets: FloatArray
    bias: FloatArray
    reach: FloatArray
    projection: FloatArray

    def linear(self) -> tuple[FloatArray, FloatArray]:
        """Weights [F, T] and bias [T]: the squared distances of a query, without what is the same for all tasks."""
        places = self.features @ self.projection + self.offsets
        return cast("FloatArray", self.projection @ places.T), cast("FloatArray", self.bias - (places**2).sum(1) / 2)

    def membership(self, features: FloatArray) -> FloatArray:
        """How much each query of `features` [B, F] belongs to each task [B, T]; rows sum to 1."""
        weights, bias = self.linear()
        return softmax(features @ weights + bias)

    def joined(self, node: TaskNode, features: FloatArray, reach: float) -> Self:
        """With one more, of `features` [F]; its bias is what makes a query that lies just there belong to it first."""
        weights, bias = self.linear()
        lead = float((features @ weights + bias).max() - ((features @ self.projection) ** 2).sum() / 2)
        return replace(
            self,
            nodes=(*self.nodes, node),
            features=np.vstack([self.features, features]),
            offsets=np.vstack([self.offsets, np.zeros_like(self.offsets[:1])]),
            bias=np.append(self.bias, np.float32(max(0.0, lead + _LEAD))),
            reach=np.append(self.reach, np.float32(reach)),
        )


def task_features(features: FloatArray, label: npt.NDArray[np.int64], descriptions: FloatArray) -> FloatArray:
    """Task nodes [T, F] of the queries' `features` [Q, F], those of `label` [Q] t, and of their descriptions.

    `label` is -1 where no task is known, `descriptions` [T, F] NaN where there is none; each task has one or the other.
    """
    told = DESCRIPTION_COUNTS_AS * np.isfinite(descriptions[:, :1])
    sent, count = np.zeros((len(descriptions), features.shape[1]), np.float64), np.zeros((len(descriptions), 1))
    np.add.at(sent, label[label >= 0], features[label >= 0])
    np.add.at(count, label[label >= 0], 1)
    return cast("FloatArray", ((sent + told * np.nan_to_num(descriptions)) / (count + told)).astype(np.float32))


def softmax(logits: FloatArray) -> FloatArray:
    """Of each row."""
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return cast("FloatArray", weights / weights.sum(1, keepdims=True))


@dataclass(frozen=True, slots=True)
class ExpertNode:
    """One expert and outcome: `level`, `tasks` [T] beside it; `counts` [T] observed."""

    level: float
    tasks: FloatArray
    counts: FloatArray


def expert_node(
    values: FloatArray, membership: FloatArray, *, prior: tuple[float, FloatArray], task_counts_as: float
) -> ExpertNode:
    """The node that N observed `values` on queries of some `membership` [N, T] make.

    `prior` is the level and the tasks [T] that are expected before anything is observed.
    """
    level, tasks = _level(values, prior[0]), prior[1]
    counts = membership.sum(0)
    tasks = (membership.T @ (values - level) + task_counts_as * tasks) / (counts + task_counts_as)
    return ExpertNode(level, tasks.astype(np.float32), counts.astype(np.float32))


@dataclass(frozen=True, slots=True)
class Nodes:
    """K experts' nodes: `levels` [2, K], `tasks` [2, T, K] with the levels in them, `counts` [T, K] observed."""

    levels: FloatArray
    tasks: FloatArray
    counts: FloatArray

    @classmethod
    def of(cls, made: Sequence[Sequence[ExpertNode]]) -> Self:
        """From the nodes of every outcome and expert."""
        return cls(
            np.array([[node.level for node in row] for row in made], np.float32),
            np.stack([np.stack([node.level + node.tasks for node in row], 1) for row in made]).astype(np.float32),
            np.stack([node.counts for node in made[EFFECT]], 1),
        )

    def columns(self, keep: npt.NDArray[np.intp]) -> Self:
        """Of the experts at `keep` alone."""
        return type(self)(self.levels[:, keep], self.tasks[:, :, keep], self.counts[:, keep])

    def expected(self, outcome: int, membership: FloatArray) -> FloatArray:
        """The estimates [B, K]."""
        return cast("FloatArray", membership @ self.tasks[outcome])

    def with_expert(self, made: Sequence[ExpertNode]) -> Self:
        """With one more expert, whose nodes are `made`, one for each outcome."""
        one = self.of([[node] for node in made])
        return type(self)(*(
            np.concatenate([getattr(self, name), getattr(one, name)], -1) for name in ("levels", "tasks", "counts")
        ))  # fmt: skip

    def with_task(self, nearest: FloatArray) -> Self:
        """With one more task, nothing observed of it: what the tasks it is near to, by `nearest` [T], show."""
        tasks = np.concatenate([self.tasks, (nearest @ self.tasks)[:, None]], 1)
        return type(self)(self.levels, tasks, np.vstack([self.counts, np.zeros_like(self.counts[:1])]))


def make_nodes(effect: FloatArray, length: FloatArray, membership: FloatArray, task_counts_as: FloatArray) -> Nodes:
    """Every expert's node from a whole table [Q, K]: what the network's forward pass over the whole graph gives.

    Expert by expert, so that memory goes with the edges. NaN is where nothing was observed; an edge needs an effect.
    """
    return Nodes.of([
        _make_outcome(effect, values, membership, float(task_counts_as[outcome]))
        for outcome, values in ((EFFECT, effect), (LENGTH, length))
    ])  # fmt: skip


def _make_outcome(
    effect: FloatArray, values: FloatArray, membership: FloatArray, task_counts_as: float
) -> list[ExpertNode]:
    rows = [np.flatnonzero(np.isfinite(effect[:, e]) & np.isfinite(values[:, e])) for e in range(values.shape[1])]
    observed = [values[seen, e] for e, seen in enumerate(rows)]
    mean = float(np.concatenate(observed).mean()) if any(map(len, observed)) else 0.0
    seen_by = np.bincount(np.concatenate(rows), minlength=len(values)).astype(np.float32)
    surprise = np.zeros(len(values), np.float64)
    for seen, found in zip(rows, observed, strict=True):
        surprise[seen] += found - _level(found, mean)
    common = (membership.T @ surprise / (membership.T @ seen_by + TASK_COUNTS_AS)).astype(np.float32)
    return [
        expert_node(found, membership[seen], prior=(mean, common), task_counts_as=task_counts_as)
        for seen, found in zip(rows, observed, strict=True)
    ]


def _level(values: FloatArray, prior: float) -> float:
    return (float(values.sum()) + LEVEL_COUNTS_AS * prior) / (len(values) + LEVEL_COUNTS_AS)
