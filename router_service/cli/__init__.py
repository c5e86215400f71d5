"""The command line: `router-service serve | query | route | experts | policies | ...`.

A command's module imports at its top only the standard library, typer, rich and `router_service.cli.console`; what is
heavy (httpx, pydantic, ray, torch) is imported inside the function that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from experts.errors import ExpertConfigError, ExpertError
from router_service.cli import bench, collect, evaluate, experts, index, policies, promote, query, route, serve, train
from router_service.cli.console import CommandError, errors
from router_service.errors import ServiceError, SettingsError
from routers.errors import RouterConfigError, RoutingError
from training.errors import TrainingError


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("router-service"))
        raise typer.Exit


app = typer.Typer(
    name="router-service",
    help="Answers each query with the language-model expert that serves it best for the money.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None: ...


# In the order in which the help lists them.
app.command()(serve.serve)
app.command()(query.query)
app.command()(route.route)
app.add_typer(experts.app, name="experts")
app.add_typer(policies.app, name="policies")
app.add_typer(bench.app, name="bench")
app.add_typer(train.app, name="train")
app.add_typer(index.app, name="index")
app.command()(promote.promote)
app.command()(evaluate.evaluate)
app.command()(collect.collect)
app.command()(collect.export)


def main() -> None:
    """Run the command line; an error of ours is one line on stderr, status 2 for configuration and 1 for the rest."""
    try:
        app()
    except CommandError as error:
        _fail(error, error.status)
    except (ExpertConfigError, RouterConfigError, SettingsError) as error:
        _fail(error, 2)
    except (ExpertError, RoutingError, ServiceError, TrainingError) as error:
        _fail(error, 1)


def _fail(error: Exception, status: int) -> None:
    errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
    sys.exit(status)
