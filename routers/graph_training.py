"""Training of GraphRouter's network: samples of the graph, half of it hidden; the best step by queries held out.

Every step draws queries, makes expert nodes of the edges of one half, and is scored on the edges of the other half,
whose queries bring no edges of their own: that is what serving looks like. (The paper hides random edges, so that a
query's other edges may give it away.) The loss of an estimate is its squared error, of the differences between experts
in full and of what they have in common at a fraction, since only differences choose; or, as the paper has it, the
cross-entropy of being the expert of the highest utility. The attention over tasks is taught by the table's labels.
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
from routers.graph_network import OBSERVED, GraphNetwork
from routers.graph_state import EFFECT, LENGTH, Learnt

Ints = npt.NDArray[np.int64]

_HELD_OUT = 0.15
_QUERIES_PER_STEP = 8192
_STEPS_PER_CHECK = 10
_PATIENCE = 60
_COMMON_WEIGHT = 0.3
_LENGTH_WEIGHT = 0.05
_LABEL_WEIGHT = 0.1
_NARROW = 1e-4


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Steps of Adam and what they minimise; `decay` is a squared penalty on the attention's weights."""

    steps: int
    learning_rate: float
    decay: float
    dropout: float
    loss: Literal["effect", "one_hot"]
    own_directions: bool
    seed: int


@dataclass(frozen=True, slots=True)
class Graph:
    """The whole graph as arrays: `x` [Q, F], `label` [Q] (-1 where none), edges in the order of their queries.

    `outcome` [M, 2] are effect and length of each edge, 0 where not `known` [M, 2]; edges of query q are
    `first[q]`..`first[q + 1]`.
    """

    x: FloatArray
    label: Ints
    experts: int
    expert: Ints
    outcome: FloatArray
    known: FloatArray
    first: Ints

    @classmethod
    def of(cls, x: FloatArray, label: Ints, effect: FloatArray, length: FloatArray) -> Graph:
        """From tables [Q, E] that are NaN where nothing was observed; an edge needs an effect."""
        query, expert = np.nonzero(np.isfinite(effect))
        values = np.stack([effect[query, expert], length[query, expert]], 1)
        first = np.searchsorted(query, np.arange(len(x) + 1))
        known = np.isfinite(values).astype(np.float32)
        return cls(x, label, effect.shape[1], expert, np.nan_to_num(values), known, first)

    def part(self, queries: Ints) -> HeteroData:
        """The part of the graph around `queries`, for PyTorch Geometric."""
        counts = self.first[queries + 1] - self.first[queries]
        ends = np.cumsum(counts)
        edges = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.first[queries] - (ends - counts), counts)
        graph = HeteroData()
        graph["query"].x = torch.from_numpy(self.x[queries])
        graph["query"].label = torch.from_numpy(self.label[queries])
        graph["expert"].num_nodes = self.experts
        graph[OBSERVED].edge_index = torch.from_numpy(
            np.stack([np.repeat(np.arange(len(queries)), counts), self.expert[edges]])
        )
        graph[OBSERVED].edge_attr = torch.from_numpy(self.outcome[edges])
        graph[OBSERVED].known = torch.from_numpy(self.known[edges])
        return graph


def train_network(
    graph: Graph, directions: FloatArray, tasks: int, options: TrainingOptions, checkpoint: Checkpoint
) -> GraphNetwork:
    """The network at its best step. The same graph and options give the same parameters, killed in between or not."""
    torch.manual_seed(options.seed)
    network = GraphNetwork(torch.from_numpy(directions), tasks, own=options.own_directions, dropout=options.dropout)
    _Run(graph, network, options, checkpoint).finish()
    return network.eval()


def learnt(network: GraphNetwork) -> Learnt:
    """The parameters of messages, as arrays."""
    with torch.no_grad():
        return Learnt(*(
            found.detach().clone().numpy()
            for found in (network.log_task_counts_as.exp(), network.shared_gains, network.own_gains)
        ))  # fmt: skip


class _Run:
    """A training that can be taken up where it stopped."""

    def __init__(self, graph: Graph, network: GraphNetwork, options: TrainingOptions, checkpoint: Checkpoint) -> None:
        self._graph, self._network, self._options, self._checkpoint = graph, network, options, checkpoint
        order = np.random.default_rng(options.seed).permutation(len(graph.x))
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
            loss = float(self._loss(self._network.eval(), seen, hidden, taught_by_seen=False))
        if loss < self._least:
            self._least, self._best_step = loss, step
            self._best = {name: value.detach().clone() for name, value in self._network.named_parameters()}

    def _loss(
        self, network: GraphNetwork, seen: HeteroData, hidden: HeteroData, *, taught_by_seen: bool = True
    ) -> Tensor:
        asked = hidden["query"].x
        logs, asked_logs = network.attention(seen["query"].x), network.attention(asked)
        estimates = network.estimate(seen, logs.exp(), asked_logs.exp(), asked)
        query, expert = hidden[OBSERVED].edge_index
        error = (estimates[query, expert] - hidden[OBSERVED].edge_attr) * hidden[OBSERVED].known
        if self._options.loss == "one_hot":
            effect = _cross_entropy(estimates[query, expert, EFFECT], hidden[OBSERVED].edge_attr[:, EFFECT])
        else:
            effect = _differences(error[:, EFFECT], query, len(asked))
        length = torch.nn.functional.huber_loss(error[:, LENGTH], torch.zeros_like(error[:, LENGTH]))
        labels, taught = hidden["query"].label, asked_logs
        if taught_by_seen:
            labels, taught = torch.cat([seen["query"].label, labels]), torch.cat([logs, taught])
        decay = self._options.decay * (network.tasks**2).sum()
        return effect + _LENGTH_WEIGHT * length + _LABEL_WEIGHT * (_taught(taught, labels) + decay)

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


def _cross_entropy(chance: Tensor, label: Tensor) -> Tensor:
    chance = chance.clamp(_NARROW, 1 - _NARROW)
    return -(label * chance.log() + (1 - label) * (1 - chance).log()).mean()


def _taught(logs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the attention where a label is known; 0 where none is."""
    known = labels >= 0
    if not known.any():
        return torch.zeros(())
    return torch.nn.functional.nll_loss(logs[known], labels[known])
