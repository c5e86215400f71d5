"""How a router's options may be searched, said beside each: `k: Annotated[int, Range(5, 400, log=True)] = 100`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class Range:
    """Values from `low` to `high`, both included; integers where both are; evenly on a log scale where `log`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One of `values`."""

    values: tuple[Any, ...]


def search_space(config: type[BaseModel]) -> dict[str, Range | Choice]:
    """The options of `config` that may be searched, by name."""
    return {
        name: mark
        for name, field in config.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Range | Choice)
    }
