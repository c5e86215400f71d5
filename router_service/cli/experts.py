"""`router-service experts`: those of a running service or of a fleet file, and adapters that come and go meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from router_service.cli.client import Url, checked, connect
from router_service.cli.console import CommandError, out, write_json

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


@app.command()
def add(
    fleet: Annotated[Path, typer.Argument(help="A fleet file that has the adapter.", exists=True, dir_okay=False)],
    name: Annotated[str, typer.Argument(help="The adapter's name in it.")],
    replace: Annotated[bool, typer.Option("--replace", help="In place of one of its name that was added.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was added as JSON.")] = False,
    url: Url = None,
) -> None:
    """Add an adapter of a fleet file to the running service, on a base that it serves, without a restart.

    It stays over restarts until it is removed. Where the service has API keys, ROUTER_API_KEY must be one that its
    ROUTER_ADMINS names. A router that knows the adapter is promoted first, so that it is routed to as it should be.

    Examples:

      router-service promote retriever-2/router

      router-service experts add retriever-2/fleet.yaml search-npl
    """
    from experts.fleet import load_fleet

    entry = next((entry for entry in load_fleet(fleet).experts if entry.name == name), None)
    if entry is None or entry.adapter is None:
        raise CommandError(f"{fleet} has no adapter {name!r}", status=2)
    card = entry.card.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)
    with connect(url) as client:
        source = entry.adapter.model_dump(exclude_none=True)
        added = checked(client.post("/v1/adapters", json={**card, "name": name, **source, "replace": replace}))
    if as_json:
        write_json(added)
        return
    out.print(f"{name} answers, on {entry.adapter.base}", soft_wrap=True)


@app.command()
def remove(name: Annotated[str, typer.Argument(help="An adapter that was added.")], url: Url = None) -> None:
    """Take an adapter that was added out of the running service.

    Example: router-service experts remove search-npl
    """
    from urllib.parse import quote

    with connect(url) as client:
        checked(client.delete(f"/v1/adapters/{quote(name)}"))
    out.print(f"{name} is out of use", soft_wrap=True)


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
