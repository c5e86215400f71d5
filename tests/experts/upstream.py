"""A second HTTP service that behaves, or misbehaves, as the `model` of each request tells it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

ANSWER = {
    "id": "chatcmpl-up",
    "object": "chat.completion",
    "created": 1,
    "model": "up-2025",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}},
}
EMBEDDING = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}],
    "usage": {"prompt_tokens": 4, "total_tokens": 4},
}


def chunk(delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk as OpenAI sends it; one without choices if `delta` is None."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 1, "choices": choices, **more}


CHUNKS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "h\u00e9"}),
    chunk({"content": "llo"}),
    chunk({}, "stop"),
]


class Upstream:
    """The service. `seen` are the requests' headers (lower case) and bodies; `hung_up`: a client left its stream."""

    def __init__(self) -> None:
        self.url = ""
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.hung_up = asyncio.Event()

    def bodies(self) -> list[dict[str, Any]]:
        """The bodies so far."""
        return [body for _, body in self.seen]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer as the model's name says."""
        body = json.loads(await request.read())
        self.seen.append(({name.lower(): value for name, value in request.headers.items()}, body))
        behave = getattr(self, f"do_{body['model'].replace('-', '_')}")
        response: web.StreamResponse = await behave(request, body)
        return response

    async def do_good(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if request.path.endswith("embeddings"):
            return web.json_response(EMBEDDING)
        if not body.get("stream"):
            return web.json_response(ANSWER)
        events = [f"data: {json.dumps(one)}\n\n".encode() for one in CHUNKS]
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append(f"data: {json.dumps(chunk(None, usage=ANSWER['usage']))}\n\n".encode())
        return await self.send(request, [*events, b"data: [DONE]\n\n"])

    async def do_no_usage(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if not body.get("stream"):
            return web.json_response({**ANSWER, "usage": None})
        return await self.send(request, [f"data: {json.dumps(one)}\n\n".encode() for one in CHUNKS])

    async def do_crumbs(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """The stream byte by byte, with comments, CRLF, other fields and no blank line at the end."""
        text = b": ping\r\n\r\n" + b"".join(
            b"event: chunk\r\ndata:" + json.dumps(one, ensure_ascii=False).encode() + b"\r\n\r\n" for one in CHUNKS
        )
        return await self.send(request, [bytes([byte]) for byte in text + b"data: [DONE]"])

    async def do_cut(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Two chunks, then the connection ends in the middle of the transfer."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for one in CHUNKS[:2]:
            await response.write(f"data: {json.dumps(one)}\n\n".encode())
        assert request.transport is not None
        request.transport.close()
        return response

    async def do_short(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """A stream that ends well, but before the answer did."""
        return await self.send(request, [f"data: {json.dumps(one)}\n\n".encode() for one in CHUNKS[:2]])

    async def do_error_in_stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        error = {"error": {"message": "overloaded", "type": "server_error"}}
        return await self.send(request, [f"data: {json.dumps(one)}\n\n".encode() for one in (CHUNKS[0], error)])

    async def do_garbage(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body.get("stream"):
            return await self.send(request, [b"data: {not json\n\n"])
        return web.Response(body=b"<html>", content_type="text/html")

    async def do_flood(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """More than any answer can be, without an end of line."""
        return await self.send(request, [b"data: " + b"x" * 2**20 for _ in range(100)])

    async def do_drip(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """A stream that goes on for ever."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(f"data: {json.dumps(CHUNKS[1])}\n\n".encode())
                await asyncio.sleep(0.02)
        except (ConnectionError, asyncio.CancelledError):
            self.hung_up.set()
            raise

    async def do_hang(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.json_response(ANSWER)

    async def do_drop(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """No answer at all, the first two times."""
        if len(self.seen) > 2:
            return web.json_response(ANSWER)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def do_status(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """The statuses in `body["statuses"]`, one for each request, then a good answer."""
        statuses = body["statuses"][len(self.seen) - 1 :]
        if not statuses:
            return web.json_response(ANSWER)
        error = body.get("error", {"message": "no", "param": "temperature", "code": "bad_value"})
        headers = {"Retry-After": body["retry_after"]} if "retry_after" in body else {}
        return web.json_response({"error": error}, status=statuses[0], headers=headers)

    async def send(self, request: web.Request, pieces: list[bytes]) -> web.StreamResponse:
        """An event stream, each piece in a write of its own."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        await response.write_eof()
        return response

    async def models(self, request: web.Request) -> web.Response:
        """The list of models, for those with the right key."""
        good = request.headers.get("Authorization") == "Bearer sk-secret"
        return web.json_response({"data": []}, status=200 if good else 401)


@asynccontextmanager
async def run_upstream() -> AsyncIterator[Upstream]:
    """The service on a free port of the loopback interface."""
    upstream = Upstream()
    app = web.Application()
    app.router.add_post("/v1/{endpoint:.*}", upstream.handle)
    app.router.add_get("/v1/models", upstream.models)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    upstream.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield upstream
    finally:
        await runner.cleanup()
