"""A client that keeps a number of connections busy, light enough to measure a server from the same machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from router_service.cli.console import CommandError

_CHAT = "/v1/chat/completions"
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its headers, what it says, and when it began and ended, in seconds after the request."""

    headers: Mapping[str, str]
    text: str
    first_s: float
    total_s: float


async def ask_all(url: str, bodies: Sequence[Mapping[str, Any]], *, connections: int) -> list[Answer]:
    """The answers to chat completions of `bodies`, `connections` at a time; `CommandError` for one that fails."""
    left = iter(enumerate(bodies))
    answers: dict[int, Answer] = {}
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(base_url=url, timeout=timeout, connector=connector) as session:

        async def work() -> None:
            for number, body in left:
                answers[number] = await _ask(session, body)

        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(work())
    return [answers[number] for number in range(len(bodies))]


async def _ask(session: aiohttp.ClientSession, body: Mapping[str, Any]) -> Answer:
    started = time.perf_counter()
    async with session.post(_CHAT, data=orjson.dumps(body), headers={"content-type": "application/json"}) as response:
        if response.status != 200:
            raise CommandError(f"{response.status}: {(await response.text())[:500]}")
        first_s, text = await (_stream if body.get("stream") else _whole)(response, started)
        return Answer(response.headers, text, first_s, time.perf_counter() - started)


async def _whole(response: aiohttp.ClientResponse, started: float) -> tuple[float, str]:
    data = await response.read()
    return time.perf_counter() - started, orjson.loads(data)["choices"][0]["message"]["content"] or ""


async def _stream(response: aiohttp.ClientResponse, started: float) -> tuple[float, str]:
    """The time of the first word, and the text of all."""
    first_s, text = 0.0, ""
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        for choice in orjson.loads(line[6:]).get("choices", ()):
            if word := choice["delta"].get("content"):
                first_s = first_s or time.perf_counter() - started
                text += word
    return first_s, text
