"""Matrix factorisation: experts and queries in one space, where their product says how well one does on the other.

RouteLLM (arXiv 2406.18665) and EmbedLLM (arXiv 2410.02223): the chance that expert e is right on a query with features
x is sigmoid(w . (v_e * (W x))), the expert's vector v_e being of length 1. The papers' x is a sentence embedding; here
text features (`routers.text_features`) stand beside it. Fitted by Adam on the cross-entropy of all observed pairs. How
many steps is chosen on a part of the train queries that is held out, and then all are fitted for so many steps. Answer
lengths, of which the method says nothing, are ridge regression's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field

from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations
from routers.ridge import filled, fit_ridge
from routers.search_space import Range
from routers.text_features import TextFeatures

_HELD_OUT = 0.2
_STEPS_PER_CHECK = 10
_FIRST, _SECOND, _TINY = 0.9, 0.999, 1e-8  # Adam's


class MatrixFactorizationConfig(RouterConfig):
    """`dimensions` of the common space; Adam's `learning_rate` and at most `steps` over all pairs; weight `decay`.

    `text_weight` is how much text features count beside an embedding.
    """

    dimensions: Annotated[int, Field(ge=1), Range(8, 128, log=True)] = 32
    learning_rate: Annotated[float, Field(gt=0), Range(3e-4, 3e-2, log=True)] = 3e-3
    steps: Annotated[int, Field(ge=1)] = 600
    decay: Annotated[float, Field(ge=0), Range(1e-5, 1e-1, log=True)] = 1e-3
    text_weight: Annotated[float, Field(ge=0), Range(0.25, 4.0, log=True)] = 2.0


class MatrixFactorizationRouter(FittedRouter[MatrixFactorizationConfig]):
    """sigmoid(w . (v_e * (W x))) over embeddings with text features and a constant beside them."""

    name = "matrix_factorization"
    config_type = MatrixFactorizationConfig

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        self._features = TextFeatures.fit(table.texts, self.config.seed)
        features = self._beside(table.texts, embeddings)
        steps = _best_steps(features, table.quality, self.config)
        *_, factors = _descend(features, table.quality, self.config, steps)
        lengths = fit_ridge(features[:, :-1], filled(table.output_tokens, self.profile.output_tokens))
        self._queries_to_logits = factors.logit_weights()
        self._lengths = np.vstack([lengths.weights, lengths.bias])

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        features = self._beside(texts, embeddings)
        return Prediction(_sigmoid(features @ self._queries_to_logits), np.maximum(features @ self._lengths, 1))

    def _beside(self, texts: Sequence[str], embeddings: FloatArray) -> FloatArray:
        """The embeddings, text features, and a constant: [B, P]."""
        constant = np.ones((len(embeddings), 1), np.float32)
        return np.hstack([embeddings, np.float32(self.config.text_weight) * self._features(texts), constant])

    def _arrays(self) -> Mapping[str, AnyArray]:
        return {"factors.logits": self._queries_to_logits, "factors.lengths": self._lengths, **self._features.arrays()}

    def _restore(self, artefact: Artefact) -> None:
        self._queries_to_logits = artefact.array("factors.logits", None, len(self.cards))
        self._lengths = artefact.array("factors.lengths", len(self._queries_to_logits), len(self.cards))
        self._features = TextFeatures.restore(artefact)


class _Factors:
    """The parameters, and their gradients by hand: W [P, D], v [K, D], w [D]."""

    def __init__(self, features: int, experts: int, dimensions: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        scale = dimensions**-0.5
        self.values: list[npt.NDArray[np.float32]] = [
            rng.normal(0, scale, (features, dimensions)).astype(np.float32),
            rng.normal(0, scale, (experts, dimensions)).astype(np.float32),
            np.ones(dimensions, np.float32),
        ]

    def logit_weights(self) -> FloatArray:
        """[P, K]: a query's features times this are its logits."""
        query, expert, joint = self.values
        return cast("FloatArray", (query * joint) @ _unit(expert).T)

    def gradients(self, features: FloatArray, error: FloatArray) -> list[FloatArray]:
        """Of the loss, from its derivative by the logits [Q, K]."""
        query, expert, joint = self.values
        unit, common = _unit(expert), features @ query
        pulled = error @ unit
        by_unit = error.T @ (common * joint)
        by_expert = by_unit - unit * (unit * by_unit).sum(1, keepdims=True)
        lengths = np.linalg.norm(expert, axis=1, keepdims=True)
        return [features.T @ (pulled * joint), by_expert / np.maximum(lengths, _TINY), (common * pulled).sum(0)]


def _descend(
    features: FloatArray, quality: FloatArray, config: MatrixFactorizationConfig, steps: int
) -> Iterator[_Factors]:
    """Adam with decoupled weight decay over all observed pairs; yields after every few steps and at the end."""
    factors = _Factors(features.shape[1], quality.shape[1], config.dimensions, config.seed)
    first = [np.zeros_like(value) for value in factors.values]
    second = [np.zeros_like(value) for value in factors.values]
    for step in range(1, steps + 1):
        gradients = factors.gradients(features, _error(features @ factors.logit_weights(), quality))
        rate = config.learning_rate * np.sqrt(1 - _SECOND**step) / (1 - _FIRST**step)
        for value, gradient, one, two in zip(factors.values, gradients, first, second, strict=True):
            one += (1 - _FIRST) * (gradient - one)
            two += (1 - _SECOND) * (gradient**2 - two)
            value -= rate * one / (np.sqrt(two) + _TINY) + config.learning_rate * config.decay * value
        if step % _STEPS_PER_CHECK == 0 or step == steps:
            yield factors


def _best_steps(features: FloatArray, quality: FloatArray, config: MatrixFactorizationConfig) -> int:
    """The number of steps of the least cross-entropy on held-out queries."""
    held_out = np.random.default_rng(config.seed).random(len(features)) < _HELD_OUT
    if not np.isfinite(quality[held_out]).any() or not np.isfinite(quality[~held_out]).any(0).all():
        return min(_STEPS_PER_CHECK, config.steps)
    losses = [
        _cross_entropy(features[held_out] @ factors.logit_weights(), quality[held_out])
        for factors in _descend(features[~held_out], quality[~held_out], config, config.steps)
    ]
    return min((int(np.argmin(losses)) + 1) * _STEPS_PER_CHECK, config.steps)


def _error(logits: FloatArray, quality: FloatArray) -> FloatArray:
    """Derivative of the mean cross-entropy by the logits, 0 where nothing was observed."""
    seen = np.isfinite(quality)
    return cast("FloatArray", np.where(seen, _sigmoid(logits) - quality, 0) / np.float32(seen.sum()))


def _cross_entropy(logits: FloatArray, quality: FloatArray) -> float:
    return float(np.nanmean(np.logaddexp(0, logits) - quality * logits))


def _sigmoid(logits: FloatArray) -> FloatArray:
    return cast("FloatArray", 1 / (1 + np.exp(-np.clip(logits, -30, 30))))


def _unit(rows: FloatArray) -> FloatArray:
    unit: FloatArray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)
    return unit
