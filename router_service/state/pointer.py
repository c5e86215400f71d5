"""Which artefact each router is loaded from: a hash in Redis that training writes and every replica watches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from router_service.state.link import RedisLink

_KEY = "routers"


@dataclass(frozen=True, slots=True)
class Promotion:
    """An artefact folder, and when (Unix time) it was promoted: promoting a folder again makes it be loaded again."""

    folder: Path
    at: float

    def to_json(self) -> dict[str, Any]:
        """The promotion as JSON."""
        return {"folder": str(self.folder), "at": self.at}


async def promote(link: RedisLink, router: str, folder: Path) -> Promotion:
    """Make every replica load `router` from `folder`: absolute, and readable by all of them. Raises `StateError`."""
    promotion = Promotion(folder, time.time())
    value = orjson.dumps(promotion.to_json()).decode()
    await link.run(lambda client: client.hset(link.key(_KEY), router, value))
    return promotion


async def promotions(link: RedisLink) -> dict[str, Promotion]:
    """The last promotion of each router that has one. Raises `StateError`."""
    rows = cast("dict[bytes, bytes]", await link.run(lambda client: client.hgetall(link.key(_KEY))))
    return {name.decode(): _parse(value) for name, value in rows.items()}


def _parse(value: bytes) -> Promotion:
    data = orjson.loads(value)
    return Promotion(Path(data["folder"]), float(data["at"]))
