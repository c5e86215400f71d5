"""`router-service train glider`: gates of adapters that were trained before, and the router that steers them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from router_service.cli.console import errors, out, write_json
from router_service.cli.job import Address, Submit, Wait, WorkingDir, run_as_job, train_command
from router_service.cli.progress import steps

if TYPE_CHECKING:
    from training.glider.spec import GliderSpec
    from training.glider.train import GliderManifest


def train_glider(
    base: Annotated[str, typer.Option(help="Folder, or hub name, of the adapters' base model.")],
    adapters: Annotated[
        Path, typer.Option(exists=True, file_okay=False, resolve_path=True, help="A PEFT adapter in each folder of it.")
    ],
    tasks: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, resolve_path=True, help="YAML: each adapter's data, instruction."),
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", resolve_path=True, help="Folder that the mixture goes to; never overwritten.")
    ],
    gate: Annotated[Literal["phatgoose", "glider", "arrow"], typer.Option(help="The local half.")] = "glider",
    start: Annotated[
        Path | None,
        typer.Option("--from", exists=True, file_okay=False, resolve_path=True, help="Take known experts from there."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides all that is random.")] = 0,
    submit: Submit = False,
    address: Address = None,
    wait: Wait = True,
    working_dir: WorkingDir = None,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run; else it is thrown away.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Make a mixture of adapters that picks among them per token and layer, steered by the query's task.

    Each adapter's gate is trained alone, 200 steps (100 for phatgoose, none for arrow), everything else frozen; in a
    Ray job all at the same time. With --from, experts may be added or left out without training the others again. OUT
    holds the mixture and its router; docs/glider.md describes the tasks file.

    Examples:

      router-service train glider --base models/base --adapters models/adapters --tasks tasks.yaml --out mixtures/glider

      router-service train glider --base /shared/base --adapters /shared/adapters --tasks /shared/tasks.yaml
      --out /shared/glider-2 --from /shared/glider-1 --submit
    """
    from training.glider.spec import GliderSpec, read_tasks_file
    from training.glider.train import GliderManifest

    folder = Path(base).expanduser()
    spec = GliderSpec(
        base=str(folder.resolve()) if folder.is_dir() else base,
        adapters=adapters,
        gate=gate,
        file=read_tasks_file(tasks),
        out=out_folder,
        start=start,
        seed=seed,
    )
    if not submit:
        _say(_here(spec, resume), spec.out, as_json)
        return
    command = _command(spec, tasks, resume)
    run_as_job(command, out_folder=spec.out, address=address, working_dir=working_dir, wait=wait)
    if wait:
        _say(GliderManifest.read(spec.out), spec.out, as_json)


def _here(spec: GliderSpec, resume: bool) -> GliderManifest:
    from training.glider.train import train_glider as run

    with steps() as on_progress:
        return run(spec, resume=resume, on_progress=on_progress)


def _command(spec: GliderSpec, tasks: Path, resume: bool) -> list[str]:
    """The same run, as a command for the cluster."""
    command = [*train_command("glider"), "--base", spec.base, "--adapters", str(spec.adapters), "--tasks", str(tasks)]
    command += ["--out", str(spec.out), "--gate", spec.gate, "--seed", str(spec.seed)]
    command += ["--from", str(spec.start)] if spec.start else []
    return command if resume else [*command, "--no-resume"]


def _say(manifest: GliderManifest, folder: Path, as_json: bool) -> None:
    if as_json:
        write_json(manifest.model_dump(mode="json"))
        return
    table = Table("expert", "right on its examples", "loss of its gate", "instruction")
    for name, expert in manifest.experts.items():
        loss = "" if expert.loss is None else f"{expert.loss:.3f}"
        table.add_row(name, f"{expert.right:.0%} of {expert.examples}", loss, expert.instruction)
    out.print(table)
    errors.print(f"mixture: {folder}, its router: {folder / 'router'}", soft_wrap=True)
