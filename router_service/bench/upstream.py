"""A real second service with OpenAI's API, to proxy to: `python -m router_service.bench.upstream --port 9000`.

The model's name says how it behaves:

    fast     answers at once
    slow     answers after `SLOW_S` seconds
    endless  streams a word every 50 ms until the client hangs up
    dying    closes the connection in the middle of its answer
    broken   answers 500

Embeddings are answered at once, whatever the model's name.

`GET /stats` counts requests begun, completed and abandoned for each model.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter, defaultdict
from typing import Any

import orjson
from aiohttp import web

SLOW_S = 3.0
WORDS = ("The", " answer", " is", " 42", ".")
_ENDLESS_PAUSE_S = 0.05
_MAX_BODY = 64 << 20
_VECTOR = [0.6, -0.8]
_USAGE = {"prompt_tokens": 12, "completion_tokens": len(WORDS), "total_tokens": 12 + len(WORDS)}


class Upstream:
    """The service: stateless but for its counters."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def application(self) -> web.Application:
        """The aiohttp application."""
        application = web.Application(client_max_size=_MAX_BODY)
        application.router.add_post("/v1/chat/completions", self.chat)
        application.router.add_post("/v1/embeddings", self.embeddings)
        application.router.add_get("/v1/models", self.models)
        application.router.add_get("/stats", self.stats)
        return application

    async def models(self, request: web.Request) -> web.Response:
        """Its model list, which health checks ask for."""
        return _json({"object": "list", "data": []})

    async def stats(self, request: web.Request) -> web.Response:
        """What was begun, completed and abandoned."""
        return _json(self._counts)

    async def embeddings(self, request: web.Request) -> web.Response:
        """The same vector for each text."""
        body = orjson.loads(await request.read())
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        self._counts[body["model"]].update(begun=1, completed=1)
        data = [{"object": "embedding", "index": index, "embedding": _VECTOR} for index in range(len(texts))]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        return _json({"object": "list", "model": body["model"], "data": data, "usage": usage})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """A chat completion, as the model's name wants it."""
        body = orjson.loads(await request.read())
        counts = self._counts[body["model"]]
        counts["begun"] += 1
        try:
            answer = await self._answer(request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            counts["abandoned"] += 1
            raise
        counts["completed"] += 1
        return answer

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        model = body["model"]
        if model == "broken":
            return _json({"error": {"message": "it is broken", "type": "server_error"}}, status=500)
        if model == "slow":
            await asyncio.sleep(SLOW_S)
        if model == "endless" or body.get("stream"):
            return await _stream(request, model)
        if model == "dying" and request.transport is not None:
            request.transport.abort()
        message = {"role": "assistant", "content": "".join(WORDS)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return _json({**_head("chat.completion", model), "choices": [choice], "usage": _USAGE})


async def _stream(request: web.Request, model: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for word in WORDS:
        await response.write(_chunk(model, {"content": word}))
        if model == "dying" and request.transport is not None:
            request.transport.abort()
            return response
    while model == "endless":
        await response.write(_chunk(model, {"content": " more"}))
        await asyncio.sleep(_ENDLESS_PAUSE_S)
    await response.write(_chunk(model, {}, finish_reason="stop"))
    usage = {**_head("chat.completion.chunk", model), "choices": [], "usage": _USAGE}
    await response.write(b"data: %b\n\ndata: [DONE]\n\n" % orjson.dumps(usage))
    await response.write_eof()
    return response


def _chunk(model: str, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: %b\n\n" % orjson.dumps({**_head("chat.completion.chunk", model), "choices": [choice]})


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": "upstream-1", "object": kind, "created": 1, "model": model}


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    web.run_app(
        Upstream().application(),
        host="127.0.0.1",
        port=arguments.port,
        print=None,
        access_log=None,
        handler_cancellation=True,
    )


if __name__ == "__main__":
    main()
