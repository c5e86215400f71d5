"""Rate limits and budgets: counters in Redis that a request takes from before it runs and settles after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, cast

from router_service.state.link import RedisLink
from router_service.state.spool import Charge

_RESERVE = files(__package__).joinpath("reserve.lua").read_text()
_BUCKET_TTL_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """One limit with what a request may use of it.

    A `bucket` refills `limit` a minute (requests, tokens); a `budget` counts what is spent (USD) until its key expires.
    """

    name: str
    key: str
    kind: Literal["bucket", "budget"]
    limit: float
    amount: float
    ttl_s: int = _BUCKET_TTL_S

    def settle(self, used: float, *, reserved: bool) -> Charge | None:
        """The change that makes the counter say `used`; `None` where it does already.

        Without a reservation (Redis was away) a budget is charged in full and a bucket not at all.
        """
        if self.kind == "bucket":
            change = self.amount - used if reserved else 0.0
        else:
            change = used - self.amount if reserved else used
        return Charge(self.key, self.kind, change, self.ttl_s) if change else None


@dataclass(frozen=True, slots=True)
class Reserved:
    """`refused` is the counter that had not enough left (then nothing was taken), `left` what each has left now."""

    refused: Counter | None
    wait_s: float
    left: tuple[float, ...]


class Counters:
    """Takes from many counters at once, or from none."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._reserve = link.client.register_script(_RESERVE)

    async def reserve(self, counters: Sequence[Counter]) -> Reserved:
        """Take every counter's amount. Raises `StateError` while Redis is away."""
        arguments: list[Any] = []
        for counter in counters:
            arguments += (counter.kind, counter.limit, counter.amount, counter.ttl_s)
        keys = [counter.key for counter in counters]
        answer = cast("list[Any]", await self._link.run(lambda _: self._reserve(keys=keys, args=arguments)))
        refused, wait_s, *left = answer
        return Reserved(counters[refused - 1] if refused else None, float(wait_s), tuple(map(float, left)))
