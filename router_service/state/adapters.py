"""Which adapters were added to the running service: a hash in Redis that every process of it watches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import orjson

from experts.fleet import AdapterSource, FleetEntry
from router_service.state.link import RedisLink

_KEY = "adapters"


@dataclass(frozen=True, slots=True)
class Registered:
    """An adapter's entry, as a fleet file would have it, and when (Unix time) it was added."""

    entry: FleetEntry
    at: float

    @property
    def source(self) -> AdapterSource:
        """Its base, and where its files are."""
        return cast("AdapterSource", self.entry.adapter)

    def to_json(self) -> dict[str, Any]:
        """The registration as JSON."""
        return {"entry": self.entry.model_dump(mode="json", exclude_none=True), "at": self.at}


async def register(link: RedisLink, entry: FleetEntry) -> Registered | None:
    """Make every process load an adapter, from a folder that all of them can read; None where the name is taken.

    Raises `StateError`.
    """
    one = Registered(entry, time.time())
    value = _dump(one)
    added = await link.run(lambda client: cast("Any", client.hsetnx(link.key(_KEY), entry.name, value)))
    return one if added else None


async def replace(link: RedisLink, one: Registered) -> None:
    """Make every process load an adapter in place of what is registered under its name. Raises `StateError`."""
    value = _dump(one)
    await link.run(lambda client: cast("Any", client.hset(link.key(_KEY), one.entry.name, value)))


def _dump(one: Registered) -> str:
    return orjson.dumps(one.to_json()).decode()


async def withdraw(link: RedisLink, name: str) -> bool:
    """Make every process forget an adapter; whether it was there. Raises `StateError`."""
    return bool(await link.run(lambda client: cast("Any", client.hdel(link.key(_KEY), name))))


async def registered(link: RedisLink) -> tuple[dict[str, Registered], dict[str, str]]:
    """All adapters that were added, by name; and of those whose registration cannot be read, why. Raises `StateError`.

    What one process wrote, another version of the service may not understand: that is no reason to lose the others.
    """
    rows = cast("dict[bytes, bytes]", await link.run(lambda client: cast("Any", client.hgetall(link.key(_KEY)))))
    found, unreadable = dict[str, Registered](), dict[str, str]()
    for key, value in rows.items():
        name = key.decode(errors="replace")
        try:
            found[name] = _parse(name, value)
        except (ValueError, TypeError, KeyError) as error:
            unreadable[name] = f"its registration cannot be read: {error!r}"
    return found, unreadable


@lru_cache(maxsize=4096)  # each look finds nearly all of them as they were
def _parse(name: str, value: bytes) -> Registered:
    data = orjson.loads(value)
    one = Registered(FleetEntry.model_validate(data["entry"]), float(data["at"]))
    if one.entry.name != name or one.entry.adapter is None:
        raise ValueError(f"it is of {one.entry.name!r}, or of no adapter")
    return one
