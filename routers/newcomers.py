"""Experts that a router was not fitted on: what it makes of their card, and of a few observations.

The error of a card's estimate is a Gaussian process over queries: one offset for the expert, plus one that fades with
the distance of a query from those observed. Its posterior mean is the correction, so that 0, 16 and 64 observations are
one formula that shrinks towards the card. Tokens and speed are shrunk towards the peers' in the same spirit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from experts.cards import ExpertCard
from routers.artefact import AnyArray, Artefact
from routers.contracts import FloatArray

_MOST_OBSERVATIONS = 512  # evenly taken where there are more: then it is time to fit again
_LOCAL_SPREAD = 0.2
_LOCAL_SCALE = 0.25  # in cosine
_PEERS_COUNT_AS = 4.0  # observations
_SCALARS = ("bias", "spread", "noise", "uncertainty", "output_ratio", "tokens_per_char", "seconds_per_token")


@dataclass(frozen=True, slots=True)
class Newcomer:
    """One new expert.

    Its quality on a query x is that of its peers (weights `peers` [K] over the experts fitted on) + x . `direction` [D]
    + `bias` + what its N observations add: `weights` [N] over their `embeddings` [N, D]. `spread` is the standard
    deviation of experts around what their cards promise, `noise` that of one observation, `uncertainty` that of the
    quality estimated. `output_ratio` multiplies its peers' output tokens.
    """

    card: ExpertCard
    peers: FloatArray
    direction: FloatArray
    embeddings: FloatArray
    weights: FloatArray
    bias: float
    spread: float
    noise: float
    uncertainty: float
    output_ratio: float
    tokens_per_char: float
    seconds_per_token: float

    def observed(self, embeddings: FloatArray, surprise: FloatArray) -> Self:
        """With the `surprise` [N] on N queries: quality observed less quality estimated from the card."""
        if not len(surprise):
            return self
        every = -(-len(surprise) // _MOST_OBSERVATIONS)
        embeddings, surprise = embeddings[::every], surprise[::every]
        count = len(surprise)
        covariance = self._kernel(embeddings, embeddings) + self.noise**2 * np.eye(count, dtype=np.float32)
        left = self.noise**2 / (self.noise**2 + count * self.spread**2)
        return replace(
            self,
            embeddings=embeddings,
            weights=np.linalg.solve(covariance, surprise).astype(np.float32),
            uncertainty=float(np.sqrt(left * self.spread**2 + _LOCAL_SPREAD**2)),
        )

    def correction(self, embeddings: FloatArray) -> FloatArray:
        """What its observations add to the quality of queries [B, D]: [B]."""
        added: FloatArray = self._kernel(embeddings, self.embeddings) @ self.weights
        return added

    def _kernel(self, queries: FloatArray, others: FloatArray) -> FloatArray:
        near = np.exp((queries @ others.T - 1) / _LOCAL_SCALE)
        covariance: FloatArray = np.float32(self.spread**2) + np.float32(_LOCAL_SPREAD**2) * near
        return covariance

    def arrays(self, place: int) -> dict[str, AnyArray]:
        """For an artefact, where it is newcomer number `place`. The card goes elsewhere."""
        scalars = np.array([getattr(self, name) for name in _SCALARS], np.float64)
        found: dict[str, AnyArray] = {
            "peers": self.peers,
            "direction": self.direction,
            "embeddings": self.embeddings,
            "weights": self.weights,
            "scalars": scalars,
        }
        return {f"newcomer.{place}.{name}": array for name, array in found.items()}

    @classmethod
    def restore(cls, artefact: Artefact, place: int, card: ExpertCard, experts: int) -> Self:
        """From an artefact."""
        at = f"newcomer.{place}."
        embeddings = artefact.array(at + "embeddings", None, None)
        count, dimensions = embeddings.shape
        scalars = artefact.array(at + "scalars", len(_SCALARS))
        return cls(
            card=card,
            peers=artefact.array(at + "peers", experts),
            direction=artefact.array(at + "direction", dimensions),
            embeddings=embeddings,
            weights=artefact.array(at + "weights", count),
            **dict(zip(_SCALARS, scalars.tolist(), strict=True)),
        )


def shrunk_mean(values: npt.NDArray[np.floating], prior: float) -> float:
    """Mean of the known `values`, shrunk towards `prior`."""
    known = values[np.isfinite(values)]
    return float((known.sum() + _PEERS_COUNT_AS * prior) / (len(known) + _PEERS_COUNT_AS))
