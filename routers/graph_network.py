"""GraphRouter's network on PyTorch Geometric: what is trained, on samples of the graph.

Two node types meet along observed edges, query and expert; the third, task, meets every query by attention. The
forward pass makes the expert nodes of `routers.graph_state` by message passing over whatever part of the graph it is
given, and reads off the estimates of other queries, which have no edges: as at serving. So what is learnt is how to
*make* nodes of edges, and an expert that joins later is no special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.nn import MessagePassing

from routers.graph_state import DIRECTION_COUNTS_AS, LEVEL_COUNTS_AS, OUTCOMES, TASK_COUNTS_AS

OBSERVED = ("query", "observed_on", "expert")


class Carry(MessagePassing):  # type: ignore[misc]
    """Sums, at each node, what its neighbours hold times the weight of the edge: [N, H], [2, M], [M] -> [size, H]."""

    def __init__(self) -> None:
        super().__init__(aggr="sum")

    def forward(self, held: Tensor, edge_index: Tensor, weight: Tensor, size: int) -> Tensor:
        carried: Tensor = self.propagate(edge_index, x=(held, None), weight=weight, size=(len(held), size))
        return carried

    def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
        return x_j * weight[:, None]


@dataclass(frozen=True, slots=True)
class Nodes:
    """Expert nodes for one outcome: `level` [E], `tasks` [E, T], `own` [E, P]; `shared` [P] is one for all experts."""

    level: Tensor
    tasks: Tensor
    own: Tensor
    shared: Tensor

    def expected(self, attention: Tensor, along: Tensor) -> Tensor:
        """For queries with `attention` [B, T] and projections `along` [B, P], of every expert: [B, E]."""
        return self.level + attention @ self.tasks.T + along @ (self.shared + self.own).T


class GraphNetwork(nn.Module):
    """The trained parameters (`graph_state`): attention `tasks` [F, T], `bias` [T]; how far nodes trust messages."""

    def __init__(self, directions: Tensor, tasks: int, *, own: bool, dropout: float = 0.0) -> None:
        super().__init__()
        features, count = directions.shape
        self.register_buffer("directions", directions)
        self.tasks = nn.Parameter(torch.zeros(features, tasks))
        self.bias = nn.Parameter(torch.zeros(tasks))
        self.log_task_counts_as = nn.Parameter(torch.full((OUTCOMES,), 2.7))
        self.shared_gains = nn.Parameter(torch.full((OUTCOMES, count), 0.3))
        self.own_gains = nn.Parameter(torch.full((OUTCOMES, count), 0.1 if own else 0.0), requires_grad=own)
        self._dropout = dropout
        self._carry = Carry()

    def attention(self, x: Tensor) -> Tensor:
        """Log of how much each query of centred features `x` [B, F] is of each task [B, T]."""
        dropped = nn.functional.dropout(x, self._dropout, self.training)
        return torch.log_softmax(dropped @ self.tasks + self.bias, 1)

    def along(self, x: Tensor) -> Tensor:
        """Projections on the directions [B, P]."""
        return x @ self.get_buffer("directions")

    def forward(self, graph: HeteroData, asked: Tensor) -> Tensor:
        """Estimates for queries with features `asked` [B, F] of each expert and outcome [B, E, 2]."""
        x = graph["query"].x
        logs = self.attention(torch.cat([x, asked]))
        return self.estimate(graph, logs[: len(x)].exp(), logs[len(x) :].exp(), asked)

    def estimate(self, graph: HeteroData, attention: Tensor, asked_attention: Tensor, asked: Tensor) -> Tensor:
        """As `forward`, with the attention of the graph's queries [Q, T] and of those asked [B, T] at hand."""
        along, asked_along = self.along(graph["query"].x), self.along(asked)
        nodes = [self.nodes(graph, attention, along, outcome) for outcome in range(OUTCOMES)]
        return torch.stack([found.expected(asked_attention, asked_along) for found in nodes], 2)

    def nodes(self, graph: HeteroData, attention: Tensor, along: Tensor, outcome: int) -> Nodes:
        """The expert nodes that the graph's edges make."""
        edges, experts, queries = graph[OBSERVED].edge_index, graph["expert"].num_nodes, len(attention)
        value, known = graph[OBSERVED].edge_attr[:, outcome], graph[OBSERVED].known[:, outcome]
        at_query, at_expert = edges
        one = torch.ones_like(attention[:, :1])
        count = self._carry(one, edges, known, experts)
        mean = (value * known).sum() / known.sum().clamp(min=1)
        level = (self._carry(one, edges, value * known, experts) + LEVEL_COUNTS_AS * mean) / (count + LEVEL_COUNTS_AS)
        surprise = (value - level[at_expert, 0]) * known
        back = edges.flip(0)
        ones = torch.ones_like(level)
        seen = self._carry(ones, back, known, queries)
        common = attention.T @ self._carry(ones, back, surprise, queries) / (attention.T @ seen + TASK_COUNTS_AS)
        trust = self.log_task_counts_as[outcome].exp()
        tasks = self._carry(attention, edges, surprise, experts) + trust * common.T
        tasks = tasks / (self._carry(attention, edges, known, experts) + trust)
        surprise = surprise - (attention[at_query] * tasks[at_expert]).sum(1) * known
        hardness = self._carry(ones, back, surprise, queries) / seen.clamp(min=1)
        shared = self.shared_gains[outcome] * (along.T @ hardness)[:, 0] / ((seen > 0).sum() + DIRECTION_COUNTS_AS)
        own = torch.zeros(experts, along.shape[1])
        if self.own_gains.requires_grad:
            surprise = surprise - (along @ shared)[at_query] * known
            own = self.own_gains[outcome] * self._carry(along, edges, surprise, experts) / (count + DIRECTION_COUNTS_AS)
        return Nodes(level[:, 0], tasks, own, shared)
