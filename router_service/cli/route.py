"""`router-service route`: what a policy would decide, or what a gate would be told, without asking any expert."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from router_service.cli.client import Url, checked, connect
from router_service.cli.console import out, write_json


def route(
    text: Annotated[str, typer.Argument(help="The question.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A policy: auto, auto:cheap ...; or a gate: BASE+gate:NAME.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The decision as JSON.")] = False,
    url: Url = None,
) -> None:
    """Show how the experts are ranked for a question, or the adapters of a gate, with the numbers, and why.

    Examples:

      router-service route "Convert 3 km to miles."

      router-service route --json -m auto:cheap "Is 17 prime?"

      router-service route -m pocket-base+gate:skills "Write 14 as a Roman numeral."
    """
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    with connect(url) as client:
        decision = checked(client.post("/v1/route", json=body))
    if as_json:
        write_json(decision)
    elif decision["object"] == "router.guidance":
        _show_guidance(decision)
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


def _show_guidance(guidance: dict[str, Any]) -> None:
    from rich.table import Table

    sure = "sure of the task" if guidance["sure"] else "not sure of the task"
    caption = f"by the {guidance['source']}: {guidance['instruction'] or guidance['why']}"
    table = Table("adapter", "score", "added to the gate", title=f"{guidance['expert']}, {sure}", caption=caption)
    for adapter, score in sorted(guidance["scores"].items(), key=lambda item: -item[1]):
        bias = guidance["gate_bias"][adapter]
        table.add_row(adapter, f"{score:.3f}", "left out" if bias is None else f"{bias:.2f}")
    out.print(table)
