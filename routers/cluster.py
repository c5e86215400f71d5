"""Clusters of queries: each expert's record on the kinds of query nearest to this one.

Avengers-Pro (arXiv 2508.12631): k-means on normalised embeddings, the mean quality and cost of every expert in every
cluster, and for a query the softmax (`beta` times cosine) over the `nearest` centres. The paper takes a cluster's mean
as it is; here it is shrunk towards what the expert's overall mean and the cluster's difficulty for all experts let
expect, as if `shrinkage` more queries had shown that, since the best of many small samples is too good to be true.
The paper looks at embeddings alone, which know a query's topic better than its task; here text features
(`routers.text_features`) count `text_weight` times beside them, so that queries of one form come together too.
`shrinkage` 0 and `text_weight` 0 are the paper's rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations
from routers.search_space import Range
from routers.text_features import TextFeatures

_LEAST_PER_CLUSTER = 15  # queries on the mean, so that a small table gets fewer clusters


class ClusterConfig(RouterConfig):
    """At most `clusters` centres, the `nearest` count; `beta` sharpens their weights; `shrinkage` in queries.

    `text_weight` is how much text features count beside an embedding.
    """

    clusters: Annotated[int, Field(ge=1), Range(16, 128, log=True)] = 64
    nearest: Annotated[int, Field(ge=1), Range(1, 8)] = 3
    beta: Annotated[float, Field(gt=0), Range(3.0, 30.0, log=True)] = 9.0
    shrinkage: Annotated[float, Field(ge=0), Range(1.0, 100.0, log=True)] = 20.0
    text_weight: Annotated[float, Field(ge=0), Range(0.25, 4.0, log=True)] = 2.0


class ClusterRouter(FittedRouter[ClusterConfig]):
    """Softmax-weighted records of the nearest clusters."""

    name = "cluster"
    config_type = ClusterConfig

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        from sklearn.cluster import KMeans

        self._features = TextFeatures.fit(table.texts, self.config.seed)
        places = self._features.beside(embeddings, table.texts, self.config.text_weight)
        clusters = min(self.config.clusters, max(1, len(places) // _LEAST_PER_CLUSTER))
        means = KMeans(clusters, n_init=4, random_state=self.config.seed).fit(places)
        lengths = np.linalg.norm(means.cluster_centers_, axis=1, keepdims=True)
        self._centres = (means.cluster_centers_ / np.maximum(lengths, 1e-9)).astype(np.float32)
        member = np.eye(clusters, dtype=np.float32)[means.labels_]
        self._records = np.stack([
            records(member, table.quality, self.profile.quality, self.config.shrinkage),
            records(member, table.output_tokens, self.profile.output_tokens, self.config.shrinkage),
        ])  # fmt: skip

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        cosines = self._features.beside(embeddings, texts, self.config.text_weight) @ self._centres.T
        nearest = min(self.config.nearest, len(self._centres))
        least = np.partition(cosines, -nearest, axis=1)[:, -nearest, None]
        weights = np.where(cosines >= least, np.exp(self.config.beta * (cosines - cosines.max(1, keepdims=True))), 0)
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        return Prediction(np.clip(weights @ self._records[0], 0, 1), np.maximum(weights @ self._records[1], 1))

    def _arrays(self) -> Mapping[str, AnyArray]:
        return {"cluster.centres": self._centres, "cluster.records": self._records, **self._features.arrays()}

    def _restore(self, artefact: Artefact) -> None:
        self._centres = artefact.array("cluster.centres", None, None)
        self._records = artefact.array("cluster.records", 2, len(self._centres), len(self.cards))
        self._features = TextFeatures.restore(artefact)


def records(member: FloatArray, values: FloatArray, means: FloatArray, shrinkage: float) -> FloatArray:
    """Mean of `values` [Q, K] in each cluster [C, K], shrunk; `member` [Q, C] is 1 where a query lies in a cluster."""
    seen = np.isfinite(values)
    surprise = member.T @ np.where(seen, values - means, 0)
    count = member.T @ seen.astype(np.float32)
    shared = surprise.sum(1, keepdims=True) / np.maximum(count.sum(1, keepdims=True), 1)
    records: FloatArray = means + (surprise + shrinkage * shared) / np.maximum(count + shrinkage, 1e-9)
    return records.astype(np.float32)
