"""`router-service route`: what a policy would decide, without asking any expert."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from router_service.cli.client import Url, checked, connect
from router_service.cli.console import out, write_json


def route(
    text: Annotated[str, typer.Argument(help="The question.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A policy: auto, auto:cheap ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The decision as JSON.")] = False,
    url: Url = None,
) -> None:
    """Show how the experts are ranked for a question, with the numbers, and why.

    Examples:

      router-service route "Convert 3 km to miles."

      router-service route --json -m auto:cheap "Is 17 prime?"
    """
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    with connect(url) as client:
        decision = checked(client.post("/v1/route", json=body))
    if as_json:
        write_json(decision)
    else:
        _show(decision)


def _show(decision: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"policy {decision['policy']}, router {decision['router']}, strategy {decision['strategy']}"
    table = Table("", "expert", "score", "quality", "USD", "seconds", title=title, caption=decision["reason"])
    for place, candidate in enumerate(decision["ranking"], start=1):
        quality = f"{candidate['quality']:.3f}"
        if candidate["uncertainty"] is not None:
            quality += f" ±{candidate['uncertainty']:.3f}"
        numbers = f"{candidate['score']:.4f}", quality, f"{candidate['cost_usd']:.8f}", f"{candidate['latency_s']:.3f}"
        table.add_row(str(place), candidate["expert"], *numbers)
    for expert, why in decision["removed"].items():
        table.add_row("-", f"[dim]{expert}[/dim]", f"[dim]{why}[/dim]")
    out.print(table)
