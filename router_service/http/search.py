"""`POST /v1/search`: queries are embedded by the expert that is named, or each by its own, and looked up."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

from router_service.core.exchange import Ask, Exchange
from router_service.core.service import DEFAULT_POLICY, Service
from router_service.errors import BadRequestError, NotFoundError
from router_service.http.answers import carry_out
from router_service.http.connection import REQUEST_ID, Connection
from router_service.http.validation import take_options

_FIELDS = {"model", "query", "top_k", "user"}
_DEFAULT_COUNT = 10
_MOST = 1000
_MOST_HITS = 10_000


async def search(service: Service, connection: Connection) -> None:
    """Answer with the documents nearest to each query."""
    key = service.admission.authenticate(connection.header(b"authorization"))
    if service.index is None:
        raise NotFoundError("this service has no index: set ROUTER_INDEX to a folder of `router-service index`")
    body = await connection.read_object(service.settings.max_body_bytes)
    with service.gate:
        options = take_options(body, connection)
        queries, count = _read(body)
        embedding = {"model": body.get("model", DEFAULT_POLICY), "input": queries}
        if "user" in body:
            embedding["user"] = body["user"]
        answer_id = f"srch-{uuid.uuid4().hex}"
        ask = Ask(
            id=answer_id,
            request_id=connection.text_header(REQUEST_ID) or answer_id,
            key=key,
            endpoint="embeddings",
            body=embedding,
            session=options.session,
        )
        exchange = Exchange(service, ask)
        exchange.trace.endpoint = "search"
        await carry_out(service, connection, exchange, options, finish=partial(service.index.answer, count=count))


def _read(body: dict[str, Any]) -> tuple[list[str], int]:
    if unknown := sorted(set(body) - _FIELDS):
        raise BadRequestError(
            f"a search has no field {unknown[0][:64]!r}: {', '.join(sorted(_FIELDS))}", param=unknown[0][:64]
        )
    query, count = body.get("query"), body.get("top_k", _DEFAULT_COUNT)
    queries = [query] if isinstance(query, str) else query
    if not isinstance(queries, list) or not queries or not all(isinstance(one, str) and one.strip() for one in queries):
        raise BadRequestError("'query' must be a text or an array of texts, none of them empty", param="query")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST:
        raise BadRequestError(f"'top_k' must be a whole number from 1 to {_MOST}", param="top_k")
    if len(queries) * count > _MOST_HITS:
        message = f"{len(queries)} queries x top_k {count} are more than {_MOST_HITS} documents: ask for fewer at once"
        raise BadRequestError(message, param="top_k")
    return queries, count
