"""Puts the service together: experts, policies and state become an ASGI application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experts.cards import ExpertCard
from experts.expert import Expert
from router_service.core.routing import LoadRouter, Plan, RouterSlot, able
from router_service.core.service import DEFAULT_POLICY, Service
from router_service.core.steering import Steering
from router_service.errors import SettingsError
from router_service.http.application import Application
from router_service.metrics import Metrics
from router_service.settings import Settings
from router_service.state.link import RedisLink
from routers.policy import Policy, RouterChoice
from routers.strategies import create_strategy


def build_application(
    settings: Settings,
    *,
    experts: Mapping[str, Expert],
    cards: Sequence[ExpertCard],
    policies: Mapping[str, Policy],
    load: LoadRouter,
    own: frozenset[str] = frozenset(),
    spaces: Mapping[str, str] | None = None,
    steering: Mapping[str, Steering] | None = None,
) -> Application:
    """The ASGI application that serves `experts` under `policies`. Nothing runs before its lifespan begins.

    `load` loads each policy's router, in a thread, once the service has started; policies with the same choice of
    router share one. The service is not ready before the experts of `own`, which are hosted with it, have been up.
    `spaces` says of experts that embed whose vectors theirs can be compared with (`Fleet.space`), `steering` what gates
    are told (`read_steering`).
    `settings.redis_url` must be set: whoever has no Redis starts the embedded one and names its socket. Raises
    `SettingsError`, and `RouterConfigError` for a policy that does not fit the fleet.
    """
    if settings.redis_url is None:
        raise SettingsError("REDIS_URL is not set, and no embedded Redis was started")
    if DEFAULT_POLICY not in policies and any(card.kind != "embedding" for card in cards):
        raise SettingsError(f"there is no policy {DEFAULT_POLICY!r}, which is the default")
    if missing := sorted({card.name for card in cards} ^ set(experts)):
        raise SettingsError(f"expert {missing[0]!r} has a card or an implementation, but not both")
    for policy in policies.values():
        policy.check_fleet(cards)
    metrics = Metrics()
    link = RedisLink(
        settings.redis_url.get_secret_value(), prefix=settings.redis_prefix, timeout_s=settings.redis_timeout_s
    )
    plans = _plans(policies, cards, load, metrics)
    service = Service(
        settings,
        link,
        experts=experts,
        cards=cards,
        plans=plans,
        metrics=metrics,
        own=own,
        spaces=spaces,
        steering=steering,
    )
    return Application(service)


def _plans(
    policies: Mapping[str, Policy], cards: Sequence[ExpertCard], load: LoadRouter, metrics: Metrics
) -> dict[str, Plan]:
    slots: list[tuple[tuple[RouterChoice, str], RouterSlot]] = []
    plans = {}
    for name, policy in policies.items():
        wanted = (policy.router, policy.serves)
        slot = next((slot for choice, slot in slots if choice == wanted), None)
        if slot is None:
            slot = RouterSlot(policy.router, load, metrics)
            slots.append((wanted, slot))
        plans[name] = Plan(policy, slot, create_strategy(policy), able(policy, cards))
    return plans
