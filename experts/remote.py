"""An expert behind any OpenAI-compatible API.

The body goes out as it came but for `model` (and, in streams, a wish for usage); the answer comes back as it came but
for `id`. Only bytes are moved: an answer is parsed once, to check it and to read its usage, and not written again.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import httpx
import orjson

from experts.errors import (
    ExpertConfigError,
    ExpertError,
    ExpertRequestError,
    ExpertTimeoutError,
    ExpertUnavailableError,
)
from experts.expert import Endpoint, ExpertRequest, Part, Usage
from experts.fleet import FleetEntry, RemoteSource
from experts.shared import Shared
from experts.sse import EventParser, EventTooLongError

_MAX_REPLY_BYTES = 64 * 2**20
_MAX_EVENT_BYTES = 8 * 2**20
_MAX_MESSAGE_CHARS = 2000
_HEALTH_TIMEOUT_S = 5.0
_DRAIN_TIMEOUT_S = 0.05
_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 8.0
_CHARS_PER_TOKEN = 4
_DONE = b"[DONE]"
_NO_WORDS = frozenset({"role", "id", "type", "index", "finish_reason", "logprobs"})

_OUR_FAULT = {
    401: "refuses the key",
    402: "wants to be paid",
    403: "refuses access with this key",
    404: "does not know the address or the model that the fleet file names",
    405: "does not take requests at the address that the fleet file names",
}


class RemoteExpert:
    """Calls one model of one API through `transport`, which may be shared by many.

    A call that did not reach the upstream, or was answered with 408, 429 or 5xx, is tried again up to `max_retries`
    times after a random wait that doubles, or as long as `Retry-After` asks, if the time left allows it. Nothing is
    tried again once an answer has begun. Without a reported usage four characters are taken for a token, and the usage
    is marked as estimated.
    Raises `ExpertConfigError` if the environment variable with the key is not set.
    """

    def __init__(self, entry: FleetEntry, transport: Shared[httpx.AsyncBaseTransport]) -> None:
        if entry.remote is None:
            raise ExpertConfigError(f"expert {entry.name!r} has no remote source")
        self._name = entry.name
        self._source = entry.remote
        self._transport = transport.hold()
        self._key = _read_key(entry.name, entry.remote)
        self._headers = httpx.Headers(_headers(entry.remote, self._key))
        base = str(entry.remote.base_url).rstrip("/")
        self._urls = {path: httpx.URL(f"{base}/{path}") for path in ("chat/completions", "completions", "embeddings")}
        self._health_url = httpx.URL(f"{base}{path}") if (path := entry.remote.health_path) else None
        self._timeouts = {"connect": entry.remote.connect_timeout_s, "read": None}

    async def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        """Forward a generation and hand its answer back as it comes."""
        self._check_task("generation", request)
        deadline = self._deadline(request)
        response = await self._send(request, deadline)
        try:
            if request.stream:
                async for part in self._stream(request, response, deadline):
                    yield part
            else:
                yield await self._whole(request, response, deadline)
        finally:
            await response.aclose()

    async def embed(self, request: ExpertRequest) -> Part:
        """Forward an embeddings request."""
        self._check_task("embedding", request)
        deadline = self._deadline(request)
        response = await self._send(request, deadline)
        try:
            return await self._whole(request, response, deadline)
        finally:
            await response.aclose()

    async def healthy(self) -> bool:
        """Whether `health_path` answers to our key; any other answer than a refusal or a 5xx is well enough.

        An API without a `health_path` counts as well: its failures show when it is called.
        """
        if self._health_url is None:
            return True
        request = httpx.Request("GET", self._health_url, headers=self._headers, extensions={"timeout": self._timeouts})
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                response = await self._transport.resource.handle_async_request(request)
                await response.aclose()
        except (httpx.HTTPError, TimeoutError):
            return False
        return response.status_code < 500 and response.status_code not in (401, 403)

    async def close(self) -> None:
        """Let go of the transport; the last to do so closes it."""
        await self._transport.release()

    def _check_task(self, task: str, request: ExpertRequest) -> None:
        if self._source.task != task:
            message = f"expert {self._name!r} serves {self._source.task}, not {request.endpoint}"
            raise ExpertRequestError(message, param="model", code="unsupported_endpoint")

    def _deadline(self, request: ExpertRequest) -> float:
        return asyncio.get_running_loop().time() + min(request.timeout_s, self._source.timeout_s)

    async def _send(self, request: ExpertRequest, deadline: float) -> httpx.Response:
        """The response to `request`, with a good status; its body is not yet read."""
        content = self._outgoing(request)
        for attempt in range(self._source.max_retries + 1):
            try:
                return await self._attempt(request.endpoint, content, deadline)
            except ExpertUnavailableError as error:
                wait = _backoff(attempt, error.retry_after_s)
                time_left = deadline - asyncio.get_running_loop().time()
                retryable = isinstance(error, _RetryableError)
                if not retryable or attempt == self._source.max_retries or wait >= time_left:
                    raise ExpertUnavailableError(str(error), retry_after_s=error.retry_after_s) from error
                await asyncio.sleep(wait)
        raise ExpertUnavailableError(f"expert {self._name!r} was not called")  # max_retries is never negative

    async def _attempt(self, endpoint: Endpoint, content: bytes, deadline: float) -> httpx.Response:
        outgoing = httpx.Request(
            "POST",
            self._urls[endpoint],
            headers=self._headers,
            stream=httpx.ByteStream(content),  # not `content`: the transport adds length and host more cheaply
            extensions={"timeout": self._timeouts},
        )
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._transport.resource.handle_async_request(outgoing)
        except TimeoutError as error:
            raise self._too_late() from error
        except httpx.HTTPError as error:
            raise _RetryableError(f"expert {self._name!r} cannot be reached ({type(error).__name__})") from error
        if response.status_code == 200:
            return response
        raise await self._refusal(response, deadline)

    def _outgoing(self, request: ExpertRequest) -> bytes:
        body = {**request.body, "model": self._source.model}
        if request.stream and self._source.stream_usage:
            body["stream_options"] = {**_stream_options(body), "include_usage": True}
        return orjson.dumps(body)

    async def _whole(self, request: ExpertRequest, response: httpx.Response, deadline: float) -> Part:
        data = b"".join([chunk async for chunk in self._chunks(response, deadline)])
        reply = self._parse(data)
        usage = _usage(reply) or _estimate(request.body, _reply_chars(reply))
        if request.endpoint != "embeddings":
            data = _with_id(data, reply.get("id"), request.id)
        return Part(data, usage)

    async def _stream(self, request: ExpertRequest, response: httpx.Response, deadline: float) -> AsyncIterator[Part]:
        """The chunks of a streamed answer; those that exist for a usage nobody asked for are held back."""
        show_usage = bool(_stream_options(request.body).get("include_usage"))
        usage, chars, finished = None, 0, False
        async for data in self._events(response, deadline):
            reply = self._parse(data)
            usage = _usage(reply) or usage
            chars += _reply_chars(reply)
            finished = finished or any(choice.get("finish_reason") for choice in _choices(reply))
            if reply.get("choices") or show_usage or not reply.get("usage"):
                yield Part(_with_id(data, reply.get("id"), request.id))
        if not finished:
            raise ExpertUnavailableError(f"expert {self._name!r} ended its stream in the middle of the answer")
        yield Part(b"", usage or _estimate(request.body, chars))

    async def _events(self, response: httpx.Response, deadline: float) -> AsyncIterator[bytes]:
        """The data of each event up to `[DONE]`, or to the end for upstreams that do not send it."""
        parser = EventParser(_MAX_EVENT_BYTES)
        chunks = self._chunks(response, deadline)
        try:
            async for chunk in chunks:
                for data in parser.feed(chunk):
                    if data == _DONE:
                        await _drain(chunks)
                        return
                    yield data
            for data in parser.end():
                if data != _DONE:
                    yield data
        except EventTooLongError as error:
            raise ExpertUnavailableError(f"the stream of expert {self._name!r} is broken: {error}") from error

    async def _chunks(self, response: httpx.Response, deadline: float) -> AsyncIterator[bytes]:
        """The body as it comes, within the deadline and the limit of what an answer can be."""
        body, size = response.aiter_bytes(), 0
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(body, b"")
            except TimeoutError as error:
                raise self._too_late() from error
            except httpx.HTTPError as error:
                cause = type(error).__name__
                raise ExpertUnavailableError(f"the answer of expert {self._name!r} broke off ({cause})") from error
            if not chunk:
                return
            size += len(chunk)
            if size > _MAX_REPLY_BYTES:
                raise ExpertUnavailableError(f"the answer of expert {self._name!r} exceeds {_MAX_REPLY_BYTES} bytes")
            yield chunk

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            reply = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise ExpertUnavailableError(f"the answer of expert {self._name!r} is not JSON") from error
        if not isinstance(reply, dict):
            raise ExpertUnavailableError(f"the answer of expert {self._name!r} is no JSON object")
        if reply.get("error"):
            raise self._error_of(500, reply, None)
        return reply

    async def _refusal(self, response: httpx.Response, deadline: float) -> ExpertError:
        """The error that a response with a bad status stands for."""
        try:
            body = orjson.loads(b"".join([chunk async for chunk in self._chunks(response, deadline)]))
        except (orjson.JSONDecodeError, ExpertUnavailableError):
            body = None
        finally:
            await response.aclose()
        return self._error_of(response.status_code, body, _retry_after(response.headers))

    def _error_of(self, status: int, body: Any, retry_after_s: float | None) -> ExpertError:
        """The error for an upstream's status and error body. What our own configuration caused is not the client's."""
        message, param, code = _error_fields(body)
        message = self._without_key(message or f"HTTP status {status}")
        if status in _OUR_FAULT:
            return ExpertUnavailableError(f"the API of expert {self._name!r} {_OUR_FAULT[status]} (HTTP {status})")
        if status in (408, 429) or status >= 500:
            return _RetryableError(f"expert {self._name!r} failed: {message}", retry_after_s=retry_after_s)
        if status < 400:
            return ExpertUnavailableError(f"expert {self._name!r} answered with HTTP status {status}, not 200")
        return ExpertRequestError(message, status=status, param=param, code=code)

    def _without_key(self, text: str) -> str:
        text = text[:_MAX_MESSAGE_CHARS]
        return text.replace(self._key, "***") if self._key else text

    def _too_late(self) -> ExpertTimeoutError:
        return ExpertTimeoutError(f"expert {self._name!r} did not answer in time")


class _RetryableError(ExpertUnavailableError):
    """Worth another try."""


def _read_key(name: str, source: RemoteSource) -> str | None:
    if source.api_key_env is None:
        return None
    key = os.environ.get(source.api_key_env, "").strip()
    if not key:
        raise ExpertConfigError(f"expert {name!r}: set the environment variable {source.api_key_env} to its API key")
    if not key.isascii() or not key.isprintable():
        raise ExpertConfigError(f"expert {name!r}: the key in {source.api_key_env} has characters no header can carry")
    return key


def _headers(source: RemoteSource, key: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "router-service"}
    if key:
        bearer = source.api_key_header.lower() == "authorization"
        headers[source.api_key_header] = f"Bearer {key}" if bearer else key
    return headers | source.headers


def _backoff(attempt: int, retry_after_s: float | None) -> float:
    """Seconds to wait before the next try: what was asked for, or a random share of a doubling bound."""
    if retry_after_s is not None:
        return retry_after_s + random.uniform(0, _FIRST_BACKOFF_S)
    return random.uniform(0.5, 1.0) * min(_FIRST_BACKOFF_S * (1 << attempt), _MAX_BACKOFF_S)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds of a `Retry-After` header; its other form, a date, is not used by any such API."""
    value = headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"\d{1,6}(\.\d+)?", value) else None


def _stream_options(body: Mapping[str, Any]) -> Mapping[str, Any]:
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise ExpertRequestError("stream_options must be an object", param="stream_options", code="invalid_type")
    return options


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Read what follows the last event, usually nothing, so that the connection can be used again."""
    with suppress(TimeoutError, ExpertError):
        async with asyncio.timeout(_DRAIN_TIMEOUT_S):
            async for _ in chunks:
                pass


def _with_id(data: bytes, old: object, new: str) -> bytes:
    """`data`, a JSON object, with the value of its `id` exchanged (or added) in place."""
    if isinstance(old, str) and (quoted := orjson.dumps(old)) in data:
        return data.replace(quoted, orjson.dumps(new), 1)
    return orjson.dumps({**orjson.loads(data), "id": new})


def _choices(reply: Mapping[str, Any]) -> list[dict[str, Any]]:
    choices = reply.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _usage(reply: Mapping[str, Any]) -> Usage | None:
    """What the reply says of its usage; None where it does not say what was read, or of an answer what was written."""
    usage = reply.get("usage")
    if not isinstance(usage, dict) or not isinstance(usage.get("prompt_tokens"), int):
        return None
    if "choices" in reply and not isinstance(usage.get("completion_tokens"), int):
        return None
    details = usage.get("prompt_tokens_details")
    input_tokens = _count(usage.get("prompt_tokens"))
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    return Usage(input_tokens, _count(usage.get("completion_tokens")), min(cached, input_tokens))


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _estimate(body: Mapping[str, Any], reply_chars: int) -> Usage:
    """Usage at four characters a token, where the upstream reports none."""
    asked = body.get("messages") or body.get("prompt") or body.get("input") or ""
    read, written = (-(-chars // _CHARS_PER_TOKEN) for chars in (_text_chars(asked), reply_chars))
    return Usage(read, written, estimated=True)


def _text_chars(value: object) -> int:
    """Characters of all text in a prompt or in messages."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(_text_chars, value))
    if isinstance(value, dict):
        return _text_chars(value.get("content")) + _text_chars(value.get("text"))
    return 0


def _reply_chars(reply: Mapping[str, Any]) -> int:
    """Characters of all that the reply says, calls of tools and reasoning too."""
    return sum(map(_said_chars, _choices(reply)))


def _said_chars(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(_said_chars, value))
    if isinstance(value, dict):
        return sum(_said_chars(part) for name, part in value.items() if name not in _NO_WORDS)
    return 0


def _error_fields(body: object) -> tuple[str, str | None, str | None]:
    """Message, param and code of the usual shapes of error bodies; the message is empty where there is none."""
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, dict):
        return "", None, None
    error = body.get("error", body)
    if isinstance(error, str):
        return error, None, None
    if not isinstance(error, dict):
        return "", None, None
    message = next((error[key] for key in ("message", "detail") if isinstance(error.get(key), str)), "")
    return message, _text(error.get("param")), _text(error.get("code"))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
