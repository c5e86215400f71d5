"""`router-service train mole`: train a gate, or a gate with its adapters, into a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from router_service.cli.console import errors, out, write_json
from router_service.cli.job import Address, Submit, Wait, WorkingDir, run_as_job, train_command
from router_service.cli.progress import steps

if TYPE_CHECKING:
    from training.mixing.spec import MixtureSpec


def train_mole(
    config: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, resolve_path=True, help="Base, data, adapters, steps: YAML or JSON."),
    ],
    gate: Annotated[
        str | None,
        typer.Option(
            help="The method: mole, mixlora, mola, dynmole, llava_mole, dynamic, phatgoose, glider, smora, flylora."
        ),
    ] = None,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", resolve_path=True, help="Folder that the mixture goes to; never overwritten."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Decides all that is random.")] = None,
    submit: Submit = False,
    address: Address = None,
    wait: Wait = True,
    working_dir: WorkingDir = None,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run; else it is thrown away.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a gate that mixes LoRA adapters per token, over given adapters or together with new ones.

    --gate, --out and --seed may stand in the file as well. A run that was killed goes on where it was when the same
    command is given again. docs/mixing.md lists the file's fields and the gates.

    Examples:

      router-service train mole --gate mixlora --config mixture.yaml --out mixtures/skills

      router-service train mole --gate phatgoose --config /shared/specialists.yaml --out /shared/goose --submit
    """
    from training.mixing.spec import read_spec

    spec = read_spec(config, gate=gate, out=out_folder, seed=seed)
    report = _as_job(spec, config, resume, address, working_dir, wait) if submit else _here(spec, resume)
    if report is None:
        return
    if as_json:
        write_json(report)
    else:
        _show(report, spec.out)


def _here(spec: MixtureSpec, resume: bool) -> dict[str, Any]:
    from training.mixing.train import train_mixture

    with steps() as on_progress:
        return train_mixture(spec, resume=resume, on_progress=on_progress)


def _as_job(
    spec: MixtureSpec, config: Path, resume: bool, address: str | None, working_dir: Path | None, wait: bool
) -> dict[str, Any] | None:
    """The report that the job left in the shared folder; None where nobody waits for it."""
    from training.work_folder import read_report

    command = [*train_command("mole"), "--config", str(config), "--gate", spec.gate]
    command += ["--out", str(spec.out.resolve()), "--seed", str(spec.seed)]
    command = command if resume else [*command, "--no-resume"]
    run_as_job(command, out_folder=spec.out, address=address, working_dir=working_dir, wait=wait)
    return read_report(spec.out) if wait else None


def _show(report: dict[str, Any], folder: Path) -> None:
    if report["gates"]:
        table = Table("gate of", "load", "token entropy", "load entropy")
        for name, line in report["gates"].items():
            table.add_row(name, _shares(line["load"]), f"{line['token_entropy']:.2f}", f"{line['load_entropy']:.2f}")
        out.print(table)
    last = report["loss"][-1] if report["loss"] else {"loss": float("nan")}
    errors.print(f"{report['learned_parameters']:,} parameters learned; last loss {last['loss']:.4f}")
    out.print(f"mixture: {folder}", soft_wrap=True)


def _shares(load: list[float]) -> str:
    """Shares of tokens in percent; of many only the extremes."""
    if len(load) > 12:
        return f"{100 * min(load):.0f} to {100 * max(load):.0f}% each of {len(load)}"
    return " ".join(f"{100 * share:.0f}%" for share in load)
