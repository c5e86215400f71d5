"""The routes that experts answer: chat completions, completions, embeddings; plain or as a stream of events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson

from experts.expert import Endpoint
from router_service.core.exchange import Ask, Exchange
from router_service.core.failures import FAILURES, to_request_error
from router_service.core.service import Service
from router_service.core.trace import Trace
from router_service.http.connection import REQUEST_ID, ClientGoneError, Connection, encode_headers
from router_service.http.validation import Options, check_body, take_options

_ID_PREFIX: Mapping[Endpoint, str] = {"chat/completions": "chatcmpl-", "completions": "cmpl-", "embeddings": "embd-"}
Finish = Callable[[bytes], Awaitable[bytes]]
_CLIENT_GONE = 499
_GRACE_S = 0.5
"""How much longer than its time an answer may take, so that an expert can say itself that it is late."""


async def answer(service: Service, connection: Connection, endpoint: Endpoint) -> None:
    """Answer one question."""
    key = service.admission.authenticate(connection.header(b"authorization"))
    body = await connection.read_object(service.settings.max_body_bytes)  # who sends slowly takes nobody's place
    with service.gate:
        options = take_options(body, connection)
        check_body(body)
        answer_id = _ID_PREFIX[endpoint] + uuid.uuid4().hex
        ask = Ask(
            id=answer_id,
            request_id=connection.text_header(REQUEST_ID) or answer_id,
            key=key,
            endpoint=endpoint,
            body=body,
            session=options.session,
        )
        exchange = Exchange(service, ask)
        await carry_out(service, connection, exchange, options)


async def carry_out(
    service: Service, connection: Connection, exchange: Exchange, options: Options, *, finish: Finish | None = None
) -> None:
    """Run the exchange; whatever happens, it is finished, with the status that the client got or would have got.

    `finish` makes the answer of what the experts said.
    """
    status, failure = 500, "the service failed"
    try:
        async with connection.cancelling_when_gone(), asyncio.timeout(exchange.timeout_s + _GRACE_S):
            await exchange.start()
            if exchange.trace.stream:
                await _stream(connection, exchange, options)
            else:
                await _whole(connection, exchange, options, finish)
    except FAILURES as error:
        told = to_request_error(error)
        status, failure = told.http_status, str(told)
        await exchange.finish(status, failure)
        await connection.fail(told, answer_headers(exchange))
    except (ClientGoneError, asyncio.CancelledError):
        status, failure = _CLIENT_GONE, "the client hung up"
        raise
    finally:
        await exchange.finish(status, failure)


async def _whole(connection: Connection, exchange: Exchange, options: Options, finish: Finish | None) -> None:
    data = await exchange.piece() or b"{}"
    while (more := await exchange.piece()) is not None:  # a strategy's last part is the answer
        data = more
    if finish:
        data = await finish(data)
    await exchange.finish(200)
    if options.trace:
        data = orjson.dumps({**orjson.loads(data), "router": exchange.trace.to_json()})
    await connection.send_json(data, headers=answer_headers(exchange))


async def _stream(connection: Connection, exchange: Exchange, options: Options) -> None:
    piece = await exchange.piece()  # before the headers go out, so that a failure still has its own status
    await connection.start_events(answer_headers(exchange))
    while piece is not None:
        await connection.send_event(piece)
        piece = await exchange.piece()
    await exchange.finish(200)
    if options.trace:
        await connection.send_event(_trace_chunk(exchange.trace))
    await connection.send_event(b"[DONE]")
    await connection.end_events()


def answer_headers(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    """What is known of the answer now, as headers."""
    trace = exchange.trace
    headers = {"x-request-id": trace.request_id, "x-router-id": trace.id, **exchange.reservation.headers}
    if trace.expert:
        headers["x-router-expert"] = ", ".join(dict.fromkeys(trace.routed)) or trace.expert
        headers["x-router-attempts"] = str(sum(call.outcome != "not_sent" for call in trace.calls))
    if trace.cache != "off":
        headers["x-router-cache"] = trace.cache
    if trace.policy:
        headers["x-router-policy"] = trace.policy
    if decision := trace.decision:
        headers["x-router-router"] = decision.router
        headers["x-router-strategy"] = decision.strategy
    headers["x-router-reason"] = decision.reason if decision else "the caller named the expert"
    if trace.status:  # the answer is complete
        headers["x-router-cost-usd"] = f"{trace.cost_usd:.9f}"
        headers["x-router-latency-s"] = f"{trace.latency_s:.6f}"
    return encode_headers(headers)


def _trace_chunk(trace: Trace) -> bytes:
    """A last chunk without choices, as OpenAI sends one for usage, with the trace in it."""
    kind = "chat.completion.chunk" if trace.endpoint == "chat/completions" else "text_completion"
    chunk: dict[str, Any] = {
        "id": trace.id,
        "object": kind,
        "created": int(time.time()),
        "model": trace.expert or trace.model,
        "choices": [],
        "router": trace.to_json(),
    }
    return orjson.dumps(chunk)
