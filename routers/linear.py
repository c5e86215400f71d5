"""Linear regression: quality and answer length as weighted sums of a query's features.

The features are the sentence embedding and what it does not keep (`routers.text_features`); the weights are ridge
regression's, with one penalty for what makes a query hard for every expert and one for each way in which experts differ
(`routers.ridge`), all chosen by leave-one-out error on the train table: there is nothing to tune.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations
from routers.ridge import filled, fit_experts, fit_ridge
from routers.text_features import TextFeatures


class LinearRouter(FittedRouter[RouterConfig]):
    """Ridge regression on embeddings and text features."""

    name = "linear"
    config_type = RouterConfig

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        self._features = TextFeatures.fit(table.texts, self.config.seed)
        features = np.hstack([embeddings, self._features(table.texts)])
        quality = fit_experts(features, filled(table.quality, self.profile.quality))
        lengths = fit_ridge(features, filled(table.output_tokens, self.profile.output_tokens))
        self._weights = np.hstack([quality.weights, lengths.weights])
        self._bias = np.concatenate([quality.bias, lengths.bias])

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        found = np.hstack([embeddings, self._features(texts)]) @ self._weights + self._bias
        quality, lengths = np.split(found, 2, axis=1)
        return Prediction(np.clip(quality, 0, 1), np.maximum(lengths, 1))

    def _arrays(self) -> Mapping[str, AnyArray]:
        return {"linear.weights": self._weights, "linear.bias": self._bias, **self._features.arrays()}

    def _restore(self, artefact: Artefact) -> None:
        self._weights = artefact.array("linear.weights", None, 2 * len(self.cards))
        self._bias = artefact.array("linear.bias", 2 * len(self.cards))
        self._features = TextFeatures.restore(artefact)
