"""What was observed of each expert on the mean: quality, tokens, speed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from routers.artefact import AnyArray, Artefact
from routers.contracts import FloatArray, Observations
from routers.errors import ObservationError

TOKENS_PER_CHAR = 0.25  # of an expert whose tokens were never counted
SECONDS_PER_TOKEN = 0.02  # of output, where no latency was ever measured
_OUTPUT_TOKENS = 256.0  # where no answer's length is known, and none can be had from its cost


@dataclass(frozen=True, slots=True)
class Profile:
    """Means per expert, float32 [K] each, never NaN.

    `quality` is the mean over the expert's own observations. `seconds_per_token` counts output tokens: latency over
    length, so that an estimated length gives an estimated latency. What no expert was measured for has the constants
    above; what some were not has the mean of the others.
    """

    quality: FloatArray
    output_tokens: FloatArray
    tokens_per_char: FloatArray
    seconds_per_token: FloatArray

    @classmethod
    def fit(cls, table: Observations) -> Self:
        """From a table in which every expert was observed at least once."""
        chars = np.array([len(text) for text in table.texts], np.float32)[:, None]
        return cls(
            quality=_column_means(table.quality, 0.0),
            output_tokens=_column_means(table.output_tokens, _OUTPUT_TOKENS),
            tokens_per_char=_ratios(table.input_tokens, np.broadcast_to(chars, table.quality.shape), TOKENS_PER_CHAR),
            seconds_per_token=_ratios(table.latency_s, table.output_tokens, SECONDS_PER_TOKEN),
        )

    @classmethod
    def of_one(cls, quality: float, output_tokens: float, tokens_per_char: float, seconds_per_token: float) -> Self:
        """Of a single expert."""
        return cls(*np.array([[quality], [output_tokens], [tokens_per_char], [seconds_per_token]], np.float32))

    def joined(self, other: Self) -> Self:
        """With the experts of `other` after its own."""
        return type(self)(*(np.append(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def at(self, keep: npt.NDArray[np.intp]) -> Self:
        """Of the experts at `keep` alone."""
        return type(self)(*(getattr(self, f.name)[keep] for f in fields(self)))

    def arrays(self) -> dict[str, AnyArray]:
        """For an artefact."""
        return {f"profile.{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def restore(cls, artefact: Artefact, experts: int) -> Self:
        """From an artefact."""
        return cls(**{field.name: artefact.array(f"profile.{field.name}", experts) for field in fields(cls)})


def checked(table: Observations) -> Observations:
    """`table` without experts never observed and with output tokens that cost implies. Raises `ObservationError`."""
    shape = (len(table.texts), len(table.cards))
    if not all(array.shape == shape for array in _arrays(table)):
        raise ObservationError(f"every array of the table needs the shape {shape} of its texts and cards")
    if len({card.name for card in table.cards}) < len(table.cards):
        raise ObservationError("two cards of the table have the same name")
    known = table.quality[np.isfinite(table.quality)]
    if known.size and not 0 <= known.min() <= known.max() <= 1:
        raise ObservationError(f"quality lies in 0..1, the table has {known.min():g} to {known.max():g}")
    for card in [card for i, card in enumerate(table.cards) if not np.isfinite(table.quality[:, i]).any()]:
        table = table.without(card.name)
    if not table.cards:
        raise ObservationError("the table has no observed quality")
    return replace(table, output_tokens=_implied_tokens(table))


def only(table: Observations, expert: str) -> Observations:
    """The column of one expert alone."""
    for card in table.cards:
        if card.name != expert:
            table = table.without(card.name)
    return table


def _arrays(table: Observations) -> tuple[FloatArray, ...]:
    return table.quality, table.cost_usd, table.input_tokens, table.output_tokens, table.latency_s


def _implied_tokens(table: Observations) -> FloatArray:
    """Output tokens, from the cost and the card's prices where they were not counted but the input was."""
    input_price = np.array([card.input_price for card in table.cards], np.float32)
    output_price = np.array([card.output_price for card in table.cards], np.float32)
    paid = table.cost_usd * 1e6 - table.input_tokens * input_price
    implied = np.divide(paid, output_price, out=np.full_like(paid, np.nan), where=output_price > 0)
    tokens: FloatArray = np.where(np.isfinite(table.output_tokens), table.output_tokens, np.maximum(implied, 0))
    return tokens


def _column_means(values: FloatArray, default: float) -> FloatArray:
    """Mean of each column's known values; of all columns where it has none; `default` where none has."""
    return _filled(values.sum(0, where=np.isfinite(values)), np.isfinite(values).sum(0), default)


def _ratios(values: FloatArray, per: FloatArray, default: float) -> FloatArray:
    """Sum of each column's values over the sum of `per`, over the pairs where both are known."""
    known = np.isfinite(values) & np.isfinite(per)
    return _filled(values.sum(0, where=known), per.sum(0, where=known), default)


def _filled(sums: FloatArray, weights: FloatArray, default: float) -> FloatArray:
    known = weights > 0
    overall = float((sums[known] / weights[known]).mean()) if known.any() else default
    filled = np.divide(sums, weights, out=np.full(len(sums), overall, np.float64), where=known)
    return filled.astype(np.float32)
