"""`router-service train`: train a router, or what else has a trainer of its own, here or as a Ray job.

The first argument is a router's name, or that of a command of this group: a trainer that is no router's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from router_service.cli import composition
from router_service.cli.client import Url
from router_service.cli.console import CommandError, errors, out, write_json
from router_service.cli.job import Address, Submit, Wait, WorkingDir, run_as_job, train_command
from router_service.cli.progress import steps
from router_service.cli.promote import put_in_service
from router_service.cli.train_mole import train_mole
from router_service.cli.train_retriever import train_retriever
from router_service.cli.train_router_r1 import train_router_r1

if TYPE_CHECKING:
    from training.manifest import Manifest
    from training.train_router import TrainSpec

_ROUTER = "router"


class _TrainGroup(TyperGroup):
    """Commands by name; any other first argument is the name of a router."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # click's types, which Typer keeps a copy of
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return "", self.commands[_ROUTER], args


app = typer.Typer(
    cls=_TrainGroup,
    no_args_is_help=True,
    help="""Train a router by its name on a table of observations, or one of the models below.

    Examples:

      router-service train knn --observations data/open9 --out artefacts/knn-1

      router-service train ROUTER --help
    """,
)


app.command("retriever")(train_retriever)
app.command("categories")(composition.categories)
app.command("table")(composition.table)
app.command("mole")(train_mole)
app.command("router_r1")(train_router_r1)


@app.command(_ROUTER, hidden=True)
def train(
    router: Annotated[str, typer.Argument(help="Which router, for example knn or matrix_factorization.")],
    observations: Annotated[
        Path, typer.Option(exists=True, file_okay=False, resolve_path=True, help="Folder of the observation table.")
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", resolve_path=True, help="Folder that the artefact goes to; never overwritten.")
    ],
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The router's options, as YAML or JSON.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides all that is random.")] = 0,
    trials: Annotated[
        int, typer.Option(min=0, help="Search the router's options by so many trials, on a validation part of train.")
    ] = 0,
    submit: Submit = False,
    address: Address = None,
    wait: Wait = True,
    working_dir: WorkingDir = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Make the running service use the artefact, without a restart.")
    ] = False,
    url: Url = None,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run; else it is thrown away.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Train a router on a table of observations.

    A run that was killed goes on where it was when the same command is given again, and ends with the same artefact.

    Examples:

      router-service train knn --observations data/open9 --out artefacts/knn-1

      router-service train linear --observations data/open9 --out artefacts/linear-1 --trials 20 --promote

      router-service train knn --observations /shared/open9 --out /shared/knn-2 --submit --address http://head:8265
    """
    from training.train_router import TrainSpec

    if promote and submit and not wait:
        raise CommandError("--promote needs the job's end: leave --no-wait out", status=2)
    spec = TrainSpec(
        router=router,
        observations=observations,
        out=out_folder,
        config=_read_options(config) if config else {},
        seed=seed,
        trials=trials,
    )
    manifest = _as_job(spec, config, resume, address, working_dir, wait) if submit else _here(spec, resume)
    if manifest is None:
        return
    if as_json:
        write_json(manifest.model_dump(mode="json"))
    else:
        _show(manifest, spec.out)
    if promote:
        put_in_service(url, router, spec.out)
        errors.print(f"in service: {spec.out}", soft_wrap=True)


def _here(spec: TrainSpec, resume: bool) -> Manifest:
    from training.train_router import train as run

    with steps() as on_progress:
        return run(spec, resume=resume, on_progress=on_progress)


def _as_job(
    spec: TrainSpec, config: Path | None, resume: bool, address: str | None, working_dir: Path | None, wait: bool
) -> Manifest | None:
    """The manifest that the job left in the shared folder; None where nobody waits for it."""
    from training.manifest import Manifest

    run_as_job(_command(spec, config, resume), out_folder=spec.out, address=address, working_dir=working_dir, wait=wait)
    return Manifest.read(spec.out) if wait else None


def _command(spec: TrainSpec, config: Path | None, resume: bool) -> list[str]:
    """The same run, as a command for the cluster."""
    command = train_command(spec.router)
    command += ["--observations", str(spec.observations), "--out", str(spec.out)]
    command += ["--seed", str(spec.seed), "--trials", str(spec.trials)]
    if config:
        command += ["--config", str(config.resolve())]
    return command if resume else [*command, "--no-resume"]


def _read_options(path: Path) -> dict[str, Any]:
    import yaml

    try:
        options = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"cannot read {path}: {error}", status=2) from error
    if not isinstance(options, dict):
        raise CommandError(
            f"{path} must hold the router's options as a mapping, not {type(options).__name__}", status=2
        )
    return options


def _show(manifest: Manifest, folder: Path) -> None:
    if manifest.trials:
        out.print(_trials_table(manifest))
    measured = manifest.metrics
    out.print(
        f"{manifest.router}: fitted on {manifest.rows['train']} queries x {len(manifest.experts)} experts; "
        f"on {manifest.rows['validation']} held out of them AIQ {measured['aiq']:.3f}, "
        f"quality {measured['quality']:.3f} (best single expert {measured['best_single_quality']:.3f})"
    )
    out.print(f"artefact: {folder}", soft_wrap=True)


def _trials_table(manifest: Manifest) -> Table:
    names = sorted({name for trial in manifest.trials for name in trial.config})
    table = Table("AIQ", *names, "seconds", title=f"{len(manifest.trials)} trials")
    for trial in manifest.trials:
        table.add_row(f"{trial.aiq:.4f}", *(_cell(trial.config[name]) for name in names), f"{trial.seconds:.1f}")
    return table


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
