"""Fit a cascade's acceptance score on observations: how likely an answer is right, from what costs nothing to know.

Logistic regression (Newton's method on the penalised likelihood) of observed quality, which may be any number in 0..1,
on the log-odds of the router's estimate and of the expert's confidence. The estimates must be of queries that the
router had not seen, or the score would trust it too much.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from routers.contracts import FloatArray, Observations
from routers.strategies.acceptance import Acceptance, Logistic, log_odds

Floats = npt.NDArray[np.float64]

_PENALTY = 1.0  # on weights' squares; a table has thousands of answers
_STEPS = 30
_DIGITS = 4

_odds = np.vectorize(log_odds, otypes=[np.float64])


def fit_acceptance(observations: Observations, estimated: FloatArray) -> Acceptance:
    """The scorer for answers in `observations` whose qualities were `estimated` [Q, E] without having been seen."""
    seen = np.isfinite(observations.quality)
    right = observations.quality[seen].astype(np.float64)
    quality = _odds(estimated[seen])
    untold = _logistic(quality[:, None], right)
    if observations.confidence is None:
        return Acceptance(told=untold, untold=untold)
    confidence = observations.confidence[seen]
    told = np.isfinite(confidence)
    features = np.stack([quality[told], _odds(confidence[told])], axis=1)
    return Acceptance(told=_logistic(features, right[told]), untold=untold)


def _logistic(features: Floats, right: Floats) -> Logistic:
    """Weights of `features` [N, F], quality first and confidence second, for observed quality [N]."""
    design = np.hstack([np.ones((len(features), 1)), features])
    weights = np.zeros(design.shape[1])
    penalty = np.diag([0.0, *[_PENALTY] * features.shape[1]])
    for _ in range(_STEPS):
        found = 1 / (1 + np.exp(-design @ weights))
        slope = design.T @ (right - found) - penalty @ weights
        curve = (design * (found * (1 - found))[:, None]).T @ design + penalty + 1e-9 * np.eye(len(weights))
        step = np.linalg.solve(curve, slope)
        weights = weights + step
        if np.abs(step).max() < 1e-8:
            break
    bias, quality, *rest = (round(float(weight), _DIGITS) for weight in weights)
    return Logistic(bias=bias, quality=quality, confidence=rest[0] if rest else 0.0)
