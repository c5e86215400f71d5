"""GraphRouter: who is good at what, read off a graph of tasks, queries and experts.

After GraphRouter (ICLR 2025, arXiv 2410.03834), with the third node type that the paper promises, task nodes, and with
effect and length predicted for each edge, so that one trained router serves every weighing of quality, cost and latency
that a policy makes at request time. The network is trained with PyTorch Geometric (`routers.graph_training`) and served
by numpy: an expert's node is a constant, and a query's estimates are a softmax over tasks and a matrix product.

A query's task is never given: it belongs to the task nodes that its own text lies near. One unlike all that was trained
on is read off its nearest tasks; `tasks` and a greater uncertainty say so. `add_task` makes a node for a task that
nothing was observed of, from its description or from some examples, whose nearest tasks say what to expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from experts.cards import ExpertCard
from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations
from routers.errors import RouterConfigError
from routers.graph_state import (
    EFFECT,
    LENGTH,
    OUTCOMES,
    ExpertNode,
    MadeOf,
    Nodes,
    TaskNode,
    Tasks,
    expert_node,
    make_nodes,
    softmax,
    task_features,
)
from routers.newcomers import Newcomer
from routers.profile import Profile, checked, only
from routers.search_space import Range
from routers.text_features import TextFeatures

if TYPE_CHECKING:
    from routers.graph_network import GraphNetwork

_FEATURE_SCALE = 4.0  # unit vectors of hundreds of values have small ones: as large as Adam's steps like them
_LEAST_VARIANCE = 1e-3  # of a direction of the unscaled features; weaker ones are shrunk
_QUERIES_PER_CLUSTER = 60  # where a table has no task labels, so that each of them is seen often enough
_MOST_CLUSTERS = 32
_LEAST_SHARE = 0.01
_KNOWN_SHARE = 0.99  # of a task's train queries count as like it

Labels = npt.NDArray[np.int64]

_TASK_NODES = TypeAdapter(tuple[TaskNode, ...])


class GraphRouterConfig(RouterConfig):
    """Adam's `steps` at most and `learning_rate`; `decay` penalises the weights of features, squared; `dropout` of
    features; `width` of the projection in which queries lie near their tasks.

    `task_descriptions` by name: they help to place the train table's tasks, and make nodes for tasks that it lacks.
    `caution` in spreads of experts around their cards. With `loss` "one_hot", the paper's, quality is the chance of
    being the expert of the highest alpha * effect - beta * scaled cost: cost is in it already, so a policy's weight of
    cost belongs to 0.
    """

    steps: Annotated[int, Field(ge=1)] = 300
    learning_rate: Annotated[float, Field(gt=0), Range(1e-3, 3e-2, log=True)] = 0.005
    decay: Annotated[float, Field(ge=0), Range(3e-5, 3e-2, log=True)] = 3e-4
    dropout: Annotated[float, Field(ge=0, lt=1), Range(0.0, 0.5)] = 0.2
    width: Annotated[int, Field(ge=1), Range(16, 256, log=True)] = 64
    task_descriptions: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
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
    """What a query was read as: the task it belongs to most, what that node is made of, the `nearest` and their shares.

    Where it is not like that task's queries (`known` is false) a node is made for it of the nearest tasks. A task
    without a label is named by its number; shares below 1% are left out.
    """

    task: str
    made_of: MadeOf
    nearest: dict[str, float]
    known: bool


class GraphRouter(FittedRouter[GraphRouterConfig]):
    """Task, query and expert nodes; see the module."""

    name = "graph_router"
    config_type = GraphRouterConfig

    _text: TextFeatures
    _centre: FloatArray
    _tasks: Tasks
    _nodes: Nodes
    _task_counts_as: FloatArray
    _link: FloatArray

    def tasks(self, texts: Sequence[str]) -> list[TaskGuess]:
        """What each of `texts` is read as, and whether it is like anything that was trained on."""
        embeddings = self._embed(texts)
        membership = self._membership(texts, embeddings)
        known, nodes = self._known(embeddings, membership).tolist(), self._tasks.nodes
        most = [nodes[task] for task in membership.argmax(1)]
        return [
            TaskGuess(
                node.name, node.made_of if known[row] else "nearest tasks", self._near(membership[row]), known[row]
            )
            for row, node in enumerate(most)
        ]

    @property
    def task_nodes(self) -> Sequence[TaskNode]:
        """The tasks that there are, and what their nodes are made of."""
        return self._tasks.nodes

    def add_task(self, name: str, description: str = "", *, examples: Sequence[str] = ()) -> TaskNode:
        """A node for a task that was not trained on, made of its `description` or put among the tasks nearest to some
        `examples`; it expects of each expert what the tasks nearest to it show, and says which they are.

        Not while another thread estimates.
        """
        self._require()
        if bool(description) == bool(examples):
            raise RouterConfigError(f"task {name!r} needs a description or examples of its queries, one of them")
        if name in {node.name for node in self._tasks.nodes}:
            raise RouterConfigError(f"router {self.name!r} knows a task {name!r} already")
        if description:
            features = self._described([description])[0]
        else:
            features = self._features(examples, self._embed(examples)).mean(0)
        nearest = self._tasks.membership(features[None])[0]
        node = TaskNode(name, "description" if description else "nearest tasks", self._near(nearest))
        self._nodes = self._nodes.with_task(nearest)
        self._tasks = self._tasks.joined(node, features, float(self._tasks.reach.min()))
        self._make_ready()
        return node

    def add_expert(self, card: ExpertCard, observations: Observations | None = None) -> None:
        """A node for a new expert, made by messages from its observations; known experts' estimates stay as they are.

        Without observations it is left to its card, less `caution` times the spread of experts around their cards: an
        expert that nobody has seen must promise more to be chosen. A second call replaces the first; one that fails
        changes nothing. Not while another thread estimates.
        """
        if observations is not None and self.config.loss == "one_hot":
            raise RouterConfigError(
                "with loss: one_hot an expert cannot join by its own observations: whether it was best they do not say"
            )
        changed = copy(self)
        changed._take_in(card, observations)
        self.__dict__.update(changed.__dict__)

    # What a fitted router writes

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        import torch

        from routers.graph_training import Graph, TrainingOptions, train_network

        config = self.config
        self._text = TextFeatures.fit(table.texts, config.seed)
        raw = np.hstack([embeddings, self._text(table.texts)])
        self._centre, self._embedded = raw.mean(0), embeddings.shape[1]
        features = (raw - self._centre) * np.float32(_FEATURE_SCALE)
        label, names = self._labels(table, embeddings)
        descriptions = self._task_descriptions(names)
        carried, target = self._effects(table)
        length = self._lengths(table)
        torch.manual_seed(config.seed)
        network = self._network(_projection(features, config.width), len(self.cards), len(names))
        options = TrainingOptions(**config.model_dump(include=set(TrainingOptions.__slots__)))
        graph = Graph.of(features, label, descriptions, carried, length, target)
        train_network(graph, network, options, self.checkpoint)
        self._task_counts_as, self._link, offsets, bias, projection = (
            found.detach().numpy().copy()
            for found in (
                network.log_task_counts_as.exp(), network.link, network.offsets, network.bias, network.projection,
            )
        )  # fmt: skip
        made = self._made_tasks(network, features, label, descriptions)
        nodes = tuple(TaskNode(name, "queries", {}) for name in names)
        self._tasks = Tasks(nodes, made, offsets, bias, np.ones(len(names), np.float32), projection)
        membership = self._tasks.membership(features)
        self._tasks = replace(self._tasks, reach=_reach(embeddings @ self._centroids().T, membership))
        self._nodes = self._made_experts(network, carried, length, membership)
        self._trained_on = len(self.cards)
        self._make_ready()
        for name, description in config.task_descriptions.items():
            if name not in names:
                self.add_task(name, description)

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        membership, nodes = self._membership(texts, embeddings), self._nodes
        quality = self._quality(nodes.expected(EFFECT, membership))
        ratio = np.maximum(nodes.expected(LENGTH, membership), 0)
        return Prediction(
            quality,
            np.maximum(ratio * self.profile.output_tokens, 1),
            self._uncertainty(quality, membership, self._known(embeddings, membership)),
        )

    def _arrays(self) -> Mapping[str, AnyArray]:
        described = json.dumps([asdict(node) for node in self._tasks.nodes]).encode()
        return {
            **self._text.arrays(),
            "graph.centre": self._centre,
            "graph.task_nodes": np.frombuffer(described, np.uint8),
            "graph.task_features": self._tasks.features,
            "graph.task_offsets": self._tasks.offsets,
            "graph.task_bias": self._tasks.bias,
            "graph.projection": self._tasks.projection,
            "graph.reach": self._tasks.reach,
            "graph.task_counts_as": self._task_counts_as,
            "graph.link": self._link,
            "graph.levels": self._nodes.levels,
            "graph.task_states": self._nodes.tasks,
            "graph.counts": self._nodes.counts,
            "graph.trained_on": np.array([self._trained_on]),
        }

    def _restore(self, artefact: Artefact) -> None:
        self._text = TextFeatures.restore(artefact)
        self._embedded = self._require().prior.descriptions.shape[1]
        size, experts = self._embedded + self._text.size, len(self.cards)
        nodes = self._restored_task_nodes(artefact)
        tasks = len(nodes)
        self._centre = artefact.known("graph.centre", size)
        features = artefact.known("graph.task_features", tasks, size)
        projection = artefact.known("graph.projection", size, None)
        self._tasks = Tasks(
            nodes,
            features,
            artefact.known("graph.task_offsets", tasks, projection.shape[1]),
            artefact.known("graph.task_bias", tasks),
            artefact.known("graph.reach", tasks),
            projection,
        )
        self._task_counts_as = artefact.known("graph.task_counts_as", OUTCOMES)
        self._link = artefact.known("graph.link", 2)
        self._nodes = Nodes(
            artefact.known("graph.levels", OUTCOMES, experts),
            artefact.known("graph.task_states", OUTCOMES, tasks, experts),
            artefact.known("graph.counts", tasks, experts),
        )
        self._trained_on = int(artefact.known("graph.trained_on", 1)[0])
        if not 1 <= self._trained_on <= experts:
            artefact.refuse(f"was trained on {self._trained_on} of its {experts} experts")
        self._make_ready()

    # Inside

    def _restored_task_nodes(self, artefact: Artefact) -> tuple[TaskNode, ...]:
        try:
            nodes = _TASK_NODES.validate_json(artefact.array("graph.task_nodes", None).tobytes())
        except ValidationError as error:
            artefact.refuse(f"does not say what its task nodes are: {error}")
        if not nodes:
            artefact.refuse("has no task nodes")
        return nodes

    def _labels(self, table: Observations, embeddings: FloatArray) -> tuple[Labels, list[str]]:
        """Each query's task [Q], -1 where no label is known, and the tasks' names; clusters where no label tells."""
        names = sorted({task for task in table.tasks if task})
        if len(names) > 1:
            place = {name: i for i, name in enumerate(names)}
            return np.array([place.get(task, -1) for task in table.tasks], np.int64), names
        from sklearn.cluster import KMeans

        count = int(np.clip(len(table) // _QUERIES_PER_CLUSTER, 1, _MOST_CLUSTERS))
        label = KMeans(count, n_init=4, random_state=self.config.seed).fit(embeddings).labels_
        return label.astype(np.int64), [str(i) for i in range(count)]

    def _effects(self, table: Observations) -> tuple[FloatArray, FloatArray]:
        """What edges carry of how good an expert was [Q, K], and what its estimates are held against."""
        if self.config.loss == "effect":
            return table.quality, table.quality
        best = is_best(table, self.config.alpha, self.config.beta)
        return best, best

    def _lengths(self, table: Observations) -> FloatArray:
        """Answer lengths over each expert's mean [Q, K], which edges carry."""
        return table.output_tokens / self.profile.output_tokens

    def _network(self, projection: FloatArray, experts: int, tasks: int) -> GraphNetwork:
        """What is trained, fresh."""
        import torch

        from routers.graph_network import GraphNetwork

        link = self.config.loss == "one_hot"
        return GraphNetwork(torch.from_numpy(projection), tasks, dropout=self.config.dropout, link=link)

    def _made_tasks(
        self, network: GraphNetwork, features: FloatArray, label: Labels, descriptions: FloatArray
    ) -> FloatArray:
        """The task nodes of the whole graph [T, F]."""
        return task_features(features, label, descriptions)

    def _made_experts(
        self, network: GraphNetwork, carried: FloatArray, length: FloatArray, membership: FloatArray
    ) -> Nodes:
        """The expert nodes of the whole graph."""
        return make_nodes(carried, length, membership, self._task_counts_as)

    def _task_descriptions(self, names: Sequence[str]) -> FloatArray:
        """Features of the descriptions of the tasks `names` [T, F], NaN where there is none."""
        found = np.full((len(names), len(self._centre)), np.nan, np.float32)
        told = [place for place, name in enumerate(names) if name in self.config.task_descriptions]
        if told:
            found[told] = self._described([self.config.task_descriptions[names[place]] for place in told])
        return found

    def _described(self, descriptions: Sequence[str]) -> FloatArray:
        """Features of descriptions: where they lie, and their words; of the shape of queries they say nothing."""
        features = self._features(descriptions, self._embed(descriptions))
        features[:, self._embedded : self._embedded + self._text.centre.size] = 0
        return features

    def _features(self, texts: Sequence[str], embeddings: FloatArray) -> FloatArray:
        raw = np.hstack([embeddings, self._text(texts)])
        return (raw - self._centre) * np.float32(_FEATURE_SCALE)

    def _centroids(self) -> FloatArray:
        """Unit embeddings of the task nodes [T, D]."""
        mean = self._tasks.features[:, : self._embedded] / np.float32(_FEATURE_SCALE) + self._centre[: self._embedded]
        centroids: FloatArray = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), np.float32(1e-9))
        return centroids

    def _make_ready(self) -> None:
        """What a query meets of the task nodes, made once: its features are not spelled out where they need not be."""
        weights, bias = self._tasks.linear()
        weights = weights * np.float32(_FEATURE_SCALE)
        words = self._embedded + self._text.centre.size
        self._asked = self._text.words_through(weights[words:])
        self._asked_weights = np.vstack([weights[:words], np.eye(weights.shape[1], dtype=np.float32)])
        self._asked_bias = bias - self._centre @ weights
        self._task_embeddings = self._centroids()

    def _membership(self, texts: Sequence[str], embeddings: FloatArray) -> FloatArray:
        """How much each of `texts` belongs to each task [B, T]."""
        read = np.hstack([embeddings, self._asked(texts)])
        return softmax(read @ self._asked_weights + self._asked_bias)

    def _near(self, membership: FloatArray) -> dict[str, float]:
        """Tasks by falling `membership` [T]."""
        order = membership.argsort()[::-1]
        return {
            self._tasks.nodes[task].name: round(float(membership[task]), 3)
            for task in order
            if membership[task] >= _LEAST_SHARE
        }

    def _known(self, embeddings: FloatArray, membership: FloatArray) -> npt.NDArray[np.bool_]:
        """Whether each query [B] is as near to the task that it belongs to most as most of that task's own are."""
        most = membership.argmax(1) if len(membership) else np.zeros(0, np.intp)
        cosines = (embeddings * self._task_embeddings[most]).sum(1)
        return np.asarray(cosines >= self._tasks.reach[most], np.bool_)

    def _quality(self, effect: FloatArray) -> FloatArray:
        """Estimates [B, K] as quality in 0..1."""
        if self.config.loss == "effect":
            return _into_bounds(effect, self._trained_on)
        chance: FloatArray = 1 / (1 + np.exp(-(self._link[0] * effect + self._link[1])))
        return chance

    def _uncertainty(self, quality: FloatArray, membership: FloatArray, known: npt.NDArray[np.bool_]) -> FloatArray:
        """Standard error of `quality`: of few edges in a task; for an unknown task, of how experts vary with tasks."""
        trust = float(self._task_counts_as[EFFECT])
        support = membership @ (1 / (self._nodes.counts + trust))
        between = self._nodes.tasks[EFFECT].var(0)
        return np.sqrt(quality * (1 - quality) * support + np.where(known[:, None], 0, between)).astype(np.float32)

    def _from_card(self, card: ExpertCard) -> Newcomer:
        newcomer = super()._from_card(card)
        return replace(newcomer, bias=newcomer.bias - self.config.caution * newcomer.spread)

    def _take_in(self, card: ExpertCard, observations: Observations | None) -> None:
        if card.name in {joined.name for joined in self.cards[self._trained_on :]}:
            self._leave(card.name)
        super().add_expert(card, observations)
        newcomer = self._newcomers[card.name]
        if observations is not None and len(newcomer.embeddings):
            self._join(newcomer, observations)

    def _join(self, newcomer: Newcomer, observations: Observations) -> None:
        """Make a node of what was observed, its prior being what its peers' nodes hold, and take it in."""
        table = checked(only(observations, newcomer.card.name))
        table = table.rows(np.flatnonzero(np.isfinite(table.quality[:, 0])))
        tokens, membership = table.output_tokens[:, 0], self._membership(table.texts, self._embed(table.texts))
        usual = float(self.profile.output_tokens @ newcomer.peers) * newcomer.output_ratio
        known = np.isfinite(tokens)
        made = [
            self._node(EFFECT, table.quality[:, 0], membership, newcomer.peers),
            self._node(LENGTH, tokens[known] / usual, membership[known], newcomer.peers),
        ]
        self._nodes = self._nodes.with_expert(made)
        row = Profile.of_one(made[EFFECT].level, usual, newcomer.tokens_per_char, newcomer.seconds_per_token)
        self._append_expert(newcomer.card, row)
        self._settle(newcomer.card.name)

    def _node(self, outcome: int, values: FloatArray, membership: FloatArray, peers: FloatArray) -> ExpertNode:
        level = float(self._nodes.levels[outcome] @ peers)
        prior = level, self._nodes.tasks[outcome] @ peers - level
        return expert_node(values, membership, prior=prior, task_counts_as=float(self._task_counts_as[outcome]))

    def _leave(self, expert: str) -> None:
        keep = np.array([i for i, card in enumerate(self.cards) if card.name != expert], np.intp)
        self._nodes = self._nodes.columns(keep)
        self._keep_experts(keep)
        self._settle(expert)

    def _settle(self, moved: str) -> None:
        """Experts left to their cards look for peers among those there are now."""
        others = [newcomer.card for name, newcomer in self._newcomers.items() if name != moved]
        self._newcomers = {card.name: self._from_card(card) for card in others}


def is_best(table: Observations, alpha: float, beta: float) -> FloatArray:
    """1 for each query's experts of the highest utility among those observed, all that tie; NaN where unobserved.

    An unknown cost is taken to be the expert's mean, or that of all where none of its own is known.
    """
    cost = table.cost_usd
    if np.isfinite(cost).any():
        means = np.nanmean(np.where(np.isfinite(cost).any(0), cost, np.nanmean(cost)), axis=0)
        low, high = float(np.nanmin(cost)), float(np.nanmax(cost))
        cost = ((np.where(np.isfinite(cost), cost, means) - low) / ((high - low) or 1.0)).astype(np.float32)
    else:
        cost = np.zeros_like(cost)
    utility = alpha * table.quality - beta * cost
    best = np.nanmax(np.where(np.isfinite(utility), utility, -np.inf), axis=1, keepdims=True)
    return np.where(np.isfinite(utility), utility >= best - 1e-6, np.nan).astype(np.float32)


def _projection(features: FloatArray, width: int) -> FloatArray:
    """On the features' directions of greatest variance, [F, P], a query's places having a variance of about 1 / 9."""
    covariance = (features.T @ features / len(features)).astype(np.float64)
    values, vectors = np.linalg.eigh(covariance)
    scale = np.sqrt(np.maximum(values[::-1], 0) + _LEAST_VARIANCE * _FEATURE_SCALE**2)
    found: FloatArray = (vectors[:, ::-1] / scale / 3)[:, :width].astype(np.float32)
    return found


def _into_bounds(quality: FloatArray, trained_on: int) -> FloatArray:
    """In 0..1, moving a query's estimates [B, K] together, so that two experts above 1 do not become equals.

    How far is read off the first `trained_on` experts, so that one that joins moves nobody.
    """
    trained = quality[:, :trained_on]
    above = np.maximum(trained.max(1, keepdims=True) - 1, 0)
    below = np.maximum(above - trained.min(1, keepdims=True), 0)
    moved: FloatArray = np.clip(quality - above + below, 0, 1)
    return moved


def _reach(cosines: FloatArray, membership: FloatArray) -> FloatArray:
    """The cosine to its task that most of each task's queries reach [T], of `cosines` and `membership` [Q, T]."""
    most = membership.argmax(1)
    reach = np.ones(membership.shape[1], np.float32)
    for task in np.unique(most):
        reach[task] = np.quantile(cosines[most == task, task], 1 - _KNOWN_SHARE)
    return reach
