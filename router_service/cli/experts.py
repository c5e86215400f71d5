"""`router-service experts`: the experts of a running service or of a fleet file, and whether a fleet file is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from router_service.cli.client import Url, checked, connect
from router_service.cli.console import out, write_json

app = typer.Typer(invoke_without_command=True)


@app.callback()
def experts(
    context: typer.Context,
    fleet: Annotated[Path | None, typer.Option(help="List this fleet file's, without any service.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The cards as JSON.")] = False,
    url: Url = None,
) -> None:
    """List the experts of a running service, or of a fleet file.

    Examples:

      router-service experts

      router-service experts --fleet deploy/fleets/pocket.yaml --json

      router-service experts check my-fleet.yaml
    """
    if context.invoked_subcommand is None:
        cards = _of_fleet(fleet) if fleet else _of_service(url)
        if as_json:
            write_json(cards)
        else:
            _show(cards)


@app.command()
def check(fleet: Annotated[Path, typer.Argument(help="A fleet file.")]) -> None:
    """Read a fleet file; say what it has, or what is wrong in it.

    Example: router-service experts check my-fleet.yaml
    """
    from experts.fleet import load_fleet

    loaded = load_fleet(fleet)
    deployed = ", ".join(group.name for group in loaded.groups) or "none"
    out.print(f"{fleet}: {len(loaded.experts)} experts; deployed on their own: {deployed}", soft_wrap=True)


def _of_fleet(path: Path) -> list[dict[str, Any]]:
    from experts.fleet import load_fleet

    return [card.model_dump(mode="json") for card in load_fleet(path).cards]


def _of_service(url: str | None) -> list[dict[str, Any]]:
    with connect(url) as client:
        models = checked(client.get("/v1/models"))["data"]
    return [model["expert"] for model in models if model.get("kind") == "expert"]


def _show(cards: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("expert", "kind", "USD/M in", "USD/M out", "context", "features", "description")
    for card in cards:
        prices = f"{card['input_price']:g}", f"{card['output_price']:g}"
        features = ", ".join(sorted(card["features"]))
        table.add_row(card["name"], card["kind"], *prices, str(card["context_length"]), features, card["description"])
    out.print(table)
