"""`router-service serve`: Redis, experts, router and HTTP, started in this order and ended in the other."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router_service.cli.console import CommandError, out

if TYPE_CHECKING:
    from experts.fleet import Fleet
    from router_service.serve.hosts import Host
    from router_service.settings import Settings

_POLL_S = 0.25
_START_TIMEOUT_S = 900.0


def serve(
    fleet: Annotated[
        Path | None, typer.Option(envvar="ROUTER_FLEET", help="Fleet file (YAML); the pocket fleet by default.")
    ] = None,
    policies: Annotated[
        Path | None, typer.Option(envvar="ROUTER_POLICIES", help="Folder of policies (YAML); those shipped by default.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on: any but loopback needs ROUTER_API_KEYS.  [127.0.0.1]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.  [8000]")] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="A Redis to use; by default a private one is started in the data folder.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder for what must outlive the service.  [data]")] = None,
    no_ray: Annotated[
        bool, typer.Option("--no-ray", help="One process without Ray: starts in seconds, serves one model at a time.")
    ] = False,
) -> None:
    """Start the service and run it until Ctrl-C or SIGTERM.

    Every option is also an environment variable; docs/operations.md lists them all.

    Examples:

      router-service serve

      router-service serve --fleet my-fleet.yaml --port 9000

      ROUTER_API_KEYS=me:secret router-service serve --host 0.0.0.0
    """
    from experts.fleet import POCKET_FLEET, load_fleet
    from router_service.assembly import read_policies
    from router_service.serve.environment import port_is_free
    from router_service.settings import read_settings

    settings = read_settings(host=host, port=port, redis_url=redis_url, data_folder=data)
    fleet_file = fleet or POCKET_FLEET
    loaded = load_fleet(fleet_file)
    read_policies(policies, loaded)
    _check_keys(loaded)
    if not port_is_free(settings.host, settings.port):
        raise CommandError(f"port {settings.port} on {settings.host} is in use: choose another with --port", status=2)
    stop = _stop_on_signals()
    with _redis(settings) as settings, _hosted(settings, loaded, fleet_file, policies, no_ray=no_ray) as running:
        _listen_for_signals(stop)  # Ray has put its own handlers there
        if _wait_ready(running, settings, stop):
            _say_ready(settings, loaded)
            while not stop.wait(1.0):
                running.check()
        out.print("stopping: requests under way may end")
    out.print("stopped")


def _check_keys(fleet: Fleet) -> None:
    missing = sorted(
        {
            entry.remote.api_key_env
            for entry in fleet.experts
            if entry.remote and entry.remote.api_key_env and not os.environ.get(entry.remote.api_key_env)
        }
    )
    if missing:
        raise CommandError(f"the fleet needs the environment variable {missing[0]}, which is not set", status=2)


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    _listen_for_signals(stop)
    return stop


def _listen_for_signals(stop: threading.Event) -> None:
    """The first signal ends the service gracefully, a second one at once."""

    def handle(number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


@contextlib.contextmanager
def _redis(settings: Settings) -> Iterator[Settings]:
    """The settings with a Redis to use: the one that was named, or a private one for as long as this lasts."""
    if settings.redis_url is not None:
        out.print("Redis     the one that was named")
        yield settings
        return
    from pydantic import SecretStr

    from router_service.redis_server import RedisServer

    server = RedisServer(settings.data_folder)
    server.start()
    out.print(f"Redis     private, its data in {settings.data_folder}")
    try:
        yield settings.model_copy(update={"redis_url": SecretStr(server.url)})
    finally:
        server.stop()


@contextlib.contextmanager
def _hosted(
    settings: Settings, fleet: Fleet, fleet_file: Path, policies: Path | None, *, no_ray: bool
) -> Iterator[Host]:
    from router_service.serve.hosts import ServeHost, UvicornHost

    out.print(f"experts   {len(fleet.experts)} from {fleet_file}")
    running: Host
    if no_ray:
        running = UvicornHost(settings, fleet, policies)
    else:
        running = ServeHost(settings, fleet, fleet_file, policies)
        out.print(f"Ray       starting (logs in {running.logs})")
    try:
        running.start()
        yield running
    finally:
        running.stop()


def _wait_ready(running: Host, settings: Settings, stop: threading.Event) -> bool:
    """Whether the service became ready before it was told to stop; says what it waits for."""
    import httpx

    said = ""
    deadline = time.monotonic() + _START_TIMEOUT_S
    with httpx.Client(base_url=_url(settings), timeout=5.0, trust_env=False) as client:
        while not stop.wait(_POLL_S):
            running.check()
            waiting = _waiting_for(client)
            if waiting is None:
                return True
            if waiting != said:
                out.print(f"waiting   {waiting}")
                said = waiting
            if time.monotonic() > deadline:
                raise CommandError(f"not ready after {_START_TIMEOUT_S:.0f} s: {waiting}")
    return False


def _waiting_for(client: Any) -> str | None:
    """What `/readyz` misses, `None` when it is ready."""
    import httpx

    try:
        response = client.get("/readyz")
        return None if response.is_success else "; ".join(response.json()["reasons"])
    except (httpx.TransportError, ValueError, KeyError):
        return "experts are being loaded"


def _say_ready(settings: Settings, fleet: Fleet) -> None:
    url = _url(settings)
    key = "-H 'Authorization: Bearer KEY' " if settings.key_digests else ""
    path, body = "chat/completions", '{"model": "auto", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}'
    if all(card.kind == "embedding" for card in fleet.cards):
        path, body = "embeddings", '{"model": "auto", "input": "What is lift?"}'
    out.print(f"[bold green]ready[/bold green]     {url}", soft_wrap=True)
    command = f"curl {url}/v1/{path} {key}-H 'Content-Type: application/json' -d '{body}'"
    out.print(f"try       {command}", markup=False, highlight=False, soft_wrap=True)


def _url(settings: Settings) -> str:
    """Where this machine reaches the service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http://{host}:{settings.port}"
