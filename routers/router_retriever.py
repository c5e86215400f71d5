"""RouterRetriever (AAAI 2025, arXiv 2409.02685): a query goes to the expert whose pilots are most like it.

Fitted on queries of known domains (the table's tasks) and what every expert made of each. A domain's queries are
grouped by the expert that served them best; the centroid of a group's embeddings, on the unit sphere, is a pilot of
that expert, so that T experts on T domains have at most T^2. Estimating, an expert's quality is the aggregated cosine
of the query to its pilots, from -1..1 to 0..1: a ranking, not a probability. Nothing is trained: another domain is some
pilots more.

The paper aggregates by the mean, its public code by the maximum. The mean of dot products is the dot product with the
mean, so that there a thousand experts are one product of a vector with a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations
from routers.search_space import Range

Aggregation = Literal["mean", "max", "softmax"]

_TIE = 1e-6
_NO_PILOT = -1.0  # the cosine of an expert that was best nowhere


class RouterRetrieverConfig(RouterConfig):
    """`aggregation` of cosines to an expert's pilots; `temperature` in cosine, of the softmax-weighted mean alone."""

    aggregation: Aggregation = "mean"
    temperature: Annotated[float, Field(gt=0), Range(0.01, 1.0, log=True)] = 0.05


class RouterRetriever(FittedRouter[RouterRetrieverConfig]):
    """Aggregated similarity to pilots."""

    name = "router_retriever"
    config_type = RouterRetrieverConfig

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        best = _best_experts(table)
        tasks = np.array(table.tasks)
        groups = sorted({(task, expert) for task, expert in zip(table.tasks, best.tolist(), strict=True)})
        centroids = [embeddings[(tasks == task) & (best == expert)].mean(0) for task, expert in groups]
        self.take(np.array([_unit(one) for one in centroids]), np.array([expert for _, expert in groups], np.int64))

    def take(self, pilots: FloatArray, experts: npt.NDArray[np.int64]) -> None:
        """Route by these pilots [P, D]; `experts` [P] says whose each is, by its place among the cards."""
        order = np.argsort(experts, kind="stable")
        self._pilots, self._experts = pilots[order].astype(np.float32), experts[order]
        self.owners, self._starts = np.unique(self._experts, return_index=True)
        sums = np.add.reduceat(self._pilots, self._starts) if len(pilots) else self._pilots
        counts = np.diff([*self._starts, len(self._experts)])
        self._means = np.ascontiguousarray((sums / counts[:, None]).T.astype(np.float32))

    @property
    def pilots(self) -> Sequence[tuple[str, FloatArray]]:
        """Each pilot with the name of its expert."""
        return [(self.cards[e].name, pilot) for e, pilot in zip(self._experts, self._pilots, strict=True)]

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        cosine = np.full((len(embeddings), len(self.cards)), _NO_PILOT, np.float32)
        cosine[:, self.owners] = self.similarity(embeddings)
        quality = (1 + cosine) / np.float32(2)
        return Prediction(quality, np.zeros_like(quality))

    def similarity(self, embeddings: FloatArray) -> FloatArray:
        """Aggregated cosines of `embeddings` [B, D] to the pilots of every expert that has some: [B, owners]."""
        if self.config.aggregation == "mean":
            means: FloatArray = embeddings @ self._means
            return means
        cosines = embeddings @ self._pilots.T
        if self.config.aggregation == "max":
            best: FloatArray = np.maximum.reduceat(cosines, self._starts, axis=1)
            return best
        warm = np.exp((cosines - cosines.max(1, keepdims=True)) / self.config.temperature) + 1e-30
        weighted = np.add.reduceat(warm * cosines, self._starts, axis=1) / np.add.reduceat(warm, self._starts, axis=1)
        softmax: FloatArray = weighted.astype(np.float32)
        return softmax

    def _arrays(self) -> Mapping[str, AnyArray]:
        return {"pilots": self._pilots, "pilot_experts": self._experts}

    def _restore(self, artefact: Artefact) -> None:
        pilots = artefact.array("pilots", None, self._used_embedder().dimensions)
        experts = artefact.array("pilot_experts", len(pilots))
        if len(experts) and not 0 <= experts.min() <= experts.max() < len(self.cards):
            artefact.refuse("has a pilot of an expert that is not there")
        self.take(pilots.astype(np.float32), experts.astype(np.int64))


def _best_experts(table: Observations) -> npt.NDArray[np.int64]:
    """The expert that served each query best [Q].

    Many queries are served equally well by several experts: then it is the one of them that is best in the domain.
    """
    quality = np.where(np.isnan(table.quality), -1.0, table.quality).astype(np.float64)
    tasks = np.array(table.tasks)
    for task in sorted(set(table.tasks)):
        rows = tasks == task
        quality[rows] += _TIE * quality[rows].mean(0)
    best: npt.NDArray[np.int64] = quality.argmax(1)
    return best


def _unit(vector: FloatArray) -> FloatArray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
