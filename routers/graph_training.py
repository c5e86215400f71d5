"""Training of GraphRouter's network: samples of the graph, half of it hidden; the best step by queries held out.

Every step draws queries, makes expert nodes of the edges of one half, and is scored on the edges of the other half,
whose queries bring no edges of their own: that is what serving looks like. (The paper hides random edges, so that a
query's other edges may give it away.) The loss of an estimate is its squared error, of the differences between experts
in full and of what they have in common at a fraction, since only differences choose; or, as the paper has it, the
cross-entropy of being the expert of the highest utility. Where queries lie among tasks is taught by the table's labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from routers.checkpoint import Checkpoint
from routers.contracts import FloatArray
from routers.graph_network import OBSERVED, OF, GraphNetwork
from routers.graph_state import EFFECT, LENGTH

Ints = npt.NDArray[np.int64]

_HELD_OUT = 0.15
_QUERIES_PER_STEP = 8192
_STEPS_PER_CHECK = 10
_PATIENCE = 60
_COMMON_WEIGHT = 0.3
_LENGTH_WEIGHT = 0.05
_LABEL_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Steps of Adam and what they minimise; `decay` is a squared penalty on the weights of features."""

    steps: int
    learning_rate: float
    decay: float
    dropout: float
    loss: Literal["effect", "one_hot"]
    seed: int


@dataclass(frozen=True, slots=True)
class Graph:
    """The whole graph as arrays: `x` [Q, F], `label` [Q] (-1 where none), edges in the order of their queries.

    `descriptions` [T, F] are features of the tasks' descriptions, NaN where a task has none. `outcome` [M, 2] are the
    effect and length of each edge, 0 where not `known` [M, 2]; edges of query q are `first[q]`..`first[q + 1]`.
    `target` [M] is what the effect that an estimate foretells is held against.
    """

    x: FloatArray
    label: Ints
    descriptions: FloatArray
    experts: int
    expert: Ints
    outcome: FloatArray
    known: FloatArray
    target: FloatArray
    first: Ints

    @classmethod
    def of(
        cls,
        x: FloatArray,
        label: Ints,
        descriptions: FloatArray,
        effect: FloatArray,
        length: FloatArray,
        target: FloatArray | None = None,
    ) -> Graph:
        """From tables [Q, E] that are NaN where nothing was observed; an edge needs an effect, which is the target."""
        query, expert = np.nonzero(np.isfinite(effect))
        values = np.stack([effect[query, expert], length[query, expert]], 1)
        return cls(
            x, label, descriptions, effect.shape[1], expert,
            outcome=np.nan_to_num(values),
            known=np.isfinite(values).astype(np.float32),
            target=(effect if target is None else target)[query, expert],
            first=np.searchsorted(query, np.arange(len(x) + 1)),
        )  # fmt: skip

    def part(self, queries: Ints) -> HeteroData:
        """The part of the graph around `queries`, for PyTorch Geometric."""
        counts = self.first[queries + 1] - self.first[queries]
        ends = np.cumsum(counts)
        edges = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.first[queries] - (ends - counts), counts)
        graph = HeteroData()
        graph["query"].x = torch.from_numpy(self.x[queries])
        graph["query"].label = torch.from_numpy(self.label[queries])
        graph["task"].x = torch.from_numpy(np.nan_to_num(self.descriptions))
        graph["task"].described = torch.from_numpy(np.isfinite(self.descriptions).all(1).astype(np.float32))
        labelled = np.flatnonzero(self.label[queries] >= 0)
        graph[OF].edge_index = torch.from_numpy(np.stack([labelled, self.label[queries][labelled]]))
        graph["expert"].num_nodes = self.experts
        graph[OBSERVED].edge_index = torch.from_numpy(
            np.stack([np.repeat(np.arange(len(queries)), counts), self.expert[edges]])
        )
        graph[OBSERVED].edge_attr = torch.from_numpy(self.outcome[edges])
        graph[OBSERVED].known = torch.from_numpy(self.known[edges])
        graph[OBSERVED].target = torch.from_numpy(self.target[edges])
        return graph


def train_network(
    graph: Graph, network: GraphNetwork, options: TrainingOptions, checkpoint: Checkpoint
) -> GraphNetwork:
    """`network` at its best step. The same graph and options give the same parameters, killed in between or not."""
    _Run(graph, network, options, checkpoint).finish()
    return network.eval()


class _Run:
    """A training that can be taken up where it stopped."""

    def __init__(self, graph: Graph, network: GraphNetwork, options: TrainingOptions, checkpoint: Checkpoint) -> None:
        self._graph, self._network, self._options, self._checkpoint = graph, network, options, checkpoint
        order = np.random.default_rng(options.seed).permutation(np.flatnonzero(np.diff(graph.first)))
        held_out = max(1, round(_HELD_OUT * len(order)))
        self._held_out, self._fitted = order[:held_out], order[held_out:]
        if not len(self._fitted):
            self._fitted = order
        named = dict(network.named_parameters())
        self._names = [name for name, parameter in named.items() if parameter.requires_grad]
        self._optimiser = torch.optim.Adam([named[name] for name in self._names], lr=options.learning_rate)
        self._best = {name: parameter.detach().clone() for name, parameter in named.items()}
        self._least, self._best_step = float("inf"), 0

    def finish(self) -> None:
        """Train to the end, and leave the best parameters in the network."""
        steps = self._options.steps
        for step in range(self._resume(), steps):
            if step - self._best_step >= _PATIENCE:
                break
            self._step(step)
            if (step + 1) % _STEPS_PER_CHECK == 0 or step + 1 == steps:
                self._check(step + 1)
            self._checkpoint.step(step + 1, steps, self._state)
        self._network.load_state_dict(self._best, strict=False)

    def _step(self, step: int) -> None:
        torch.manual_seed((self._options.seed << 20) + step)  # so that a step is the same after a kill
        rng = np.random.default_rng([self._options.seed, step])
        drawn = rng.permutation(self._fitted)[:_QUERIES_PER_STEP]
        half = len(drawn) // 2
        loss = self._loss(self._network.train(), self._graph.part(drawn[:half]), self._graph.part(drawn[half:]))
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()

    def _check(self, step: int) -> None:
        seen = self._graph.part(self._fitted[:_QUERIES_PER_STEP])
        with torch.no_grad():
            hidden = self._graph.part(self._held_out[:_QUERIES_PER_STEP])
            loss = float(self._loss(self._network.eval(), seen, hidden))
        if loss < self._least:
            self._least, self._best_step = loss, step
            self._best = {name: value.detach().clone() for name, value in self._network.named_parameters()}

    def _loss(self, network: GraphNetwork, seen: HeteroData, hidden: HeteroData) -> Tensor:
        tasks = network.tasks(seen)
        logs = network.log_membership(hidden["query"].x, tasks)
        membership = network.log_membership(seen["query"].x, tasks).exp()
        edges = hidden[OBSERVED]
        effect, length = (
            network.experts(seen, membership, outcome).along(logs.exp(), *edges.edge_index)
            for outcome in (EFFECT, LENGTH)
        )
        if self._options.loss == "one_hot":
            logits = network.link[0] * effect + network.link[1]
            of_effect = torch.nn.functional.binary_cross_entropy_with_logits(logits, edges.target)
        else:
            of_effect = _differences(effect - edges.target, edges.edge_index[0], len(logs))
        error = (length - edges.edge_attr[:, LENGTH]) * edges.known[:, LENGTH]
        of_length = torch.nn.functional.huber_loss(error, torch.zeros_like(error))
        weights = network.projection @ (tasks.nan_to_num() @ network.projection + network.offsets).T
        of_tasks = _taught(logs, hidden["query"].label) + self._options.decay * (weights**2).sum()
        return of_effect + _LENGTH_WEIGHT * of_length + _LABEL_WEIGHT * of_tasks

    def _resume(self) -> int:
        found = self._checkpoint.load()
        if found is None:
            return 0
        step, arrays = found
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        self._network.load_state_dict({name: tensors[f"now.{name}"] for name in self._names}, strict=False)
        self._best = {name: tensors[f"best.{name}"] for name in self._best}
        self._least, self._best_step = float(arrays["least"][0]), int(arrays["best_step"][0])
        state = {place: _moments(tensors, name) for place, name in enumerate(self._names)}
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": state})
        return step

    def _state(self) -> Mapping[str, npt.NDArray[Any]]:
        named = dict(self._network.named_parameters())
        arrays: dict[str, npt.NDArray[Any]] = {f"best.{name}": value.numpy() for name, value in self._best.items()}
        for name in self._names:
            arrays[f"now.{name}"] = named[name].detach().numpy()
            arrays |= {f"{key}.{name}": value.numpy() for key, value in self._optimiser.state[named[name]].items()}
        return {**arrays, "least": np.array([self._least]), "best_step": np.array([self._best_step])}


def _moments(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}


def _differences(error: Tensor, query: Tensor, queries: int) -> Tensor:
    """Mean square of each error beside its query's mean, and of that mean at a fraction."""
    count = torch.bincount(query, minlength=queries).clamp(min=1)
    common = torch.zeros(queries).index_add(0, query, error) / count
    return ((error - common[query]) ** 2).mean() + _COMMON_WEIGHT * (common**2).mean()


def _taught(logs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of being of one's own task, where that is known and has a node; 0 where none is."""
    known = (labels >= 0) & logs.gather(1, labels.clamp(min=0)[:, None])[:, 0].isfinite()
    if not known.any():
        return torch.zeros(())
    return torch.nn.functional.nll_loss(logs[known], labels[known])
