"""What crosses a handle between ingress and replica: tuples of builtins, which cost microseconds to pickle.

An expert's error crosses as data, so that the ingress raises what the expert raised, not wrapped by Ray.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any, Literal, TypeAlias, cast

import orjson

from experts.errors import (
    ExpertConfigError,
    ExpertError,
    ExpertRequestError,
    ExpertTimeoutError,
    ExpertUnavailableError,
)
from experts.expert import Endpoint, ExpertRequest, Part, Usage, Work

Request: TypeAlias = tuple[str, str, bytes, float, str]
"""Id, endpoint, the body's JSON, timeout in seconds, tenant."""

Reply: TypeAlias = (
    tuple[Literal["accepted"]]
    | tuple[Literal["part"], bytes, tuple[int, int, int, bool] | None, tuple[Any, ...] | None]
    | tuple[Literal["error"], str, str, dict[str, Any]]
)
"""`accepted` comes first and says that a replica has the request; then parts, or an error in their place."""

ACCEPTED: Reply = ("accepted",)

_ERRORS: dict[str, type[ExpertError]] = {
    error.__name__: error
    for error in (ExpertConfigError, ExpertRequestError, ExpertUnavailableError, ExpertTimeoutError)
}
_FIELDS = ("status", "param", "code", "retry_after_s")


def pack_request(request: ExpertRequest) -> Request:
    """An expert's request for the wire."""
    return request.id, request.endpoint, orjson.dumps(request.body), request.timeout_s, request.tenant


def unpack_request(request: Request) -> ExpertRequest:
    """The request that `pack_request` packed."""
    id_, endpoint, body, timeout_s, tenant = request
    return ExpertRequest(
        id=id_, endpoint=cast("Endpoint", endpoint), body=orjson.loads(body), timeout_s=timeout_s, tenant=tenant
    )


def pack_part(part: Part) -> Reply:
    """A part for the wire."""
    usage = part.usage
    counts = (usage.input_tokens, usage.output_tokens, usage.cached_input_tokens, usage.estimated) if usage else None
    return "part", part.data, counts, astuple(part.work) if part.work else None


def pack_error(error: ExpertError) -> Reply:
    """An error for the wire; one of a class that is not known there counts as unavailable."""
    kind = type(error).__name__
    if kind not in _ERRORS:
        return "error", ExpertUnavailableError.__name__, f"{kind}: {error}", {}
    fields = {name: getattr(error, name) for name in _FIELDS if hasattr(error, name)}
    return "error", kind, str(error), fields


def unpack_reply(reply: Reply) -> Part:
    """The part of a reply. Raises the error, if it is one."""
    if reply[0] == "error":
        _, kind, message, fields = reply
        raise _ERRORS[kind](message, **fields)
    if reply[0] == "accepted":
        return Part(b"")
    _, data, counts, work = reply
    return Part(data, Usage(*counts) if counts else None, work=Work(*work) if work else None)
