"""The service: what stays from request to request, and the way of a request through it.

admission -> cache -> Router.estimate -> Policy.choose -> Strategy.run -> ledger
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from experts.cards import ExpertCard
from experts.errors import ExpertConfigError, ExpertRequestError
from experts.expert import Endpoint, Expert
from experts.fleet import FleetEntry
from experts.mixtures import is_mixture, parse_mixture
from router_service.core.adapters import Adapters
from router_service.core.admission import Admission, Gate
from router_service.core.calls import Lane
from router_service.core.health import HealthMonitor
from router_service.core.routing import Plan, RouterSlot, able, watch_promotions
from router_service.core.search import SearchIndex
from router_service.core.steering import Steering
from router_service.errors import BadRequestError, ModelNotFoundError, StateError
from router_service.metrics import Metrics
from router_service.settings import Settings
from router_service.state.cache import AnswerCache, Sessions
from router_service.state.ledger import LedgerWriter
from router_service.state.link import RedisLink

logger = logging.getLogger(__name__)

_CANCEL_S = 0.1

DEFAULT_POLICY = "auto"
EMBEDDINGS_POLICY = "embeddings"
"""What the model `auto` means where embeddings are asked for."""


class Service:
    """Experts, plans (policies in service) and state. `start` and `close` bracket its life.

    `spaces` says of experts that embed whose vectors theirs can be compared with: equal, of one space.
    `steering` says what the gates of experts are told.
    It is not ready before the experts of `own`, which this service hosts, have been up once.
    """

    def __init__(
        self,
        settings: Settings,
        link: RedisLink,
        *,
        experts: Mapping[str, Expert],
        cards: Sequence[ExpertCard],
        plans: Mapping[str, Plan],
        metrics: Metrics,
        own: frozenset[str],
        spaces: Mapping[str, str] | None = None,
        steering: Mapping[str, Steering] | None = None,
    ) -> None:
        steering = steering or {}
        self.settings = settings
        self.link = link
        self.metrics = metrics
        self.cards = {card.name: card for card in cards}
        self.experts = dict(experts)
        self._own = own
        self._spaces = dict(spaces or {})
        self.plans = dict(plans)
        self.lanes = {
            name: Lane(self.cards[name], expert, limit=settings.max_calls_per_expert, steering=steering.get(name))
            for name, expert in experts.items()
        }
        self.admission = Admission(settings, link)
        self.gate = Gate(settings.max_concurrency)
        self.cache = AnswerCache(link)
        self.sessions = Sessions(link)
        self.ledger = LedgerWriter(link, settings.data_folder / "spool", max_entries=settings.ledger_max_entries)
        self.index = SearchIndex(settings.index) if settings.index else None
        self.health = HealthMonitor(self.experts, metrics)
        self.adapters = Adapters(
            link, self.experts, enlist=self._enlist, dismiss=self._dismiss, check=self._check_space
        )
        self._slots: list[RouterSlot] = list({id(plan.slot): plan.slot for plan in plans.values()}.values())
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to watch Redis, routers and experts; `unready` says what is missing until they are there."""
        await self.link.probe()
        self.ledger.start()
        promoted = watch_promotions(self.link, self._slots)
        for watch in (self.link.watch(), self.health.watch(), promoted, self.adapters.watch()):
            self.spawn(watch)

    async def close(self) -> None:
        """Let nobody in, wait for requests under way, and put all that was recorded where it is safe."""
        await self.gate.close(self.settings.shutdown_grace_s)
        await self.ledger.close()
        while self._tasks:  # `asyncio.wait_for`, which redis-py uses, may swallow a cancellation before Python 3.12
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=_CANCEL_S)
        for slot in self._slots:
            slot.close()
        for expert in self.experts.values():
            await expert.close()
        if self.index:
            self.index.close()
        await self.link.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in the background, at most until the service closes. State that is away is no error there."""
        task = asyncio.create_task(_without_state(work))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("background work failed", exc_info=error)

    def _enlist(self, entry: FleetEntry, expert: Expert) -> None:
        """Route to an adapter that was added."""
        card = entry.card
        self.lanes[card.name] = Lane(card, expert, limit=self.settings.max_calls_per_expert)
        self.experts[card.name] = expert
        self.cards[card.name] = card
        if entry.base in self._spaces:
            self._spaces[card.name] = self._spaces[entry.base]
        self._renew_plans()

    def _dismiss(self, name: str) -> None:
        """Route to an adapter no more; calls of it that are under way go on."""
        del self.lanes[name], self.cards[name]
        del self.experts[name]
        self._spaces.pop(name, None)
        self._renew_plans()
        self.health.forget(name)

    def _check_space(self, entry: FleetEntry) -> None:
        """Raise `ExpertConfigError` where a policy would answer with an adapter's vectors beside another encoder's."""
        space = self._spaces.get(entry.base or "")
        for plan in self.plans.values() if space else ():
            others = [card.name for card in plan.cards if plan.policy.admits(card)]
            beside = [name for name in others if self._spaces.get(name, space) != space]
            if beside and plan.policy.serves == "embeddings" and plan.policy.admits(entry.card):
                raise ExpertConfigError(
                    f"policy {plan.policy.name!r} would choose between {entry.name!r} and {beside[0]!r}, whose vectors "
                    "are of different encoders and cannot be compared: have it allow those of one encoder alone"
                )

    def may_choose(self, expert: str) -> list[str]:
        """The policies that may choose an expert: of its kind of work, with no list that leaves it out."""
        card = self.cards[expert]
        return [name for name, plan in self.plans.items() if card in plan.cards and plan.policy.admits(card)]

    def _renew_plans(self) -> None:
        """Have every policy choose among the cards that there are now; a decision under way keeps its own."""
        self.plans = {
            name: replace(plan, cards=able(plan.policy, self.cards.values())) for name, plan in self.plans.items()
        }

    def resolve(self, model: Any, endpoint: Endpoint = "chat/completions") -> tuple[Plan | None, str | None]:
        """The plan or the expert that `model` names for `endpoint`. Raises `BadRequestError`, `ModelNotFoundError`."""
        if not isinstance(model, str) or not model:
            raise BadRequestError("'model' must be the name of an expert or policy", param="model")
        if model in self.lanes:
            return None, model
        if is_mixture(model):
            return None, self._base_of(model)
        prefix, colon, name = model.partition(":")
        serves = "embeddings" if endpoint == "embeddings" else "generation"
        default = EMBEDDINGS_POLICY if serves == "embeddings" else DEFAULT_POLICY
        if prefix == DEFAULT_POLICY and (plan := self.plans.get(name if colon else default)):
            if plan.policy.serves != serves:
                raise BadRequestError(f"policy {plan.policy.name!r} serves {plan.policy.serves}", param="model")
            return plan, None
        if model == DEFAULT_POLICY:
            message = f"there is no policy {default!r}, by which texts find their expert: name one expert"
            raise ModelNotFoundError(message, param="model")
        raise ModelNotFoundError(
            f"there is no model {model[:128]!r}: GET /v1/models lists those there are", param="model"
        )

    def _base_of(self, model: str) -> str:
        """The expert that answers for a mixture, which knows its adapters. Raises `BadRequestError`."""
        try:
            base = parse_mixture(model).base
        except ExpertRequestError as error:
            raise BadRequestError(str(error), param="model") from error
        card = self.cards.get(base)
        if card is None or card.kind != "local":
            known = ", ".join(name for name, card in self.cards.items() if card.kind == "local") or "none"
            raise ModelNotFoundError(
                f"{base[:128]!r} is no model that mixes adapters: there are {known}", param="model"
            )
        return base

    def unready(self) -> list[str]:
        """Why the service cannot do what it was configured to do; empty when it can."""
        reasons = ["shutting down"] if self.gate.closed else []
        for slot in self._slots:
            if not slot.loaded:
                reasons.append(slot.fault or f"router {slot.name!r} is being loaded")
        if not self.health.looked:
            reasons.append("experts have not been asked yet")
        elif loading := self._loading():
            reasons.append(f"experts are being loaded: {', '.join(loading)}")
        elif self.experts and len(self.health.down) == len(self.experts):
            reasons.append("every expert is down")
        if not self.link.up and (self.settings.limits_fail == "closed" or not self.link.seen):
            reasons.append("Redis cannot be reached")
        if self.ledger.fault:
            reasons.append(f"the ledger cannot be written: {self.ledger.fault}")
        return reasons

    def _loading(self) -> list[str]:
        """The models of our own that were never up since the start."""
        return [name for name in self.experts if name in self._own and name not in self.health.seen]

    def status(self) -> dict[str, Any]:
        """What `/readyz` answers."""
        reasons = self.unready()
        return {
            "ready": not reasons,
            "reasons": reasons,
            "experts": {name: "down" if name in self.health.down else "up" for name in self.experts},
            "routers": {slot.name: slot.fault or ("loaded" if slot.loaded else "loading") for slot in self._slots},
            "promotions": self._promotions(),
            "redis": "up" if self.link.up else "down",
            "adapters": dict.fromkeys(self.adapters.taken, "loaded") | self.adapters.faults,
            "ledger_spool_entries": self.ledger.depth,
        }

    def _promotions(self) -> dict[str, Any]:
        """What each router's answers come from, where every policy that uses it has taken the same promotion over."""
        in_use = {slot.name: {other.in_use for other in self._slots if other.name == slot.name} for slot in self._slots}
        return {name: one.to_json() for name, (one, *others) in in_use.items() if one and not others}

    def render_metrics(self) -> bytes:
        """Prometheus' text."""
        self.metrics.in_flight.set(self.gate.under_way)
        self.metrics.redis_up.set(self.link.up)
        self.metrics.spool_depth.set(self.ledger.depth)
        return self.metrics.render()


async def _without_state(work: Coroutine[Any, Any, None]) -> None:
    with suppress(StateError):
        await work
