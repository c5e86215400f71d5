"""Checks of what the service itself reads in a body. Everything else is the expert's to judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from router_service.errors import BadRequestError
from router_service.http.connection import Connection

_MAX_SESSION = 256


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller asks of the service rather than of the expert."""

    trace: bool = False
    session: str | None = None


def take_options(body: dict[str, Any], connection: Connection) -> Options:
    """Take the field `router` out of `body`; the headers `x-router-trace` and `x-session-id` say the same."""
    given = body.pop("router", None)
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise BadRequestError("'router' must be an object", param="router")
    if unknown := sorted(set(given) - {"trace", "session"}):
        raise BadRequestError(f"'router' has no field {unknown[0][:64]!r}: trace and session", param="router")
    trace = given.get("trace", connection.header(b"x-router-trace") in (b"1", b"true"))
    session = given.get("session", connection.text_header(b"x-session-id"))
    if not isinstance(trace, bool):
        raise BadRequestError("'router.trace' must be true or false", param="router.trace")
    if session is not None and not (isinstance(session, str) and 0 < len(session) <= _MAX_SESSION):
        raise BadRequestError(f"a session is named by 1 to {_MAX_SESSION} characters", param="router.session")
    return Options(trace=trace, session=session)


def check_body(body: dict[str, Any]) -> None:
    """Raise `BadRequestError` if a parameter that is the same everywhere is malformed."""
    if "model" not in body:
        raise BadRequestError(
            "'model' is missing: name an expert, or 'auto'", param="model", code="missing_required_parameter"
        )
    for name, (holds, right) in _FIELDS.items():
        value = body.get(name)
        if value is not None and not holds(value):
            raise BadRequestError(f"{name!r} must be {right}, not {_short(value)}", param=name, code="invalid_value")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts)


_FIELDS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "max_tokens": (_is_count, "a whole number from 1"),
    "max_completion_tokens": (_is_count, "a whole number from 1"),
    "n": (_is_count, "a whole number from 1"),
    "temperature": (_is_number(0, 2), "a number from 0 to 2"),
    "top_p": (_is_number(0, 1), "a number from 0 to 1"),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "tools": (lambda value: isinstance(value, list) and all(map(_is_object, value)), "a list of objects"),
    "response_format": (_is_object, "an object"),
    "stream_options": (_is_object, "an object"),
    "gate_load": (lambda value: isinstance(value, bool), "true or false"),
    "stop": (_is_stop, "a non-empty string, or a list of them"),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."
