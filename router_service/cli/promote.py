"""`router-service promote`: a trained router takes over in the running service, without a dropped request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router_service.cli.client import Url, checked, connect
from router_service.cli.console import CommandError, out

if TYPE_CHECKING:
    from router_service.state.link import RedisLink

_POLL_S = 0.5
_CONFIRMATIONS = 5  # of one replica or another: each answer may come from any of them


def promote(
    folder: Annotated[
        Path,
        typer.Argument(
            exists=True,
            file_okay=False,
            resolve_path=True,
            help="What `train --out` wrote, or a retriever's `router`.",
        ),
    ],
    url: Url = None,
) -> None:
    """Make the running service use a trained router, without a restart; an older one, to go back.

    Examples:

      router-service promote artefacts/knn-1

      router-service promote retriever-2/router
    """
    from routers.artefact import read_header

    put_in_service(url, read_header(folder)["router"], folder)
    out.print(f"in service: {folder}", soft_wrap=True)


def put_in_service(url: str | None, router: str, folder: Path, *, timeout_s: float = 120.0) -> None:
    """Check that the artefact loads, point the service to it, and wait until the service says that it is in use.

    Raises `RouterConfigError` for an artefact that does not load, and `CommandError` without service or Redis, or when
    the service does not take the router over; it then goes on with the one that it has.
    """
    from routers.registry import load_router

    load_router(folder)
    used: dict[str, str] = _status(url)["routers"]
    if router not in used:
        raise CommandError(
            f"no policy of the service uses the router {router!r}; in use are {', '.join(used) or 'none'}"
        )
    promotion = asyncio.run(_point(router, folder))
    _wait(url, router, promotion, used[router], timeout_s)


async def _point(router: str, folder: Path) -> dict[str, Any]:
    from router_service.state.pointer import promote as point

    async with redis_link() as link:
        promotion = await point(link, router, folder)
    return promotion.to_json()


def _wait(url: str | None, router: str, promotion: dict[str, Any], before: str, timeout_s: float) -> None:
    """Until the service uses the promotion. What it said of the router `before` says nothing of this one."""
    deadline, confirmed = time.monotonic() + timeout_s, 0
    while confirmed < _CONFIRMATIONS:
        status = _status(url)
        if status["promotions"].get(router) == promotion:
            confirmed += 1
            continue
        state, confirmed = status["routers"][router], 0
        if state not in ("loaded", "loading", before):
            raise CommandError(f"the service keeps the router that it has: {state}")
        if time.monotonic() > deadline:
            raise CommandError(f"the service has not taken {promotion['folder']} over within {timeout_s:g} s: {state}")
        time.sleep(_POLL_S)


def _status(url: str | None) -> dict[str, Any]:
    """What `/readyz` says, whether ready or not; over a new connection, so that any replica may answer."""
    with connect(url) as client:
        answer = client.get("/readyz")
        status: dict[str, Any] = answer.json() if answer.status_code == 503 else checked(answer)  # 503: not ready yet
    if "routers" not in status:
        raise CommandError(f"{answer.url} is not a routing service's: {answer.text[:200]}")
    return status


@asynccontextmanager
async def redis_link() -> AsyncIterator[RedisLink]:
    """The service's Redis: `REDIS_URL`, or the embedded one in `ROUTER_DATA_FOLDER`. Raises `CommandError`."""
    from router_service.redis_server import RedisServer
    from router_service.settings import read_settings
    from router_service.state.link import RedisLink

    settings = read_settings()
    given = settings.redis_url
    embedded = RedisServer(settings.data_folder).url
    link = RedisLink(
        given.get_secret_value() if given else embedded,
        prefix=settings.redis_prefix,
        timeout_s=settings.redis_timeout_s,
    )
    try:
        if not await link.probe():
            where = "REDIS_URL" if given else embedded
            raise CommandError(
                f"the service's Redis does not answer at {where}: give REDIS_URL, or ROUTER_DATA_FOLDER of the service"
            )
        yield link
    finally:
        await link.close()
