"""`router-service policies`: those there are, whether a policy file is right, and the cheapest one for a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router_service.cli.client import Url, checked, connect
from router_service.cli.console import errors, out, write_json

if TYPE_CHECKING:
    from training.tune_policy import Tuned

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
        float | None, typer.Option(min=0, max=1, help="Keep the best single expert's quality less this.  [.01]")
    ] = None,
    quality: Annotated[float | None, typer.Option(min=0, max=1, help="Or keep this quality.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Policy and figures as JSON.")] = False,
) -> None:
    """Find the cheapest strategy and thresholds that keep a quality target, on what your experts were observed to do.

    The target is the policy's own `target`, unless one is given here. `single` and `cascade` are tried with the
    policy's router, fitted on parts of the table's train split and asked about the others; what was chosen is measured
    on the test split.

    Examples:

      router-service policies tune my-policies/auto.yaml --observations data/mine --out my-policies/thrifty.yaml

      router-service policies tune deploy/policies/auto.yaml --observations experts/pocket --within 0
    """
    from router_service.cli.progress import steps
    from routers.policy import Target, load_policy
    from training.observations import load_table
    from training.tune_policy import tune_policy

    started = load_policy(policy)
    given = Target(within=within, quality=quality) if (within, quality) != (None, None) else None
    with steps() as on_step:
        target = given or started.target or Target(within=0.01)
        tuned = tune_policy(started, load_table(observations), target, on_step=on_step)
    if written:
        written.write_text(policy_text(tuned, written), "utf-8")
    if as_json:
        write_json(tuned_to_json(tuned))
    else:
        _show_tuned(tuned)
    if written:
        errors.print(f"Written: {written}", markup=False, highlight=False)


def policy_text(tuned: Tuned, path: Path) -> str:
    """The tuned policy as YAML for `path`, with a comment that says what it did on the test split."""
    import os

    import yaml

    policy = tuned.policy.model_copy(update={"name": path.stem})
    fields = policy.model_dump(mode="json", exclude_defaults=True)
    if artefact := policy.router.artefact:
        fields["router"]["artefact"] = os.path.relpath(artefact, path.resolve().parent)
    return f"# {_in_words(tuned)}\n{yaml.safe_dump(fields, sort_keys=False)}"


def tuned_to_json(tuned: Tuned) -> dict[str, Any]:
    """Policy and figures."""
    from dataclasses import asdict

    return {**asdict(tuned), "policy": tuned.policy.model_dump(mode="json", exclude_defaults=True)}


def _in_words(tuned: Tuned) -> str:
    kept = "kept" if tuned.kept else "NOT kept: this is the best there is"
    return (
        f"Target {tuned.train_target:.3f} {kept} on train ({tuned.train_quality:.3f}). On test: quality "
        f"{tuned.quality.value:.3f} against {tuned.best_quality.value:.3f} of {tuned.best_single}, at "
        f"{tuned.share_of_cost:.0%} of its cost."
    )


def _show_tuned(tuned: Tuned) -> None:
    import yaml
    from rich.table import Table

    strategy, objective = tuned.policy.strategy, tuned.policy.objective
    out.print(f"{strategy.name}, {tuned.tried} candidates tried. {_in_words(tuned)}", soft_wrap=True)
    out.print(f"objective: {{quality: {objective.quality:g}, cost: {objective.cost:g}}}")
    if strategy.options:
        out.print(yaml.safe_dump({"options": dict(strategy.options)}, sort_keys=False), highlight=False)
    table = Table("on test", "value", "95% interval")
    for name in ("quality", "best_quality", "difference", "cost_usd_per_1k", "best_cost_usd_per_1k"):
        found = getattr(tuned, name)
        table.add_row(name, f"{found.value:.4f}", f"{found.low:.4f} to {found.high:.4f}")
    table.add_row("calls", f"{tuned.calls:.2f}", "")
    out.print(table)


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
