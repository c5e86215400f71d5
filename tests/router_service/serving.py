"""Serves fake experts through the real application, on a real uvicorn and a real Redis."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import orjson
import uvicorn

from router_service.app import build_application
from router_service.core.routing import LoadRouter
from router_service.core.steering import Steering
from router_service.http.application import Application
from router_service.settings import read_settings
from routers.contracts import Observations
from routers.policy import Policy
from routers.registry import AnyRouter, create_router, load_router
from tests.router_service.fakes import FakeExpert, RedisProcess, card


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 40.0) -> None:
    """Return once `condition` holds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  what is waited for is on the other side of a socket
            await asyncio.sleep(0.02)


def best_router(good: str, *experts: str) -> AnyRouter:
    """A real router, fitted on a table in which `good` is right nine times in ten and all others half the time."""
    cards = [card(name) for name in experts]
    quality = np.array([[0.9 if name == good else 0.5 for name in experts]], np.float32)
    unknown = np.full_like(quality, np.nan)
    table = Observations(
        ids=["q"],
        texts=["what is two and two?"],
        tasks=["sums"],
        cards=cards,
        quality=quality,
        cost_usd=quality * 1e-6,
        input_tokens=unknown,
        output_tokens=unknown,
        latency_s=unknown,
    )
    return create_router("best").fit(table)


def policy(name: str = "auto", **fields: Any) -> Policy:
    """A policy that takes the best at any price."""
    objective = {"quality": 1, "cost": 0}
    return Policy.model_validate({"name": name, "objective": objective, "router": {"name": "best"}, **fields})


@dataclass
class Running:
    """A service that runs: its client, its experts, its application and what its ledger says."""

    client: httpx.AsyncClient
    url: str
    application: Application
    redis: RedisProcess
    experts: Mapping[str, FakeExpert]

    async def chat(self, model: str = "auto", text: str = "what is two and two?", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", None)
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def events(self, model: str = "auto", **fields: Any) -> tuple[httpx.Response, list[str]]:
        response = await self.chat(model, stream=True, **fields)
        blocks = response.text.split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") for block in blocks)
        return response, [block.removeprefix("data: ") for block in blocks]

    async def stream(self, stream: str = "ledger", *, count: int) -> list[dict[str, Any]]:
        """The stream's entries, once there are `count`."""
        async with asyncio.timeout(40):
            while True:
                with self.redis.client() as client:
                    rows: Any = client.xrange(f"router:{stream}")
                if len(rows) >= count:
                    return [orjson.loads(fields[b"entry"]) for _, fields in rows]
                await asyncio.sleep(0.02)

    async def ready(self) -> bool:
        return (await self.client.get("/readyz")).status_code == 200

    async def readiness(self) -> str:
        return (await self.client.get("/readyz")).text


@asynccontextmanager
async def serving(
    redis: RedisProcess,
    *experts: FakeExpert,
    policies: Sequence[Policy] = (policy(),),
    good: str | None = None,
    cards: Mapping[str, Mapping[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
    ready: bool = True,
    own: frozenset[str] = frozenset(),
    load: LoadRouter | None = None,
    spaces: Mapping[str, str] | None = None,
    steering: Mapping[str, Steering] | None = None,
) -> AsyncIterator[Running]:
    settings = read_settings(environment or {}, redis_url=redis.url, data_folder=redis.folder, redis_timeout_s=0.5)
    names = [expert.name for expert in experts]
    application = build_application(
        settings,
        experts={expert.name: expert for expert in experts},
        cards=[card(name, **(cards or {}).get(name, {})) for name in names],
        policies={served.name: served for served in policies},
        own=own,
        spaces=spaces,
        steering=steering,
        load=load or (lambda _, promoted: load_router(promoted) if promoted else best_router(good or names[0], *names)),
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(application, log_level="warning", lifespan="on", timeout_graceful_shutdown=10)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            running = Running(client, url, application, redis, {expert.name: expert for expert in experts})
            try:
                while not server.started:
                    await asyncio.sleep(0.01)
                    if task.done():
                        task.result()
                if ready:
                    await eventually(running.ready)
                yield running
            finally:
                server.should_exit = True
                with suppress(asyncio.CancelledError):
                    await task
