"""`router-service policies`: the policies of a running service or of a folder, and whether a policy file is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from router_service.cli.client import Url, checked, connect
from router_service.cli.console import out, write_json

app = typer.Typer(invoke_without_command=True)


@app.callback()
def policies(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Option(help="List this folder's, without any service.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The policies as JSON.")] = False,
    url: Url = None,
) -> None:
    """List the policies of a running service, or of a folder.

    Examples:

      router-service policies

      router-service policies --folder deploy/policies --json

      router-service policies check my-policies/frugal.yaml
    """
    if context.invoked_subcommand is None:
        found = _of_folder(folder) if folder else _of_service(url)
        if as_json:
            write_json(found)
        else:
            _show(found)


@app.command()
def check(
    policy: Annotated[Path, typer.Argument(help="A policy file.")],
    fleet: Annotated[Path | None, typer.Option(help="The fleet whose experts it may name.  [the pocket fleet]")] = None,
) -> None:
    """Read a policy file and check it against a fleet; say what it does, or what is wrong in it.

    Example: router-service policies check my-policies/frugal.yaml --fleet my-fleet.yaml
    """
    from experts.fleet import POCKET_FLEET, load_fleet
    from router_service.assembly import check_policy
    from routers.policy import load_policy

    loaded = load_policy(policy)
    check_policy(loaded, load_fleet(fleet or POCKET_FLEET))
    out.print(
        f"{policy}: policy {loaded.name}, router {loaded.router.name}, strategy {loaded.strategy.name}", soft_wrap=True
    )


def _of_folder(folder: Path) -> list[dict[str, Any]]:
    from routers.policy import load_policies

    return [policy.model_dump(mode="json") for policy in load_policies(folder).values()]


def _of_service(url: str | None) -> list[dict[str, Any]]:
    with connect(url) as client:
        models = checked(client.get("/v1/models"))["data"]
    return [{"name": model["id"], **model["policy"]} for model in models if model.get("kind") == "policy"]


def _show(found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("policy", "description")
    for policy in found:
        table.add_row(policy["name"], policy["description"])
    out.print(table)
