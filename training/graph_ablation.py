"""GraphRouter with one part changed or taken away, to measure what it brings: variants that nobody serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from routers.contracts import FloatArray, Observations
from routers.graph_network import ExpertNodes, GraphNetwork
from routers.graph_router import GraphRouter, Labels, is_best
from routers.graph_state import EFFECT, OUTCOMES, Nodes

_NO_OPTIONS: Mapping[str, Any] = {}


class TasksFromClusters(GraphRouter):
    """Task nodes of clusters of queries, as if no label were known."""

    def _labels(self, table: Observations, embeddings: FloatArray) -> tuple[Labels, list[str]]:
        return super()._labels(replace(table, tasks=[""] * len(table)), embeddings)


class WithoutTasks(GraphRouter):
    """One task node for all queries."""

    def _labels(self, table: Observations, embeddings: FloatArray) -> tuple[Labels, list[str]]:
        return np.zeros(len(table), np.int64), ["all"]


class _TaskParameters(GraphNetwork):
    def __init__(self, projection: Tensor, tasks: int, *, dropout: float) -> None:
        super().__init__(projection, tasks, dropout=dropout)
        self.task_nodes = nn.Parameter(torch.zeros(tasks, len(projection)))

    def tasks(self, graph: HeteroData) -> Tensor:
        return self.task_nodes


class TasksWithoutMessages(GraphRouter):
    """Task nodes that are parameters, which training finds, instead of messages from their queries."""

    def _network(self, projection: FloatArray, experts: int, tasks: int) -> GraphNetwork:
        return _TaskParameters(torch.from_numpy(projection), tasks, dropout=self.config.dropout)

    def _made_tasks(
        self, network: GraphNetwork, features: FloatArray, label: Labels, descriptions: FloatArray
    ) -> FloatArray:
        found: FloatArray = network.get_parameter("task_nodes").detach().numpy().copy()
        return found


class TasksOfMessagesAlone(GraphRouter):
    """Task nodes to which training adds nothing."""

    def _network(self, projection: FloatArray, experts: int, tasks: int) -> GraphNetwork:
        network = super()._network(projection, experts, tasks)
        network.offsets.requires_grad_(False)
        network.bias.requires_grad_(False)
        return network


class _ExpertParameters(GraphNetwork):
    def __init__(self, projection: Tensor, experts: int, tasks: int, *, dropout: float) -> None:
        super().__init__(projection, tasks, dropout=dropout)
        self.levels = nn.Parameter(torch.tensor([[0.5], [1.0]]).repeat(1, experts))
        self.beside = nn.Parameter(torch.zeros(OUTCOMES, experts, tasks))

    def experts(self, graph: HeteroData, membership: Tensor, outcome: int) -> ExpertNodes:
        return ExpertNodes(self.levels[outcome], self.beside[outcome])


class ExpertsWithoutMessages(GraphRouter):
    """Expert nodes that are parameters, which training finds, instead of messages along observed edges."""

    def _network(self, projection: FloatArray, experts: int, tasks: int) -> GraphNetwork:
        return _ExpertParameters(torch.from_numpy(projection), experts, tasks, dropout=self.config.dropout)

    def _made_experts(
        self, network: GraphNetwork, carried: FloatArray, length: FloatArray, membership: FloatArray
    ) -> Nodes:
        made = super()._made_experts(network, carried, length, membership)
        levels, beside = (network.get_parameter(name).detach().numpy().copy() for name in ("levels", "beside"))
        return Nodes(levels, levels[:, None] + beside.transpose(0, 2, 1), made.counts)


class _Rescaled(GraphNetwork):
    """Estimates of effect of what edges carry, by a line: an expert that is often the best is not right as often."""

    def __init__(self, projection: Tensor, tasks: int, *, dropout: float) -> None:
        super().__init__(projection, tasks, dropout=dropout)
        self.line = nn.Parameter(torch.tensor([1.0, 0.0]))

    def experts(self, graph: HeteroData, membership: Tensor, outcome: int) -> ExpertNodes:
        found = super().experts(graph, membership, outcome)
        if outcome != EFFECT:
            return found
        return ExpertNodes(self.line[0] * found.level + self.line[1], self.line[0] * found.tasks)


class EdgesOfTheBest(GraphRouter):
    """Edges that carry who was best of a query's experts, not how good each was; the loss stays."""

    def _effects(self, table: Observations) -> tuple[FloatArray, FloatArray]:
        return is_best(table, 1.0, 0.0), table.quality

    def _network(self, projection: FloatArray, experts: int, tasks: int) -> GraphNetwork:
        return _Rescaled(torch.from_numpy(projection), tasks, dropout=self.config.dropout)

    def _made_experts(
        self, network: GraphNetwork, carried: FloatArray, length: FloatArray, membership: FloatArray
    ) -> Nodes:
        made = super()._made_experts(network, carried, length, membership)
        slope, offset = network.get_parameter("line").detach().tolist()
        levels, tasks = made.levels.copy(), made.tasks.copy()
        levels[EFFECT], tasks[EFFECT] = slope * levels[EFFECT] + offset, slope * tasks[EFFECT] + offset
        return Nodes(levels, tasks, made.counts)


class EdgesWithoutLength(GraphRouter):
    """Edges that say nothing of an answer's length: every answer of an expert is expected to be of its mean length."""

    def _lengths(self, table: Observations) -> FloatArray:
        return np.where(np.isfinite(super()._lengths(table)), np.float32(1), np.float32(np.nan))


class LossOfTheBest(GraphRouter):
    """The paper's one-hot loss at its Performance First, on edges that carry effects."""

    def _effects(self, table: Observations) -> tuple[FloatArray, FloatArray]:
        return table.quality, is_best(table, 1.0, 0.0)


VARIANTS: Mapping[str, tuple[type[GraphRouter], Mapping[str, Any]]] = {
    "as it is": (GraphRouter, _NO_OPTIONS),
    "tasks: from clusters, not from labels": (TasksFromClusters, _NO_OPTIONS),
    "tasks: none": (WithoutTasks, _NO_OPTIONS),
    "tasks: of messages alone, with no learnt offset": (TasksOfMessagesAlone, _NO_OPTIONS),
    "messages: none to tasks, their nodes are parameters": (TasksWithoutMessages, _NO_OPTIONS),
    "messages: none to experts, their nodes are parameters": (ExpertsWithoutMessages, _NO_OPTIONS),
    "edges: who was best, not how good each was": (EdgesOfTheBest, _NO_OPTIONS),
    "edges: no length": (EdgesWithoutLength, _NO_OPTIONS),
    "loss: one-hot": (LossOfTheBest, {"loss": "one_hot"}),
}
"""By what is changed: a class and its options."""
