"""GraphRouter: who is good at what, read off a graph of tasks, queries and experts.

After GraphRouter (ICLR 2025, arXiv 2410.03834), with the third node type that the paper promises, task nodes, and with
effect and length predicted for each edge, so that one trained router serves every weighing of quality, cost and latency
that a policy makes at request time. The network is trained with PyTorch Geometric (`routers.graph_training`) and served
by numpy: an expert's node is a constant, and a query's estimates are a softmax over tasks and a matrix product.

A query's task is never given: it attends to the task nodes by its own text. One unlike all that was trained on is read
off its nearest tasks; `tasks` and a greater uncertainty say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from experts.cards import ExpertCard
from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations
from routers.errors import RouterConfigError
from routers.graph_state import EFFECT, LENGTH, OUTCOMES, ExpertNode, Learnt, Nodes, QuerySide, expert_node, make_nodes
from routers.newcomers import Newcomer
from routers.profile import Profile, checked, only
from routers.search_space import Range
from routers.text_features import TextFeatures

_FEATURE_SCALE = 4.0  # unit vectors of hundreds of values have small ones: as large as Adam's steps like them
_LEAST_VARIANCE = 1e-3  # of a direction of the unscaled features; weaker ones are shrunk
_QUERIES_PER_CLUSTER = 60  # where a table has no task labels, so that each of them is seen often enough
_MOST_CLUSTERS = 32
_KNOWN_SHARE = 0.99  # of a task's train queries count as like it


class GraphRouterConfig(RouterConfig):
    """Adam's `steps` at most and `learning_rate`; `decay` penalises the weights of the attention over tasks, squared;
    `dropout` of features; `directions` of the features.

    `own_directions` lets each expert's edges say something along the directions, beside what all experts share there.
    `task_nodes` are those of the train table's labels, of clusters of its queries, or none. `caution` in spreads of
    experts around their cards. With `loss` "one_hot", the paper's, quality is the chance of being the expert of the
    highest alpha * effect - beta * scaled cost: cost is in it already, so a policy's weight of cost belongs to 0.
    """

    steps: Annotated[int, Field(ge=1)] = 300
    learning_rate: Annotated[float, Field(gt=0), Range(3e-3, 5e-2, log=True)] = 0.02
    decay: Annotated[float, Field(ge=0), Range(3e-5, 3e-2, log=True)] = 3e-4
    dropout: Annotated[float, Field(ge=0, lt=1), Range(0.0, 0.5)] = 0.2
    directions: Annotated[int, Field(ge=1), Range(8, 128, log=True)] = 32
    own_directions: bool = False
    task_nodes: Literal["labels", "clusters", "none"] = "labels"
    caution: Annotated[float, Field(ge=0)] = 1.0
    loss: Literal["effect", "one_hot"] = "effect"
    alpha: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _weighs_something(self) -> Self:
        if self.loss == "effect" and (self.alpha, self.beta) != (1.0, 0.0):
            raise ValueError(
                "alpha and beta belong to loss: one_hot; with loss: effect the policy weighs at request time"
            )
        if self.alpha + self.beta == 0:
            raise ValueError("alpha and beta must not both be 0")
        return self


@dataclass(frozen=True, slots=True)
class TaskGuess:
    """What a query was read as: the task attended to most, how much, and whether the query is like its train queries.

    Where it is not (`known` is false) the query is of a task that nothing was observed of, and its estimates are those
    of the nearest tasks. A task without a label is named by its number.
    """

    task: str
    attention: float
    known: bool


class GraphRouter(FittedRouter[GraphRouterConfig]):
    """Task, query and expert nodes; see the module."""

    name = "graph_router"
    config_type = GraphRouterConfig

    def tasks(self, texts: Sequence[str]) -> list[TaskGuess]:
        """What each of `texts` is read as, and whether it is like anything that was trained on."""
        embeddings = self._embed(texts)
        attention = self._side.attention(self._features(texts, embeddings))
        known = self._known(embeddings)
        most = attention.argmax(1)
        return [
            TaskGuess(self._labels[task], float(attention[row, task]), bool(known[row]))
            for row, task in enumerate(most)
        ]

    def add_expert(self, card: ExpertCard, observations: Observations | None = None) -> None:
        """A node for a new expert, made by messages from its observations; known experts' estimates stay as they are.

        Without observations it is left to its card, less `caution` times the spread of experts around their cards: an
        expert that nobody has seen must promise more to be chosen. A second call replaces the first. Not while another
        thread estimates.
        """
        if observations is not None and self.config.loss == "one_hot":
            raise RouterConfigError(
                "with loss: one_hot an expert cannot join by its own observations: whether it was best they do not say"
            )
        if card.name in {joined.name for joined in self.cards[self._trained_on :]}:
            self._leave(card.name)
        super().add_expert(card, observations)
        newcomer = self._newcomers[card.name]
        if observations is not None and len(newcomer.embeddings):
            self._join(newcomer, observations)

    # What a fitted router writes

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        from routers.graph_training import Graph, TrainingOptions, learnt, train_network

        config = self.config
        self._text = TextFeatures.fit(table.texts, config.seed)
        raw = np.hstack([embeddings, self._text(table.texts)])
        centre = raw.mean(0)
        features = (raw - centre) * np.float32(_FEATURE_SCALE)
        label, self._labels = _task_labels(table, embeddings, config)
        effect = table.quality if config.loss == "effect" else _is_best(table, config.alpha, config.beta)
        length = table.output_tokens / self.profile.output_tokens
        graph = Graph.of(features, label, effect, length)
        options = TrainingOptions(**config.model_dump(include=set(TrainingOptions.__slots__)))
        directions = _directions(features, config.directions)
        network = train_network(graph, directions, len(self._labels), options, self.checkpoint)
        weights, bias = network.tasks.detach().numpy().copy(), network.bias.detach().numpy().copy()
        self._side = QuerySide(centre, weights, bias, directions)
        self._learnt = learnt(network)
        self._nodes = make_nodes(effect, length, features, self._side, self._learnt)
        self._centroids, self._reach = _neighbourhoods(embeddings, self._side.attention(features))
        self._trained_on = len(self.cards)

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        return self._score(self._features(texts, embeddings), embeddings)

    def _score(self, features: FloatArray, embeddings: FloatArray) -> Prediction:
        """What to expect of queries of known features [B, F]: a softmax and matrix products."""
        attention, nodes = self._side.attention(features), self._nodes
        quality = _into_bounds(nodes.expected(EFFECT, attention, features))
        ratio = np.maximum(nodes.expected(LENGTH, attention, features), 0)
        return Prediction(
            quality,
            np.maximum(ratio * self.profile.output_tokens, 1),
            self._uncertainty(quality, attention, self._known(embeddings)),
        )

    def _arrays(self) -> Mapping[str, AnyArray]:
        nodes, learnt = self._nodes, self._learnt
        names = "\n".join(self._labels).encode()
        return {
            **self._text.arrays(),
            **self._side.arrays(),
            "graph.task_counts_as": learnt.task_counts_as,
            "graph.shared_gains": learnt.shared_gains,
            "graph.own_gains": learnt.own_gains,
            "graph.levels": nodes.levels,
            "graph.task_states": nodes.tasks,
            "graph.own": nodes.own,
            "graph.shared": nodes.shared,
            "graph.counts": nodes.counts,
            "graph.centroids": self._centroids,
            "graph.reach": self._reach,
            "graph.labels": np.frombuffer(names, np.uint8),
            "graph.trained_on": np.array([self._trained_on]),
        }

    def _restore(self, artefact: Artefact) -> None:
        self._text = TextFeatures.restore(artefact)
        self._side = side = QuerySide.restore(artefact)
        tasks, directions, experts = side.tasks.shape[1], side.directions.shape[1], len(self.cards)
        self._learnt = Learnt(
            artefact.array("graph.task_counts_as", OUTCOMES),
            artefact.array("graph.shared_gains", OUTCOMES, directions),
            artefact.array("graph.own_gains", OUTCOMES, directions),
        )
        self._nodes = Nodes.of(
            artefact.array("graph.levels", OUTCOMES, experts),
            artefact.array("graph.task_states", OUTCOMES, tasks, experts),
            artefact.array("graph.own", OUTCOMES, directions, experts),
            artefact.array("graph.shared", OUTCOMES, directions),
            artefact.array("graph.counts", tasks, experts),
            side,
        )
        self._centroids = artefact.array("graph.centroids", tasks, None)
        self._reach = artefact.array("graph.reach", tasks)
        self._labels = artefact.array("graph.labels", None).tobytes().decode("utf-8", "replace").split("\n")
        self._trained_on = int(artefact.array("graph.trained_on", 1)[0])
        if len(self._labels) != tasks:
            artefact.refuse(f"names {len(self._labels)} tasks and has nodes for {tasks}")

    # Inside

    def _features(self, texts: Sequence[str], embeddings: FloatArray) -> FloatArray:
        raw = np.hstack([embeddings, self._text(texts)])
        return (raw - self._side.centre) * np.float32(_FEATURE_SCALE)

    def _known(self, embeddings: FloatArray) -> npt.NDArray[np.bool_]:
        """Whether each query [B] is as near to some task's queries as most of that task's own are."""
        return np.asarray((embeddings @ self._centroids.T >= self._reach).any(1), np.bool_)

    def _uncertainty(self, quality: FloatArray, attention: FloatArray, known: npt.NDArray[np.bool_]) -> FloatArray:
        """Standard error of `quality`: of few edges in a task; for an unknown task, of how experts vary with tasks."""
        trust = float(self._learnt.task_counts_as[EFFECT])
        support = attention @ (1 / (self._nodes.counts + trust))
        between = self._nodes.tasks[EFFECT].var(0)
        return np.sqrt(quality * (1 - quality) * support + np.where(known[:, None], 0, between)).astype(np.float32)

    def _from_card(self, card: ExpertCard) -> Newcomer:
        newcomer = super()._from_card(card)
        return replace(newcomer, bias=newcomer.bias - self.config.caution * newcomer.spread)

    def _join(self, newcomer: Newcomer, observations: Observations) -> None:
        """Make a node of what was observed, its prior being what its peers' nodes hold, and take it in."""
        table = checked(only(observations, newcomer.card.name))
        table = table.rows(np.flatnonzero(np.isfinite(table.quality[:, 0])))
        features, tokens = self._features(table.texts, self._embed(table.texts)), table.output_tokens[:, 0]
        usual = float(self.profile.output_tokens @ newcomer.peers) * newcomer.output_ratio
        known = np.isfinite(tokens)
        made = [
            self._node(EFFECT, table.quality[:, 0], features, newcomer.peers),
            self._node(LENGTH, tokens[known] / usual, features[known], newcomer.peers),
        ]
        self._nodes = self._nodes.with_expert(made, self._side)
        row = Profile.of_one(made[EFFECT].level, usual, newcomer.tokens_per_char, newcomer.seconds_per_token)
        self._append_expert(newcomer.card, row)
        self._settle(newcomer.card.name)

    def _node(self, outcome: int, values: FloatArray, features: FloatArray, peers: FloatArray) -> ExpertNode:
        nodes, side = self._nodes, self._side
        level = float(nodes.levels[outcome] @ peers)
        along = features @ side.directions
        return expert_node(
            values,
            side.attention(features),
            along,
            along @ nodes.shared[outcome],
            prior=(level, nodes.tasks[outcome] @ peers - level),
            task_counts_as=float(self._learnt.task_counts_as[outcome]),
            own_gains=self._learnt.own_gains[outcome],
        )

    def _leave(self, expert: str) -> None:
        keep = np.array([i for i, card in enumerate(self.cards) if card.name != expert], np.intp)
        self._nodes = self._nodes.columns(keep)
        self._keep_experts(keep)
        self._settle(expert)

    def _settle(self, moved: str) -> None:
        """Experts left to their cards look for peers among those there are now."""
        others = [newcomer.card for name, newcomer in self._newcomers.items() if name != moved]
        self._newcomers = {card.name: self._from_card(card) for card in others}


def _task_labels(
    table: Observations, embeddings: FloatArray, config: GraphRouterConfig
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Each query's task node [Q], -1 where no label is known, and the nodes' names; clusters where no label tells."""
    names = sorted({task for task in table.tasks if task})
    if config.task_nodes == "none":
        return np.zeros(len(table), np.int64), ["0"]
    if config.task_nodes == "labels" and len(names) > 1:
        place = {name: i for i, name in enumerate(names)}
        return np.array([place.get(task, -1) for task in table.tasks], np.int64), [" ".join(n.split()) for n in names]
    from sklearn.cluster import KMeans

    count = int(np.clip(len(table) // _QUERIES_PER_CLUSTER, 1, _MOST_CLUSTERS))
    label = KMeans(count, n_init=4, random_state=config.seed).fit(embeddings).labels_
    return label.astype(np.int64), [str(i) for i in range(count)]


def _is_best(table: Observations, alpha: float, beta: float) -> FloatArray:
    """1 for each query's experts of the highest utility among those observed, all that tie; NaN where unobserved."""
    low, high = float(np.nanmin(table.cost_usd)), float(np.nanmax(table.cost_usd))
    cost = (table.cost_usd - low) / ((high - low) or 1.0)
    utility = alpha * table.quality - beta * cost
    best = np.nanmax(np.where(np.isfinite(utility), utility, -np.inf), axis=1, keepdims=True)
    return np.where(np.isfinite(utility), utility >= best - 1e-6, np.nan).astype(np.float32)


def _directions(features: FloatArray, count: int) -> FloatArray:
    """Of the features' greatest variance, [F, P], scaled so that a query's projection has a variance of about 1."""
    covariance = (features.T @ features / len(features)).astype(np.float64)
    values, vectors = np.linalg.eigh(covariance)
    scale = np.sqrt(np.maximum(values[::-1], 0) + _LEAST_VARIANCE * _FEATURE_SCALE**2)
    found: FloatArray = (vectors[:, ::-1] / scale)[:, :count].astype(np.float32)
    return found


def _into_bounds(quality: FloatArray) -> FloatArray:
    """In 0..1, moving a query's estimates [B, K] together, so that two experts above 1 do not become equals."""
    quality = quality - np.maximum(quality.max(1, keepdims=True, initial=-np.inf) - 1, 0)
    quality = quality + np.maximum(-quality.min(1, keepdims=True, initial=np.inf), 0)
    return np.clip(quality, 0, 1)


def _neighbourhoods(embeddings: FloatArray, attention: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Unit centroids of the tasks' queries [T, D], and the cosine [T] that most of each task's queries reach."""
    most = attention.argmax(1)
    sums = attention.T @ embeddings
    centroids = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    cosines = (embeddings * centroids[most]).sum(1)
    reach = [
        float(np.quantile(cosines[most == task], 1 - _KNOWN_SHARE)) if (most == task).any() else 1.0
        for task in range(len(centroids))
    ]
    return centroids.astype(np.float32), np.array(reach, np.float32)
