"""k nearest neighbours: a query's estimates are what the experts did on the queries most like it.

Cosine over sentence embeddings with text features (`routers.text_features`) beside them, which count `text_weight`
times: embeddings know a query's topic better than its task. Each neighbour counts exp((cosine - that of the nearest) /
temperature). A neighbour on which an expert was not observed says nothing of it, and every expert's estimate is shrunk
towards its own mean as if `shrinkage` neighbours of the nearest's weight had shown that mean: so where little was
observed near a query, what is known of the expert anywhere decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations
from routers.search_space import Range
from routers.text_features import TextFeatures

_DIRECTIONS = 256  # looking for neighbours is bound by memory: half of it is read, and the neighbours are as good


class KnnConfig(RouterConfig):
    """`k` neighbours; `temperature` in cosine, small trusts the nearest alone; `shrinkage` in neighbours.

    `text_weight` is how much text features count beside an embedding; 0 leaves them out.
    """

    k: Annotated[int, Field(ge=1), Range(10, 400, log=True)] = 300
    temperature: Annotated[float, Field(gt=0), Range(0.02, 2.0, log=True)] = 0.1
    shrinkage: Annotated[float, Field(gt=0), Range(0.1, 30.0, log=True)] = 1.0
    text_weight: Annotated[float, Field(ge=0), Range(0.25, 4.0, log=True)] = 2.0


class KnnRouter(FittedRouter[KnnConfig]):
    """Distance-weighted mean quality and output tokens of the k nearest observed queries."""

    name = "knn"
    config_type = KnnConfig

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        self._features = TextFeatures.fit(table.texts, self.config.seed)
        both = self._features.beside(embeddings, table.texts, self.config.text_weight)
        self._directions = _directions(both)
        places = both @ self._directions.T
        # Half precision halves the artefact; rounding here too keeps a loaded router equal to the fitted one.
        self._take(places.astype(np.float16), table.quality, table.output_tokens)

    def _take(self, places: npt.NDArray[np.float16], quality: FloatArray, output_tokens: FloatArray) -> None:
        self._half = places
        self._observed = np.stack([quality, output_tokens], 1)  # [Q, 2, K] as saved, NaN where unobserved
        self._places = places.astype(np.float32)
        self._means = np.stack([self.profile.quality, self.profile.output_tokens])  # [2, K]
        seen, values = np.isfinite(self._observed).astype(np.float32), np.nan_to_num(self._observed)
        # One row a query, for one product: quality, output tokens, quality squared, which of the first two are known.
        self._rows = np.concatenate([values, values[:, :1] ** 2, seen], 1).reshape(len(values), -1)  # [Q, 5 K]

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        # One by one: a product of matrices rounds otherwise than that of a vector, which would turn ties among the
        # neighbours, and a query's estimates would hang on its batch.
        both = self._features.beside(embeddings, texts, self.config.text_weight)
        rows = np.array([self._row(self._directions @ place) for place in both], np.float32)
        quality, output_tokens, uncertainty = rows.reshape(-1, 3, len(self.cards)).swapaxes(0, 1)
        return Prediction(quality, output_tokens, uncertainty)

    def _row(self, place: FloatArray) -> FloatArray:
        """Quality, output tokens and the standard error of quality for one query, [3, K]."""
        nearest, weights = self._neighbours(place)
        rows, experts = self._rows.take(nearest, axis=0), len(self.cards)
        sums = (weights @ rows).reshape(5, experts)
        shrinkage, usual = self.config.shrinkage, self._means
        total = sums[3:] + shrinkage
        means = (sums[:2] + shrinkage * usual) / total
        spread = sums[2] - means[0] * (2 * sums[0] - means[0] * sums[3])  # sum of weight * (quality - mean)^2
        spread = np.maximum(spread, 0) + shrinkage * usual[0] * (1 - usual[0])
        squares = weights**2 @ rows[:, 3 * experts : 4 * experts] + shrinkage
        return np.concatenate([means, np.sqrt(spread * squares / total[:1] ** 3)])

    def _neighbours(self, place: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
        """The nearest observed queries [k], and their weights [k], the nearest's being 1."""
        cosines = self._places @ place
        k = min(self.config.k, len(cosines))
        nearest = np.argpartition(cosines, -k)[-k:]
        near = cosines[nearest]
        weights: FloatArray = np.exp((near - near.max()) / np.float32(self.config.temperature))
        return nearest, weights

    def _arrays(self) -> Mapping[str, AnyArray]:
        return {
            "knn.places": self._half,
            "knn.directions": self._directions,
            "knn.observed": self._observed,
            **self._features.arrays(),
        }

    def _restore(self, artefact: Artefact) -> None:
        self._features = TextFeatures.restore(artefact)
        self._directions = artefact.array("knn.directions", None, None)
        places = artefact.array("knn.places", None, len(self._directions))
        observed = artefact.array("knn.observed", len(places), 2, len(self.cards))
        self._take(places.astype(np.float16), observed[:, 0], observed[:, 1])


def _directions(places: FloatArray) -> FloatArray:
    """The orthonormal directions [at most 256, D] that keep most of `places` [Q, D] and so of their cosines."""
    _, directions = np.linalg.eigh(places.T @ places)
    kept: FloatArray = np.ascontiguousarray(directions.T[::-1][:_DIRECTIONS])
    return kept
