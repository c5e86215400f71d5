"""`router-service train categories` and `train table`: the two halves of a trained `composition`, each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from router_service.cli.console import CommandError, out
from router_service.cli.progress import steps

if TYPE_CHECKING:
    from routers.composition import CompositionRouter

Artefact = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, resolve_path=True, help="A trained composition.")
]
Table = Annotated[
    Path, typer.Option(exists=True, file_okay=False, resolve_path=True, help="Folder of the observation table.")
]
Out = Annotated[Path, typer.Option("--out", resolve_path=True, help="Folder for the new artefact.")]


def categories(artefact: Artefact, observations: Table, out_folder: Out) -> None:
    """Learn a composition's categories anew from a table's queries and task labels; its table stays as it is.

    Example: router-service train categories artefacts/composition-1 --observations data/mine --out composition-2
    """
    from training.observations import load_table

    router = _loaded(artefact, out_folder)
    with steps() as on_step:
        on_step("categories", 0, 1)
        train = load_table(observations).train
        router.retrain_categories(train.texts, train.tasks)
        on_step("categories", 1, 1)
    _written(router, artefact, observations, out_folder)


def table(
    artefact: Artefact,
    observations: Table,
    out_folder: Out,
    mean_cost_usd: Annotated[float | None, typer.Option(help="Budget: USD a query, on the mean.")] = None,
) -> None:
    """Choose a composition's table anew, within a budget if one is given; its categories stay as they are.

    Example: router-service train table composition-1 --observations data/mine --mean-cost-usd 0.0002 --out thrifty
    """
    from routers.composition import TableBudget
    from training.observations import load_table

    router = _loaded(artefact, out_folder)
    with steps() as on_step:
        on_step("table", 0, 1)
        budget = TableBudget(mean_cost_usd=mean_cost_usd) if mean_cost_usd is not None else None
        router.retrain_table(load_table(observations).train, budget)
        on_step("table", 1, 1)
    _written(router, artefact, observations, out_folder)


def _loaded(artefact: Path, out_folder: Path) -> CompositionRouter:
    from routers.composition import CompositionRouter

    if out_folder.exists():
        raise CommandError(f"{out_folder} is there already: an artefact is never overwritten", status=2)
    return CompositionRouter.load(artefact)


def _written(router: CompositionRouter, artefact: Path, observations: Path, folder: Path) -> None:
    """The artefact, and its manifest without the figures of the one before, so that it can be promoted."""
    from training.manifest import MANIFEST, Manifest

    router.save(folder)
    if (artefact / MANIFEST).exists():
        before = Manifest.read(artefact)
        before.model_copy(update={"observations": str(observations), "metrics": {}, "trials": []}).write(folder)
    out.print((folder / "table.yaml").read_text("utf-8"), markup=False, highlight=False, soft_wrap=True)
