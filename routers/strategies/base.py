"""What strategies share: options and fallbacks from the policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any, Generic

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypeVar

from experts.expert import ExpertRequest, Part
from routers.contracts import Call, Decision
from routers.policy import Fallbacks


class StrategyOptions(BaseModel):
    """The options of a strategy; each strategy adds its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


OptionsT = TypeVar("OptionsT", bound=StrategyOptions, default=StrategyOptions)


class BaseStrategy(ABC, Generic[OptionsT]):
    """A strategy as a policy configures it; no state of a request. `name`, `options_type` and `run` are its own."""

    name: str
    options_type: type[OptionsT]

    def __init__(self, fallbacks: Fallbacks | None = None, options: Mapping[str, Any] | None = None) -> None:
        self.fallbacks = fallbacks or Fallbacks()
        self.options: OptionsT = self.options_type.model_validate(dict(options or {}))

    @property
    def experts(self) -> frozenset[str]:
        """The experts that the options name."""
        return frozenset()

    @property
    def least_calls(self) -> int:
        """How many calls it needs to be what it is, where nothing fails."""
        return 1

    @property
    def most_calls(self) -> int:
        """How many calls it makes at most, where nothing fails: what is reserved before it is decided whom to ask."""
        return self.least_calls

    def attempt_s(self, left: float) -> float:
        """Seconds that one attempt has, of those that are `left`."""
        own = self.fallbacks.attempt_timeout_s
        return left if own is None else min(left, own)

    @abstractmethod
    def run(self, decision: Decision, request: ExpertRequest, call: Call) -> AsyncIterator[Part]:
        """Answer `request` by calling experts of `decision`."""
