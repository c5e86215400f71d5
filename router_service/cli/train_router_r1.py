"""`router-service train router_r1`: train the policy model of the strategy `router_r1` by GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from router_service.cli.console import out, write_json
from router_service.cli.job import Address, Submit, Wait, WorkingDir, run_as_job, train_command
from router_service.cli.progress import steps

if TYPE_CHECKING:
    from training.router_r1.spec import RouterR1Spec


def train_router_r1(
    config: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, resolve_path=True, help="Policy, questions, fleet, steps: YAML."),
    ],
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", resolve_path=True, help="Folder that the policy goes to; never overwritten."),
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Folder, or hub name, of the policy to begin with.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Decides all that is random.")] = None,
    cost_weight: Annotated[
        float | None, typer.Option(min=0, max=1, help="What of a right answer's reward is for cheapness.")
    ] = None,
    submit: Submit = False,
    address: Address = None,
    wait: Wait = True,
    working_dir: WorkingDir = None,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run; else it is thrown away.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train the policy model of the strategy router_r1 by reinforcement (GRPO, through TRL).

    --policy, --out, --seed and --cost-weight may stand in the file as well. A run that was killed goes on where it was
    when the same command is given again. docs/router_r1.md lists the file's fields; OUT/curves is for TensorBoard.

    Examples:

      router-service train router_r1 --config deploy/router_r1/pocket.yaml --out policies/r1

      router-service train router_r1 --config /shared/qwen2.5-3b.yaml --out /shared/r1 --submit
    """
    from training.router_r1.spec import read_spec

    start = str(Path(policy).resolve()) if policy and Path(policy).is_dir() else policy
    spec = read_spec(config, policy=start, out=out_folder, seed=seed, cost_weight=cost_weight)
    report = _as_job(spec, config, resume, address, working_dir, wait) if submit else _here(spec, resume)
    if report is None:
        return
    if as_json:
        write_json(report)
    else:
        _show(report, spec.out)


def _here(spec: RouterR1Spec, resume: bool) -> dict[str, Any]:
    from training.router_r1.train import train_policy

    with steps() as on_progress:
        return train_policy(spec, resume=resume, on_progress=on_progress)


def _as_job(
    spec: RouterR1Spec, config: Path, resume: bool, address: str | None, working_dir: Path | None, wait: bool
) -> dict[str, Any] | None:
    """The report that the job left in the shared folder; None where nobody waits for it."""
    from training.work_folder import read_report

    command = [*train_command("router_r1"), "--config", str(config), "--policy", spec.policy, "--out", str(spec.out)]
    command += ["--seed", str(spec.seed), "--cost-weight", str(spec.cost_weight)]
    command = command if resume else [*command, "--no-resume"]
    run_as_job(command, out_folder=spec.out, address=address, working_dir=working_dir, wait=wait)
    return read_report(spec.out) if wait else None


def _show(report: dict[str, Any], folder: Path) -> None:
    table = Table("step", "reward", "right", "calls", "cost", "broken format")
    lines = report["curves"]
    for line in lines[:: max(1, len(lines) // 10)]:
        cells = (f"{line[name]:.3f}" for name in ("reward", "right", "calls", "cost"))
        table.add_row(str(line["step"]), *cells, f"{line['broken']:.1%}")
    out.print(table)
    out.print(f"policy: {folder}", soft_wrap=True)
