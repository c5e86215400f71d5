"""One HTTP request and its answer, over ASGI."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import orjson

from router_service.errors import BadRequestError, BodyTooLargeError, RequestError, SlowBodyError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

REQUEST_ID = b"x-request-id"
"""The header by which clients and proxies follow a request; what a request has there is echoed."""

_JSON = (b"content-type", b"application/json")
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_BODY_TIMEOUT_S = 30.0
_UNSAFE = re.compile(r"[^\x20-\x7e]")
_MAX_HEADER = 400


class ClientGoneError(Exception):
    """The client hung up, so nobody waits for the answer."""


class Connection:
    """Reads the request, writes the answer. `status` is what was sent, 0 before."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.status = 0
        self.gone = False
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._receive = receive
        self._send = send
        self._streams = False

    def header(self, name: bytes) -> bytes | None:
        """A request header by its lower-case name."""
        return self._headers.get(name)

    def text_header(self, name: bytes) -> str | None:
        """A request header as text."""
        value = self._headers.get(name)
        return value.decode("latin-1") if value is not None else None

    async def read_object(self, limit: int) -> dict[str, Any]:
        """The body, a JSON object.

        Raises `BodyTooLargeError`, `BadRequestError`, `SlowBodyError`, `ClientGoneError`.
        """
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                body = await self._read(limit)
        except TimeoutError as error:
            message = f"the body did not come within {_BODY_TIMEOUT_S:.0f} s"
            raise SlowBodyError(message, headers={"connection": "close"}) from error
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BadRequestError(f"the body is not JSON: {error}", code="invalid_json") from error
        if not isinstance(value, dict):
            raise BadRequestError("the body is not a JSON object", code="invalid_json")
        return value

    async def send_json(self, value: Any, *, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Answer with JSON; `value` may be encoded already."""
        body = value if isinstance(value, bytes) else orjson.dumps(value)
        await self.send_body(body, status=status, headers=(_JSON, *headers))

    async def send_body(self, body: bytes, *, status: int = 200, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Answer with `body`."""
        await self._start(status, (*headers, (b"content-length", b"%d" % len(body))))
        await self._send({"type": "http.response.body", "body": body})

    async def start_events(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin a stream of server-sent events."""
        self._streams = True
        await self._start(200, (*_EVENTS, *headers))

    async def send_event(self, data: bytes) -> None:
        """Send one event."""
        await self._send({"type": "http.response.body", "body": b"data: %b\n\n" % data, "more_body": True})

    async def end_events(self) -> None:
        """End the stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: RequestError, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Answer with an error; within a stream, that is its last event."""
        if self._streams:
            await self.send_event(orjson.dumps(error.body()))
            await self.end_events()
        elif not self.status:
            await self.send_json(
                error.body(), status=error.http_status, headers=(*headers, *encode_headers(error.headers))
            )

    @asynccontextmanager
    async def cancelling_when_gone(self) -> AsyncIterator[None]:
        """Cancel what runs inside as soon as the client hangs up, and raise `ClientGoneError` instead."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request is handled in a task")
        watch = asyncio.create_task(self._watch(task))
        try:
            yield
        except asyncio.CancelledError:
            if not self.gone:
                raise
            task.uncancel()
            raise ClientGoneError from None
        finally:
            watch.cancel()

    async def _watch(self, task: asyncio.Task[Any]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        task.cancel()

    async def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def _read(self, limit: int) -> bytes:
        """The body. One that is too large is read on, up to as much again, since many clients listen only then."""
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= 2 * limit:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            more = message.get("more_body", False)
        if size > limit:
            headers = {"connection": "close"} if more else {}
            raise BodyTooLargeError(f"the body is larger than {limit} bytes", headers=headers)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def encode_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers for the wire: printable ASCII on one line, whatever the values hold."""
    return [(name.encode(), _safe(value).encode()) for name, value in headers.items()]


def _safe(value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        value = _UNSAFE.sub("?", value)
    return value[:_MAX_HEADER]
