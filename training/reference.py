"""Plain methods whose figures on the public tables are known, to see that this harness measures what others measure.

Plain means over the nearest neighbours, k-means, ridge regression, all on MiniLM sentence embeddings, without the
shrinkage and the further features that the routers of this project have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from routers.contracts import Estimates, FloatArray
from routers.embedder import shared_embedder
from training.evaluation import Bench, Evaluation, Report
from training.observations import Table

Outcomes = FloatArray  # [Q, 2E]: qualities, then costs
Method = Callable[[FloatArray, Outcomes, FloatArray], Outcomes]

KNOWN: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "frontier15": {
        "best_single": {"quality": 0.834},
        "knn_40": {"quality": 0.836, "aiq": 0.828, "saved": 0.21},
        "knn_100": {"quality": 0.839, "aiq": 0.831, "saved": 0.20},
        "kmeans_64": {"quality": 0.825, "aiq": 0.824},
        "ridge": {"quality": 0.818, "aiq": 0.814},
        "task_label": {"quality": 0.854, "aiq": 0.845, "saved": 0.38},
        "oracle": {"quality": 0.963, "aiq": 0.959, "saved": 0.98},
    },
    "open9": {
        "best_single": {"quality": 0.617},
        "knn_40": {"quality": 0.649, "aiq": 0.561, "saved": 0.71},
        "knn_100": {"quality": 0.654, "aiq": 0.563, "saved": 0.70},
        "kmeans_64": {"quality": 0.647, "aiq": 0.561, "saved": 0.68},
        "ridge": {"quality": 0.636, "aiq": 0.557, "saved": 0.75},
        "task_label": {"quality": 0.668, "aiq": 0.583, "saved": 0.83},
        "oracle": {"quality": 0.805, "aiq": 0.711, "saved": 0.88},
    },
}
"""The known figures by table, method and metric."""


def reference(table: Table) -> Report:
    """Measure the plain methods on `table`, without any missing pair."""
    embedder, cards = shared_embedder(), len(table.cards)
    train, test = embedder.embed(table.train.texts), embedder.embed(table.test.texts)
    outcomes = np.hstack([table.train.quality, table.train.cost_usd])
    bench = Bench(table)

    def measured(name: str, method: Method) -> Evaluation:
        quality, cost = np.split(method(train, outcomes, test), [cards], axis=1)
        return bench.measure(name, Estimates(quality=quality, cost_usd=cost, latency_s=np.zeros_like(cost)))

    return bench.report([measured(name, method) for name, method in _METHODS.items()])


def _neighbours(k: int) -> Method:
    def method(train: FloatArray, outcomes: Outcomes, test: FloatArray) -> Outcomes:
        nearest = np.argpartition(-(test @ train.T), k, axis=1)[:, :k]
        return np.stack([outcomes[rows].mean(0) for rows in nearest])

    return method


def _kmeans(train: FloatArray, outcomes: Outcomes, test: FloatArray) -> Outcomes:
    from sklearn.cluster import KMeans

    clusters = KMeans(64, n_init=4, random_state=0).fit(train)
    means = np.stack([outcomes[clusters.labels_ == label].mean(0) for label in range(64)])
    found: Outcomes = means[clusters.predict(test)]
    return found


def _ridge(train: FloatArray, outcomes: Outcomes, test: FloatArray) -> Outcomes:
    from sklearn.linear_model import Ridge

    found: Outcomes = Ridge(alpha=1.0).fit(train, outcomes).predict(test).astype(np.float32)
    return found


_METHODS: Mapping[str, Method] = {
    "knn_40": _neighbours(40), "knn_100": _neighbours(100), "kmeans_64": _kmeans, "ridge": _ridge,
}  # fmt: skip
