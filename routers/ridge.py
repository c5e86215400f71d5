"""Ridge regression whose penalties choose themselves, and what experts have in common.

Choosing takes the largest of many noisy estimates, so errors in the *differences* between experts are what costs, and
how hard a query is for all of them hardly matters. Both are therefore told apart: outcomes are rotated into how the
experts do on the mean and into the directions in which they differ, and every direction gets a penalty of its own, the
one of the least leave-one-out error. Directions in which nothing can be foretold vanish (reduced-rank regression, cf.
Breiman and Friedman 1997, "Predicting multivariate responses in multiple linear regression").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from routers.contracts import FloatArray

Floats = npt.NDArray[np.float64]

_PENALTIES = np.logspace(-2, 4, 25)


@dataclass(frozen=True, slots=True)
class Linear:
    """`features @ weights + bias`: weights [P, M], bias [M]; `left_out` [N, M] is the fit of each row without it."""

    weights: FloatArray
    bias: FloatArray
    left_out: FloatArray


def filled(values: FloatArray, means: FloatArray) -> Floats:
    """`values` [Q, K], every NaN replaced by its column's of `means` plus how much its row exceeds them elsewhere."""
    seen = np.isfinite(values)
    surprise = np.where(seen, values - means, 0)
    rows = surprise.sum(1, keepdims=True) / np.maximum(seen.sum(1, keepdims=True), 1)
    return np.where(seen, values, means + rows).astype(np.float64)


def fit_ridge(features: FloatArray, targets: Floats) -> Linear:
    """Ridge of every column of `targets` [N, M] for itself, a constant column where nothing can be foretold."""
    return _Solver(features).fit(targets)


def fit_experts(features: FloatArray, quality: Floats) -> Linear:
    """Ridge of `quality` [N, K] with penalties for what the K experts share and for each way in which they differ."""
    solver = _Solver(features)
    plain = solver.fit(quality)
    rotation = _rotation(plain.left_out - plain.left_out.mean(0))
    rotated = solver.fit(quality @ rotation)
    parts = rotated.weights, rotated.bias, rotated.left_out
    return Linear(*(np.asarray(part @ rotation.T, np.float32) for part in parts))


def _rotation(expected: FloatArray) -> Floats:
    """Orthogonal [K, K]: first the mean of all experts, then the directions in which `expected` [N, K] differ most."""
    experts = expected.shape[1]
    differences = (expected - expected.mean(1, keepdims=True)).astype(np.float64)
    _, directions = np.linalg.eigh(differences.T @ differences)
    shared = np.full((experts, 1), experts**-0.5)
    return np.hstack([shared, directions[:, :0:-1]])


class _Solver:
    """Ridge on the same features many times: one eigendecomposition serves all targets and penalties."""

    def __init__(self, features: FloatArray) -> None:
        self._mean = features.mean(0, dtype=np.float64)
        self._centred = features - self._mean
        values, vectors = np.linalg.eigh(self._centred.T @ self._centred)
        kept = values > values[-1] * 1e-10
        self._values, self._vectors = values[kept], vectors[:, kept]
        self._scores = self._centred @ self._vectors  # [N, R]

    def fit(self, targets: Floats) -> Linear:
        means = targets.mean(0)
        centred = targets - means
        projected = self._scores.T @ centred
        least = (centred**2).mean(0) * (len(targets) / max(1, len(targets) - 1)) ** 2
        weights, left_out = np.zeros((self._mean.size, targets.shape[1])), np.tile(means, (len(targets), 1))
        for penalty in _PENALTIES:
            coefficients = projected / (self._values + penalty)[:, None]
            own = (self._scores**2 / (self._values + penalty)).sum(1, keepdims=True) + 1 / len(targets)
            error = (centred - self._scores @ coefficients) / np.maximum(1 - own, 1e-6)
            loss = (error**2).mean(0)
            better = loss < least
            least = np.where(better, loss, least)
            weights[:, better] = self._vectors @ coefficients[:, better]
            left_out[:, better] = (targets - error)[:, better]
        bias = means - self._mean @ weights
        return Linear(weights.astype(np.float32), bias.astype(np.float32), left_out.astype(np.float32))
