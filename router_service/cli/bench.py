"""`router-service bench`: measurements of the service, each printed as one JSON document."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
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
def kernels(
    dims: Annotated[list[int], typer.Option("--dim", min=1, help="Widths of the layer.")] = [1024, 4096],  # noqa: B006
    ranks: Annotated[list[str], typer.Option("--rank", help='Ranks, or "mixed".')] = ["8", "16", "64", "mixed"],  # noqa: B006
    experts: Annotated[list[int], typer.Option(min=1, help="Numbers of adapters.")] = [8, 64, 256, 1024],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(min=0, help="Numbers of tokens.")] = [1, 8, 32, 256],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="Of measuring for each way and shape.")] = 0.2,
    memory_gib: Annotated[float, typer.Option(min=0, help="Leave out what would need more.")] = 4.0,
    out: Annotated[
        Path | None, typer.Option(help="JSON file that the records go to; shapes in it from before are kept.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG file of the figures in --out.")] = None,
) -> None:
    """The mixture kernel beside the ways that are usual: a loop, gather and bmm, PEFT's Arrow, one dense product.

    Every option that lists shapes can be given several times.

    Example: router-service bench kernels --dim 4096 --rank 16 --out kernels.json --plot kernels.png
    """
    from router_service.bench.kernels import Shapes, measure_kernels
    from router_service.cli.progress import steps

    shapes = Shapes(tuple(dims), tuple(ranks), tuple(experts), tuple(tokens), dtype, device, threads)
    with steps() as on_progress:
        results = measure_kernels(
            shapes, seconds=seconds, memory_gib=memory_gib, out=out, plot=plot, on_progress=on_progress
        )
    write_json(results if out is None else results["summary"])


@app.command()
def engine(
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="ways, shapes, adapters or load; give it again.  [all]")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Of load by a thousand adapters.")] = 30.0,
    registered: Annotated[int, typer.Option(min=20, help="Adapters that are registered.")] = 1000,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", min=1, max=64, help="Batch size.  [1, 4, 16, 64]")
    ] = None,
    prompts: Annotated[
        list[int] | None, typer.Option("--prompt", min=1, max=4000, help="Prompt length.  [64, 256, 1024, 2048]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each way.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file; parts that are not asked for are kept in it.")] = None,
) -> None:
    """The engine of local experts beside PEFT and static batching, by shape, and under load by many adapters.

    Example: router-service bench engine --part ways --part shapes
    """
    from router_service.bench.engine import PARTS, Limits, measure_engine
    from router_service.cli.progress import steps

    asked = parts or list(PARTS)
    if unknown := sorted(set(asked) - set(PARTS)):
        raise typer.BadParameter(f"no part {unknown[0]!r}: choose of {', '.join(PARTS)}", param_hint="--part")
    limits = Limits(minutes=minutes, rounds=rounds, registered=registered)
    limits = replace(limits, batches=batches or limits.batches, prompts=prompts or limits.prompts)
    with steps() as on_progress:
        write_json(measure_engine(asked, limits, out=out, on_progress=on_progress))


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
        list[str] | None,
        typer.Option("--model", help="A policy or an expert. Give it again for more.  [all policies, pocket-base]"),
    ] = None,
    against: Annotated[str, typer.Option(help="The expert or policy whose cost is 1.")] = ("pocket-generalist"),
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
    asked = list(models or [*(f"auto:{name}" for name in load_policies(folder)), "pocket-base"])
    asked += [] if against in asked else [against]
    options = ("--policies", str(folder), *(("--no-ray",) if no_ray else ()))
    with tempfile.TemporaryDirectory(prefix="bench-") as data, service(Path(data), options=options) as running:
        found = measure_strategies(
            running.url, asked, work, seed=seed, one=one, two=two, connections=connections, against=against,
            say=lambda text: errors.print(text, highlight=False),
        )  # fmt: skip
    write_json(found)
