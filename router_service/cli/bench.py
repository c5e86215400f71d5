"""`router-service bench`: measurements of the service, each printed as one JSON document."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from router_service.cli.console import write_json

app = typer.Typer(help="Measure the service; prints JSON.", no_args_is_help=True)

NoRay = Annotated[bool, typer.Option("--no-ray", help="Measure the service on uvicorn, in one process.")]


@app.command()
def proxy(
    requests: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 3000,
    connections: Annotated[int, typer.Option(min=1, help="How many at once.")] = 16,
    no_ray: NoRay = False,
) -> None:
    """CPU that a proxied request costs the ingress, beside the same request straight to the upstream.

    Example: router-service bench proxy --requests 3000
    """
    from router_service.bench.proxy import measure_proxy

    write_json(measure_proxy(requests=requests, connections=connections, ray=not no_ray))


@app.command("first-token")
def first_token(
    clients: Annotated[int, typer.Option(min=1, help="Streaming clients at once.")] = 4,
    requests: Annotated[int, typer.Option(min=2, help="Requests in all.")] = 80,
    no_ray: NoRay = False,
) -> None:
    """Time to the first word of a pocket expert with several streaming clients, and the memory of the whole service.

    Example: router-service bench first-token --clients 4
    """
    from router_service.bench.first_token import measure_first_token

    write_json(measure_first_token(clients=clients, requests=requests, ray=not no_ray))


@app.command()
def routing(
    url: Annotated[
        str | None, typer.Option(envvar="ROUTER_URL", help="A running service; by default one is started.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Fresh questions.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 1,
    kind: Annotated[str, typer.Option(help="Questions that need one skill, or two.")] = "one",
    connections: Annotated[int, typer.Option(min=1, help="How many at once.")] = 16,
    alone: Annotated[bool, typer.Option(help="Ask every expert by itself as well.")] = True,
) -> None:
    """Share of fresh pocket questions that `auto` gets right and what it costs, against every single expert.

    Example: router-service bench routing --n 500 --seed 7
    """
    from router_service.bench.routing import measure_routing
    from router_service.bench.service import service

    with contextlib.ExitStack() as stack:
        if not url:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            url = stack.enter_context(service(Path(folder))).url
        write_json(measure_routing(url.rstrip("/"), seed=seed, n=n, kind=kind, connections=connections, alone=alone))


@app.command()
def strategies(
    work: Annotated[Path, typer.Option(file_okay=False, help="Folder for answers; a run that was stopped goes on.")],
    policies: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Policies to measure.")] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A policy or an expert. Give it again for more.  [all policies]")
    ] = None,
    against: Annotated[str, typer.Option(help="The expert or policy that the others are compared with.")] = (
        "pocket-generalist"
    ),
    one: Annotated[int, typer.Option(min=1, help="One-skill questions.")] = 800,
    two: Annotated[int, typer.Option(min=0, help="Two-skill questions.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 1,
    connections: Annotated[int, typer.Option(min=1, help="How many at once.")] = 16,
    no_ray: NoRay = False,
) -> None:
    """Every policy's strategy on the same fresh pocket questions: share right, cost, latency and calls.

    Example: router-service bench strategies --work runs/strategies --no-ray
    """
    from router_service.assembly import SHIPPED_POLICIES
    from router_service.bench.service import service
    from router_service.bench.strategies import measure_strategies
    from router_service.cli.console import errors
    from routers.policy import load_policies

    folder = (policies or SHIPPED_POLICIES).resolve()
    asked = list(models or [f"auto:{name}" for name in load_policies(folder)])
    asked += [] if against in asked else [against]
    options = ("--policies", str(folder), *(("--no-ray",) if no_ray else ()))
    with tempfile.TemporaryDirectory(prefix="bench-") as data, service(Path(data), options=options) as running:
        found = measure_strategies(
            running.url, asked, work, seed=seed, one=one, two=two, connections=connections, against=against,
            say=lambda text: errors.print(text, highlight=False),
        )  # fmt: skip
    write_json(found)
