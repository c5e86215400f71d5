"""Who may ask, and how much: API keys, rate limits, budgets, and how many requests at once."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from router_service.errors import (
    AuthenticationError,
    BudgetError,
    NotAdminError,
    OverloadError,
    RateLimitError,
    StateError,
    UnavailableError,
)
from router_service.settings import ANONYMOUS, Settings
from router_service.state.counters import Counter, Counters, Reserved
from router_service.state.link import RedisLink
from router_service.state.spool import Charge

_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a request took from its counters; `made` is false where Redis was away and limits fail open."""

    counters: tuple[Counter, ...] = ()
    made: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)

    def settle(self, *, tokens: int, cost_usd: float) -> list[Charge]:
        """The changes that make the counters say what was really used."""
        used = {"tokens": tokens, "usd": cost_usd}
        charges = (
            counter.settle(used[counter.name], reserved=self.made) for counter in self.counters if counter.name in used
        )
        return [charge for charge in charges if charge]


class Admission:
    """Lets requests in. Everything that calls an expert goes through `admit`."""

    def __init__(self, settings: Settings, link: RedisLink) -> None:
        self._digests = {bytes.fromhex(digest): name for digest, name in settings.key_digests.items()}
        self._settings = settings
        self._link = link
        self._counters = Counters(link)

    def authenticate(self, authorization: bytes | None) -> str:
        """The name of the key in an `Authorization: Bearer` header. Raises `AuthenticationError`."""
        if not self._digests:
            return ANONYMOUS
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise AuthenticationError("no API key: send it as 'Authorization: Bearer KEY'", code="missing_api_key")
        presented = hashlib.sha256(key.strip()).digest()
        # Every digest is compared, each in constant time, so that timing tells nothing of the keys.
        names = [name for digest, name in self._digests.items() if hmac.compare_digest(digest, presented)]
        if not names:
            raise AuthenticationError("this API key is not known")
        return names[0]

    def authenticate_admin(self, authorization: bytes | None) -> str:
        """As `authenticate`, of a key that may change the fleet; without keys everybody may. Raises `NotAdminError`."""
        name = self.authenticate(authorization)
        if self._digests and name not in self._settings.admins:
            raise NotAdminError(f"the API key {name!r} may not change the fleet: ROUTER_ADMINS does not name it")
        return name

    async def admit(
        self,
        key: str,
        *,
        tokens: int,
        cost_usd: float,
        policy: str | None = None,
        policy_usd_per_day: float | None = None,
    ) -> Reservation:
        """Take one request, at most `tokens` tokens and `cost_usd` dollars, from the limits of key and policy.

        Raises `RateLimitError`, `BudgetError`, or, where limits fail closed and Redis is away, `UnavailableError`.
        """
        counters = self._key_counters(key, tokens, cost_usd)
        if policy is not None and policy_usd_per_day is not None:
            counters += (self._budget("policy", policy, policy_usd_per_day, cost_usd, period="day"),)
        if not counters:
            return Reservation()
        try:
            reserved = await self._counters.reserve(counters)
        except StateError as error:
            if self._settings.limits_fail == "closed":
                message = "limits cannot be checked now, and this service answers nothing unchecked"
                raise UnavailableError(message, retry_after_s=1.0) from error
            return Reservation(counters, made=False)
        headers = _limit_headers(counters, reserved)
        if reserved.refused:
            raise _refusal(reserved.refused, reserved.wait_s, headers)
        return Reservation(counters, headers=headers)

    def _key_counters(self, key: str, tokens: int, cost_usd: float) -> tuple[Counter, ...]:
        limits = self._settings.limits_of(key)
        counters = []
        if limits.requests_per_minute is not None:
            counters.append(self._bucket("requests", key, limits.requests_per_minute, 1))
        if limits.tokens_per_minute is not None:
            counters.append(self._bucket("tokens", key, limits.tokens_per_minute, tokens))
        if limits.usd_per_day is not None:
            counters.append(self._budget("key", key, limits.usd_per_day, cost_usd, period="day"))
        if limits.usd_per_month is not None:
            counters.append(self._budget("key", key, limits.usd_per_month, cost_usd, period="month"))
        return tuple(counters)

    def _bucket(self, name: str, key: str, limit: float, amount: float) -> Counter:
        return Counter(name=name, key=self._link.key("limit", name, key), kind="bucket", limit=limit, amount=amount)

    def _budget(self, whose: str, name: str, limit: float, amount: float, *, period: str) -> Counter:
        now = datetime.now(UTC)
        window, days = (f"{now:%Y-%m-%d}", 2) if period == "day" else (f"{now:%Y-%m}", 62)
        key = self._link.key("spent", whose, name, window)
        return Counter(name="usd", key=key, kind="budget", limit=limit, amount=amount, ttl_s=days * _DAY_S)


class Gate:
    """How many requests are under way; beyond the limit, and while closed, nobody gets in."""

    def __init__(self, limit: int) -> None:
        self.under_way = 0
        self.closed = False
        self._limit = limit
        self._empty = asyncio.Event()
        self._empty.set()

    def __enter__(self) -> None:
        if self.closed:
            raise UnavailableError("the service is shutting down", retry_after_s=1.0)
        if self.under_way >= self._limit:
            raise OverloadError(f"{self._limit} requests are under way, which is the limit", retry_after_s=1.0)
        self.under_way += 1
        self._empty.clear()

    def __exit__(self, *_: object) -> None:
        self.under_way -= 1
        if not self.under_way:
            self._empty.set()

    async def close(self, grace_s: float) -> None:
        """Let nobody in any more, and wait at most `grace_s` seconds for those inside."""
        self.closed = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), grace_s)


def _limit_headers(counters: tuple[Counter, ...], reserved: Reserved) -> dict[str, str]:
    """OpenAI's `x-ratelimit-*` headers for the buckets among `counters`."""
    headers: dict[str, str] = {}
    for counter, left in zip(counters, reserved.left, strict=True):
        if counter.kind == "bucket":
            headers[f"x-ratelimit-limit-{counter.name}"] = f"{counter.limit:.0f}"
            headers[f"x-ratelimit-remaining-{counter.name}"] = str(max(0, math.floor(left)))
            full_s = max(0.0, (counter.limit - left) * 60 / counter.limit)
            headers[f"x-ratelimit-reset-{counter.name}"] = f"{full_s:.3f}s"
    return headers


def _refusal(counter: Counter, wait_s: float, headers: Mapping[str, str]) -> RateLimitError | BudgetError:
    if counter.kind == "budget":
        return BudgetError(f"the budget of {counter.limit:g} USD is spent", headers=headers)
    message = f"the limit of {counter.limit:g} {counter.name} a minute is reached: try again in {wait_s:.1f} s"
    return RateLimitError(message, headers=headers, retry_after_s=wait_s)
