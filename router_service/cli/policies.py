"""`router-service policies`: those there are, whether a policy file is right, and the cheapest one for a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router_service.cli.client import Url, checked, connect
from router_service.cli.console import CommandError, errors, out, write_json

if TYPE_CHECKING:
    from training.tune_policy import Tuned

app = typer.Typer(invoke_without_command=True)

_WITHIN = 0.01


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

      router-service policies tune my-policies/auto.yaml --observations data/mine --out my-policies/thrifty.yaml
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


@app.command()
def tune(
    policy: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The policy file to start from.")],
    observations: Annotated[
        Path, typer.Option(exists=True, file_okay=False, resolve_path=True, help="Folder of the observation table.")
    ],
    written: Annotated[
        Path | None,
        typer.Option("--out", dir_okay=False, help="Write the tuned policy here; its file's name is its name."),
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Keep the best single expert's quality less this; below 0, exceed it.  [.01]"),
    ] = None,
    against: Annotated[str | None, typer.Option(help="The expert that --within is about, instead of the best.")] = None,
    quality: Annotated[float | None, typer.Option(min=0, max=1, help="Or keep this quality.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Try this strategy alone: single or cascade.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Policy and figures as JSON.")] = False,
) -> None:
    """Find the cheapest strategy and thresholds that keep a quality target, on what your experts were observed to do.

    The target is the policy's own `target`, unless one is given here; it is kept if it is so in 95 of 100 resamples of
    the queries. `single` and `cascade` are tried, within the policy's ceilings, with its router fitted on parts of the
    table's train split and asked about the others; what was chosen is measured on the test split. Of the other
    strategies it says what a table lacks to try them.

    Examples:

      router-service policies tune my-policies/auto.yaml --observations data/mine --out my-policies/thrifty.yaml

      router-service policies tune deploy/policies/auto.yaml --observations experts/pocket --within 0

      router-service policies tune deploy/policies/cascade.yaml --observations experts/pocket --strategy cascade
      --against pocket-generalist --within -.02
    """
    from pydantic import TypeAdapter, ValidationError

    from router_service.cli.progress import steps
    from routers.policy import Name, Target, load_policy
    from training.observations import load_table
    from training.tune_policy import NOT_PLAYED, STRATEGIES, policy_text, to_json, tune_policy

    if strategy and strategy not in STRATEGIES:
        why = f"; {NOT_PLAYED[strategy]}" if strategy in NOT_PLAYED else ""
        raise CommandError(f"--strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}{why}", status=2)
    if against and quality is not None:
        raise CommandError("--against is whose quality --within is about: it does not go with --quality", status=2)
    if against and within is None:
        within = _WITHIN

    if within is not None and quality is not None:
        raise CommandError("--within and --quality are two targets: give one of them", status=2)
    if quality == 0:
        raise CommandError("--quality must be above 0, which any answer keeps", status=2)
    try:
        TypeAdapter(Name).validate_python(written.stem if written else "p")
    except ValidationError as error:
        message = f"--out names the policy by its file: {error.errors()[0]['msg']}, as in my-policies/thrifty.yaml"
        raise CommandError(message, status=2) from error

    started = load_policy(policy)
    given = Target(within=within, quality=quality, expert=against) if (within, quality) != (None, None) else None
    with steps() as on_step:
        target = given or started.target or Target(within=_WITHIN)
        tuned = tune_policy(
            started,
            load_table(observations),
            target,
            strategies=(strategy,) if strategy else STRATEGIES,
            on_step=on_step,
        )
    if written:
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(policy_text(tuned, written), "utf-8")
    if as_json:
        write_json(to_json(tuned))
    else:
        _show_tuned(tuned)
    if written:
        errors.print(f"Written: {written}", markup=False, highlight=False)


def _show_tuned(tuned: Tuned) -> None:
    import yaml
    from rich.table import Table

    strategy, objective = tuned.policy.strategy, tuned.policy.objective
    out.print(f"{strategy.name}, {tuned.tried} candidates tried. {tuned}", soft_wrap=True)
    out.print(f"objective: {{quality: {objective.quality:g}, cost: {objective.cost:g}}}")
    if strategy.options:
        out.print(yaml.safe_dump({"options": dict(strategy.options)}, sort_keys=False), highlight=False)
    table = Table("on test", "value", "95% interval")
    for name in ("quality", "against_quality", "difference", "cost_usd_per_1k", "against_cost_usd_per_1k"):
        found = getattr(tuned, name)
        table.add_row(name, f"{found.value:.4f}", f"{found.low:.4f} to {found.high:.4f}")
    table.add_row("calls", f"{tuned.calls:.2f}", "")
    if error := tuned.acceptance_error:
        table.add_row("calibration error of the score", f"{error.value:.4f}", f"{error.low:.4f} to {error.high:.4f}")
    out.print(table)
    for name, why in tuned.not_tried.items():
        out.print(f"Not tried: {name}, for {why}.", soft_wrap=True)


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
