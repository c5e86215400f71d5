"""How likely an answer is right: what a cascade accepts by.

A logistic regression (FrugalGPT, arXiv 2305.05176, trains a scorer; AutoMix, arXiv 2310.12963, asks the model itself)
on two numbers that cost nothing: what the router expected of the expert on this query, and the expert's confidence, the
geometric mean probability of its answer's tokens. `training.acceptance` fits it on observations, so that a score of .8
is right four times in five.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]

_SURE = 6.0  # log-odds beyond which a probability says no more


class Logistic(BaseModel):
    """A probability from weighted log-odds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bias: Number = 0.0
    quality: Number = 1.0
    confidence: Number = 0.0

    def __call__(self, quality: float, confidence: float | None) -> float:
        """The probability that an answer is right, from estimated quality and confidence, both in 0..1."""
        told = 0.0 if confidence is None else self.confidence * log_odds(confidence)
        return 1 / (1 + math.exp(-(self.bias + self.quality * log_odds(quality) + told)))


class Acceptance(BaseModel):
    """The scorer: `told` where the expert gave its tokens' probabilities, `untold` where it did not.

    As it stands, before it was fitted, it is the router's estimate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    told: Logistic = Logistic()
    untold: Logistic = Logistic()

    def score(self, quality: float, confidence: float | None) -> float:
        """How likely an answer is right, in 0..1."""
        return (self.untold if confidence is None else self.told)(quality, confidence)


def log_odds(probability: float) -> float:
    """log(p / (1 - p)), bounded."""
    if not 0 < probability < 1:
        return -_SURE if probability <= 0 else _SURE
    return min(max(math.log(probability / (1 - probability)), -_SURE), _SURE)
