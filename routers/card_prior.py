"""What an expert's card alone says about its quality, before anything was observed of it.

A new expert is expected to do as its peers do: the known experts of like description and price, each with weight
softmax(cos(descriptions) / 0.1 - (log price difference)^2 / 2). Two corrections are added, whose slopes are fitted by
leaving each known expert out in turn and estimating it from the others: how much closer the query is to the new
expert's description than to an average one, and how much dearer the expert is than its peers. What is left unexplained
between experts is the standard deviation of an estimate from a card: it is large, and is reported as uncertainty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from experts.cards import ExpertCard
from routers.artefact import AnyArray, Artefact
from routers.contracts import FloatArray
from routers.newcomers import Newcomer
from routers.profile import TOKENS_PER_CHAR, Profile

_TEMPERATURE = 0.1
_FREE_PRICE = 0.01  # USD per million tokens: below this, prices count as equal
_RIDGE_EXPERTS = 2.0  # as if two experts more had shown that price says nothing
_RIDGE_AFFINITY = 2.0  # as if 200 pairs more, of a cosine .1 above the mean, had shown that nearness says nothing
_MOST_QUERIES = 2000
_LEAST_WEIGHT = 0.1
_LEAST_SPREAD = 0.15  # a card promises no more than this, however well it would have done for the few known experts
_LEAST_NOISE = 0.1


@dataclass(frozen=True, slots=True)
class CardPrior:
    """The known experts' cards as arrays, and the two fitted slopes.

    `descriptions` [K, D] are unit vectors (D is 0 where a router embeds nothing), `log_prices` [K], `mean_query` [D];
    `spread` is the standard deviation between experts of what stays unexplained, `noise` that of one observation.
    """

    descriptions: FloatArray
    log_prices: FloatArray
    mean_query: FloatArray
    affinity_slope: float
    price_slope: float
    spread: float
    noise: float

    @classmethod
    def fit(
        cls, cards: Sequence[ExpertCard], descriptions: FloatArray, queries: FloatArray, quality: FloatArray
    ) -> Self:
        """Fit on `queries` [Q, D] and the `quality` [Q, K] observed, NaN where it was not."""
        every = max(1, len(queries) // _MOST_QUERIES)
        queries, quality = queries[::every], quality[::every]
        prices, mean_query = log_prices(cards), queries.mean(0)
        weights = _peers(descriptions, prices, descriptions, prices, same=True)
        surprise = _left_out(quality, weights)  # [Q, K]: observed less expected of the peers
        between = _mean(surprise)
        gap = prices - prices @ weights
        price_slope = between @ gap / (gap @ gap + _RIDGE_EXPERTS)
        within = np.nan_to_num(surprise - between)
        affinity = (queries - mean_query) @ (descriptions - descriptions.mean(0)).T
        seen = np.isfinite(surprise)
        affinity_slope = (affinity * within).sum() / ((affinity**2 * seen).sum() + _RIDGE_AFFINITY)
        unexplained = between - price_slope * gap
        return cls(
            descriptions=descriptions,
            log_prices=prices,
            mean_query=mean_query,
            affinity_slope=float(affinity_slope),
            price_slope=float(price_slope),
            spread=max(float(np.std(unexplained)), _LEAST_SPREAD),
            noise=max(float(np.sqrt((within**2).sum() / max(1, seen.sum()))), _LEAST_NOISE),
        )

    def newcomer(self, card: ExpertCard, description: FloatArray, profile: Profile) -> Newcomer:
        """What to make of a new expert's `card`, whose description has the embedding `description` [D]."""
        prices = log_prices([card])
        peers = _peers(self.descriptions, self.log_prices, description[None], prices, same=False)[:, 0]
        direction = self.affinity_slope * (description - self.descriptions.mean(0))
        premium = self.price_slope * float(prices[0] - self.log_prices @ peers)
        return Newcomer(
            card=card,
            peers=peers,
            direction=direction,
            embeddings=np.zeros((0, len(description)), np.float32),
            weights=np.zeros(0, np.float32),
            bias=premium - float(self.mean_query @ direction),
            spread=self.spread,
            noise=self.noise,
            uncertainty=float(np.hypot(self.spread, self.noise)),
            output_ratio=1.0,
            tokens_per_char=TOKENS_PER_CHAR,
            seconds_per_token=float(profile.seconds_per_token @ peers),
        )

    def joined(self, card: ExpertCard, description: FloatArray) -> Self:
        """With one more known expert, whose description has the embedding `description` [1, D]; the slopes stay."""
        return replace(
            self,
            descriptions=np.vstack([self.descriptions, description]),
            log_prices=np.append(self.log_prices, log_prices([card])),
        )

    def at(self, keep: npt.NDArray[np.intp]) -> Self:
        """With the known experts at `keep` alone."""
        return replace(self, descriptions=self.descriptions[keep], log_prices=self.log_prices[keep])

    def arrays(self) -> dict[str, AnyArray]:
        """For an artefact. Prices are in the cards."""
        scalars = np.array([self.affinity_slope, self.price_slope, self.spread, self.noise], np.float64)
        return {"prior.descriptions": self.descriptions, "prior.mean_query": self.mean_query, "prior.scalars": scalars}

    @classmethod
    def restore(cls, artefact: Artefact, cards: Sequence[ExpertCard]) -> Self:
        """From an artefact."""
        descriptions = artefact.array("prior.descriptions", len(cards), None)
        mean_query = artefact.array("prior.mean_query", descriptions.shape[1])
        scalars = artefact.array("prior.scalars", 4).tolist()
        return cls(descriptions, log_prices(cards), mean_query, *scalars)


def log_prices(cards: Sequence[ExpertCard]) -> FloatArray:
    """Natural logarithm of input and output price together, [E]."""
    prices: FloatArray = np.log(np.array([c.input_price + c.output_price + _FREE_PRICE for c in cards], np.float32))
    return prices


def _peers(
    known: FloatArray, known_prices: FloatArray, new: FloatArray, new_prices: FloatArray, *, same: bool
) -> FloatArray:
    logits = known @ new.T / _TEMPERATURE - (known_prices[:, None] - new_prices) ** 2 / 2
    if same and len(known) > 1:
        np.fill_diagonal(logits, -np.inf)
    weights = np.exp(logits - logits.max(0))
    normalised: FloatArray = (weights / weights.sum(0)).astype(np.float32)
    return normalised


def _left_out(quality: FloatArray, weights: FloatArray) -> FloatArray:
    """Quality less the weighted mean of the other experts' on the same query, NaN where either is unknown."""
    seen = np.isfinite(quality)
    total = np.where(seen, quality, 0) @ weights
    weight = seen.astype(np.float32) @ weights
    expected: FloatArray = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > _LEAST_WEIGHT)
    return quality - expected


def _mean(values: FloatArray) -> FloatArray:
    """Mean of each column over what is known, 0 where nothing is."""
    seen = np.isfinite(values)
    mean: FloatArray = np.where(seen, values, 0).sum(0) / np.maximum(seen.sum(0), 1)
    return mean.astype(np.float32)
