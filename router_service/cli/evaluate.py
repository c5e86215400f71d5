"""`router-service evaluate`: fit routers on a table's train split and measure them on its test split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from router_service.cli.console import errors, out, write_json
from router_service.cli.progress import steps

if TYPE_CHECKING:
    from training.evaluation import Report


def evaluate(
    observations: Annotated[
        Path, typer.Option(exists=True, file_okay=False, resolve_path=True, help="Folder of the observation table.")
    ],
    router: Annotated[list[str], typer.Option(help="Which router, for example knn. Give it again for more.")],
    policy: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Choose by this policy; else by the best estimated quality."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fit each router so many times, with the seeds 0, 1, ...")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list with one object per router.")] = False,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the quality and cost frontiers into this PNG.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write everything as one self-contained HTML file.")
    ] = None,
) -> None:
    """Measure routers against random, the best single expert, the task's label and the oracle.

    Every figure comes with a 95% bootstrap interval over the test queries.

    Examples:

      router-service evaluate --observations data/open9 --router knn --router linear

      router-service evaluate --observations data/open9 --router cluster --seeds 3 --json --plot open9.png
    """
    from routers.policy import load_policy
    from training.evaluation import BEST_QUALITY, evaluate
    from training.observations import load_table
    from training.report import to_json, write_html, write_plot

    with steps() as on_step:
        on_step("read: observations", 0, 1)
        table = load_table(observations)
        on_step("read: observations", 1, 1)
        chosen = load_policy(policy) if policy else BEST_QUALITY
        found = evaluate(table, router, seeds=range(seeds), policy=chosen, on_step=on_step)
    if plot:
        write_plot(found, plot, title=observations.name)
    if report:
        write_html(found, report, title=observations.name)
    if as_json:
        write_json(to_json(found))
    else:
        _print(found, observations.name)
    for written in filter(None, (plot, report)):
        errors.print(f"Written: {written}", markup=False, highlight=False)


def _print(report: Report, name: str) -> None:
    from training.metrics import REWARD_SETTINGS
    from training.report import COLUMNS, reward_rows, table_rows

    about = f"best single expert (on train): {report.best_single}; {report.queries} test queries; 95% intervals"
    out.print(_table(f"{name}: {about}", COLUMNS, table_rows(report)))
    out.print(
        _table(
            "Rewards at GraphRouter's settings",
            ("router", *REWARD_SETTINGS),
            reward_rows([*report.evaluations, *report.references]),
        )
    )


def _table(title: str, head: tuple[str, ...], rows: list[list[str]]) -> Table:
    """Columns in which no row has a figure are left out."""
    used = [column for column in range(len(head)) if any(row[column] != "-" for row in rows)]
    table = Table(*(head[column] for column in used), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(row[column].replace(" (", "\n(") for column in used))
    return table
