"""Strategies: what is done with a decision. By name, each in a module of its own that is imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import ValidationError

from routers.errors import RouterConfigError
from routers.policy import Policy
from routers.strategies.base import BaseStrategy

_STRATEGIES = {
    "single": "routers.strategies.single:SingleStrategy",
    "cascade": "routers.strategies.cascade:CascadeStrategy",
    "vote": "routers.strategies.vote:VoteStrategy",
    "mixture_of_agents": "routers.strategies.mixture_of_agents:MixtureOfAgentsStrategy",
    "self_moa": "routers.strategies.mixture_of_agents:SelfMoaStrategy",
    "router_r1": "routers.strategies.router_r1.strategy:RouterR1Strategy",
}


def strategy_names() -> list[str]:
    """Every known strategy's name, sorted."""
    return sorted(_STRATEGIES)


def create_strategy(policy: Policy) -> BaseStrategy[Any]:
    """The strategy that `policy` names, with its options and fallbacks. Raises `RouterConfigError`."""
    name = policy.strategy.name
    if name not in _STRATEGIES:
        raise RouterConfigError(
            f"policy {policy.name!r}: no strategy is named {name!r}; known are {', '.join(strategy_names())}"
        )
    module, _, attribute = _STRATEGIES[name].partition(":")
    found: type[BaseStrategy[Any]] = getattr(import_module(module), attribute)
    try:
        strategy = found(policy.fallbacks, policy.strategy.options)
    except ValidationError as error:
        raise RouterConfigError(f"policy {policy.name!r}, strategy {name!r}: {error}") from error
    most = policy.ceilings.calls
    if most is not None and most < strategy.least_calls:
        raise RouterConfigError(
            f"policy {policy.name!r}: the strategy {name!r} needs {strategy.least_calls} calls, "
            f"and `ceilings.calls` leaves it {most}"
        )
    return strategy
