"""GraphRouter's network on PyTorch Geometric: what is trained, on samples of the graph.

Nodes are tasks, queries and experts. Edges say which task a query is of, where that is known, and what was observed of
an expert on a query. The forward pass makes the task nodes by messages from their queries, then the expert nodes of
`routers.graph_state` by messages along observed edges, and reads off the estimates of other queries, which have no
edges of either kind: as at serving. So what is learnt is how to *make* nodes of edges, and a task or an expert that
joins later is no special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.nn import MessagePassing

from routers.graph_state import DESCRIPTION_COUNTS_AS, LEVEL_COUNTS_AS, OUTCOMES, TASK_COUNTS_AS

OF = ("query", "of", "task")
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
class ExpertNodes:
    """Expert nodes for one outcome: `level` [E], `tasks` [E, T] beside it."""

    level: Tensor
    tasks: Tensor

    def expected(self, membership: Tensor) -> Tensor:
        """Of every expert, for queries of `membership` [B, T]: [B, E]."""
        return self.level + membership @ self.tasks.T

    def along(self, membership: Tensor, query: Tensor, expert: Tensor) -> Tensor:
        """As `expected`, along the edges [M] from `query` to `expert` alone."""
        return self.level[expert] + (membership[query] * self.tasks[expert]).sum(1)


class GraphNetwork(nn.Module):
    """The trained parameters: `projection` [F, P], in which a query is near its task; how far nodes trust messages.

    `offsets` [T, P] and `bias` [T] are what training adds to the places of the tasks that it knows; a task that joins
    later has no offset.
    `link` is what makes a chance of an estimate with the paper's loss: sigmoid(link[0] * estimate + link[1]).
    """

    def __init__(self, projection: Tensor, tasks: int, *, dropout: float = 0.0, link: bool = False) -> None:
        super().__init__()
        self.projection = nn.Parameter(projection.clone())
        self.offsets = nn.Parameter(torch.zeros(tasks, projection.shape[1]))
        self.bias = nn.Parameter(torch.zeros(tasks))
        self.log_task_counts_as = nn.Parameter(torch.full((OUTCOMES,), 2.7))
        self.link = nn.Parameter(torch.tensor([4.0, -2.0]), requires_grad=link)
        self._dropout = dropout
        self._carry = Carry()

    def forward(self, graph: HeteroData, asked: Tensor) -> Tensor:
        """Estimates for queries with features `asked` [B, F] of each expert and outcome [B, E, 2]."""
        tasks = self.tasks(graph)
        membership = self.log_membership(graph["query"].x, tasks).exp()
        asked_membership = self.log_membership(asked, tasks).exp()
        nodes = [self.experts(graph, membership, outcome) for outcome in range(OUTCOMES)]
        return torch.stack([found.expected(asked_membership) for found in nodes], 2)

    def tasks(self, graph: HeteroData) -> Tensor:
        """The task nodes [T, F]: means of what their queries send, and of their descriptions, where they have one.

        NaN where a task has neither.
        """
        described, edges = graph["task"].described[:, None], graph[OF].edge_index
        sent = self._carry(graph["query"].x, edges, torch.ones(edges.shape[1]), len(described))
        count = self._carry(torch.ones(len(graph["query"].x), 1), edges, torch.ones(edges.shape[1]), len(described))
        told = DESCRIPTION_COUNTS_AS * described
        tasks: Tensor = (sent + told * graph["task"].x) / (count + told)
        return tasks

    def log_membership(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Log of how much each query of features `x` [B, F] belongs to each of the task nodes [T, F]: [B, T]."""
        there = ~tasks.isnan().any(1)
        there |= ~there.any()  # where no task has a node in a sample, learnt offsets alone say where they lie
        kept = nn.functional.dropout(torch.ones(len(self.projection), 1), self._dropout, self.training)
        projection = kept * self.projection  # features are dropped for a whole step: a mask for each query costs more
        places = tasks.nan_to_num() @ projection + self.offsets
        logits = x @ projection @ places.T - (places**2).sum(1) / 2 + self.bias
        return torch.log_softmax(logits.masked_fill(~there, -torch.inf), 1)

    def experts(self, graph: HeteroData, membership: Tensor, outcome: int) -> ExpertNodes:
        """The expert nodes that the graph's edges make, its queries being of `membership` [Q, T]."""
        edges, experts, queries = graph[OBSERVED].edge_index, graph["expert"].num_nodes, len(membership)
        value, known = graph[OBSERVED].edge_attr[:, outcome], graph[OBSERVED].known[:, outcome]
        one = torch.ones_like(membership[:, :1])
        count = self._carry(one, edges, known, experts)
        mean = (value * known).sum() / known.sum().clamp(min=1)
        level = (self._carry(one, edges, value * known, experts) + LEVEL_COUNTS_AS * mean) / (count + LEVEL_COUNTS_AS)
        surprise = (value - level[edges[1], 0]) * known
        back, ones = edges.flip(0), torch.ones_like(level)
        seen = self._carry(ones, back, known, queries)
        common = membership.T @ self._carry(ones, back, surprise, queries) / (membership.T @ seen + TASK_COUNTS_AS)
        trust = self.log_task_counts_as[outcome].exp()
        tasks = self._carry(membership, edges, surprise, experts) + trust * common.T
        return ExpertNodes(level[:, 0], tasks / (self._carry(membership, edges, known, experts) + trust))
