"""What the commands that talk to a running service share: where it is, the key, and errors on one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router_service.cli.console import CommandError

if TYPE_CHECKING:
    import httpx

_TIMEOUT_S = 300.0
_CONNECT_TIMEOUT_S = 3.0

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="ROUTER_URL", help="The service's address.  [http://127.0.0.1:$PORT]"),
]


def client_options(url: str | None) -> dict[str, Any]:
    """What a client of httpx needs to reach the service at `url` with the key from `ROUTER_API_KEY`."""
    key = os.environ.get("ROUTER_API_KEY")
    return {
        "base_url": (url or f"http://127.0.0.1:{os.environ.get('PORT', '8000')}").rstrip("/"),
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "trust_env": False,
    }


@contextmanager
def connect(url: str | None) -> Iterator[httpx.Client]:
    """A client of the service at `url`, with the key from `ROUTER_API_KEY`; what goes wrong is a `CommandError`."""
    import httpx

    options = client_options(url)
    base = options["base_url"]
    timeout = httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    try:
        with httpx.Client(**options, timeout=timeout) as client:
            yield client
    except httpx.ConnectError as error:
        raise CommandError(f"nothing answers at {base}: is the service running? (router-service serve)") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise CommandError(f"{base}: {type(error).__name__}: {error}") from error


def checked(response: httpx.Response) -> Any:
    """The JSON of an answer. Raises `CommandError` with the service's own message if it is an error."""
    try:
        value = response.json()
    except ValueError as error:
        raise CommandError(f"{response.url} answered {response.status_code}, and not with JSON") from error
    if response.is_success:
        return value
    message = value.get("error", {}).get("message", "no reason given") if isinstance(value, dict) else str(value)
    raise CommandError(f"{response.status_code}: {message}", status=2 if response.status_code in (400, 404) else 1)
