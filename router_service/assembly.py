"""From a fleet, its experts and a folder of policies to the ASGI application: the same on Ray Serve and on uvicorn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experts.expert import Expert
from experts.fleet import Fleet
from router_service.app import build_application
from router_service.core.steering import read_steering
from router_service.http.application import Application
from router_service.log import configure_logging
from router_service.settings import Settings
from routers.contracts import Query
from routers.errors import RouterConfigError, RouterNotFittedError
from routers.policy import Policy, RouterChoice, load_policies
from routers.registry import AnyRouter, load_router, router_class
from routers.strategies import create_strategy

SHIPPED_POLICIES = Path(__file__).resolve().parent.parent / "deploy" / "policies"
"""The policies `auto`, `cheap` and `best`, for the pocket fleet."""


def read_policies(folder: Path | None, fleet: Fleet) -> Mapping[str, Policy]:
    """The policies of `folder`, or those that ship, checked against the fleet. Raises `RouterConfigError`."""
    policies = load_policies(folder or SHIPPED_POLICIES)
    for policy in policies.values():
        check_policy(policy, fleet)
    return policies


def check_policy(policy: Policy, fleet: Fleet) -> None:
    """Raise `RouterConfigError` if the fleet lacks what `policy` names, or there is no such router or strategy."""
    policy.check_fleet(fleet.cards)
    router_class(policy.router.name)
    if lost := create_strategy(policy).experts - {card.name for card in fleet.cards}:
        names = ", ".join(map(repr, sorted(lost)))
        raise RouterConfigError(f"policy {policy.name!r}: its strategy speaks of {names}, which the fleet has not")
    if policy.serves == "embeddings":
        _check_one_space(policy, fleet)


def _check_one_space(policy: Policy, fleet: Fleet) -> None:
    """Raise `RouterConfigError` where `policy` may answer one request with vectors that are not to be compared."""
    spaces = {
        space: entry.name for entry in fleet.experts if policy.admits(entry.card) and (space := fleet.space(entry))
    }
    if len(spaces) > 1:
        one, other = list(spaces.values())[:2]
        raise RouterConfigError(
            f"policy {policy.name!r}: the vectors of {one!r} and {other!r} are of different encoders and cannot be "
            "compared: allow experts of one encoder alone (constraints.allow)"
        )


def assemble(
    settings: Settings, fleet: Fleet, experts: Mapping[str, Expert], policies: Mapping[str, Policy]
) -> Application:
    """The application that serves `experts` of `fleet` under `policies`."""
    configure_logging(as_json=settings.log_json)
    return build_application(
        settings,
        experts=experts,
        cards=fleet.cards,
        policies=policies,
        load=load_fitted_router,
        own=frozenset(entry.name for entry in fleet.experts if not entry.remote),
        spaces={entry.name: space for entry in fleet.experts if (space := fleet.space(entry))},
        steering=read_steering(fleet),
    )


def load_fitted_router(choice: RouterChoice, promoted: Path | None) -> AnyRouter:
    """The promoted router, or that of the policy's artefact; warm: its first estimate loads what it embeds with."""
    folder = promoted or choice.artefact
    if folder is None:
        raise RouterNotFittedError(f"router {choice.name!r}: its policy names no artefact, and none was promoted")
    router = load_router(folder)
    if router.name != choice.name:
        raise RouterConfigError(f"{str(folder)!r} holds the router {router.name!r}, not {choice.name!r}")
    router.estimate([Query(text="warm up")], router.cards)
    return router
