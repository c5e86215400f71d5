"""Mixtures by name: `BASE+ADAPTER:WEIGHT+ADAPTER:WEIGHT` is a static one, `BASE+gate:NAME` lets a gate decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from experts.errors import ExpertRequestError

MOST_WEIGHT = 1e6
"""No weight means more, and float32 has room for it."""

_GATE = "gate:"


@dataclass(frozen=True, slots=True)
class MixtureName:
    """Adapters with their weights, or a gate, on a base. Names are as the request wrote them."""

    base: str
    weights: Mapping[str, float] = field(default_factory=dict)
    gate: str | None = None


def is_mixture(model: object) -> bool:
    """Whether a request's `model` asks for a mixture: no expert or policy has a `+` in its name."""
    return isinstance(model, str) and "+" in model


def parse_mixture(model: str) -> MixtureName:
    """What a mixture's name says. An adapter without a weight has weight 1. Raises `ExpertRequestError`."""
    base, *terms = model.split("+")
    if not base or not all(terms):
        raise _wrong(f"{model[:128]!r} is no mixture: write BASE+ADAPTER:WEIGHT+... or BASE+gate:NAME")
    if terms[0].startswith(_GATE):
        if len(terms) > 1:
            raise _wrong("a gate decides alone: write BASE+gate:NAME and nothing more")
        return MixtureName(base, gate=terms[0].removeprefix(_GATE))
    weights: dict[str, float] = {}
    for term in terms:
        name, colon, weight = term.partition(":")
        if name in weights:
            raise _wrong(f"adapter {name[:128]!r} is named twice")
        weights[name] = _weight(name, weight) if colon else 1.0
    return MixtureName(base, weights)


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MOST_WEIGHT:  # NaN is not
        message = f"must be a finite number of at most {MOST_WEIGHT:g}, got {text[:32]!r}"
        raise _wrong(f"the weight of adapter {name[:128]!r} {message}")
    return weight


def _wrong(message: str) -> ExpertRequestError:
    return ExpertRequestError(f"model: {message}", param="model", code="invalid_value")
