"""Training commands as Ray jobs: the options that each of them has, and the way of a command to the cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from router_service.cli.console import CommandError, errors

Submit = Annotated[bool, typer.Option("--submit", help="Train as a Ray job. --out must be on a shared disk.")]
Address = Annotated[str | None, typer.Option(help="The Ray job server; else RAY_ADDRESS, else http://127.0.0.1:8265.")]
Wait = Annotated[bool, typer.Option(help="With --submit: follow the job to its end.")]
WorkingDir = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="With --submit: upload this folder and run the job in it."),
]


def train_command(trainer: str) -> list[str]:
    """The beginning of `router-service train TRAINER` as a command for the cluster, whose Python is this one."""
    return [sys.executable, "-m", "router_service", "train", trainer]


def run_as_job(
    command: Sequence[str], *, out_folder: Path, address: str | None, working_dir: Path | None, wait: bool
) -> None:
    """Hand `command`, which makes `out_folder`, to the cluster; with `wait`, follow its log to its end.

    Raises `SubmitError`, and `CommandError` where the job succeeded but its folder is not on a disk of this machine.
    """
    import asyncio

    from training.jobs import follow, job_server, submit

    server = job_server(address)
    job_id = submit(server, command, working_dir)
    errors.print(f"job {job_id}: `ray job logs -f`, `ray job stop` and the like know it by this name", soft_wrap=True)
    if not wait:
        return
    asyncio.run(follow(server, job_id, _pass_on))
    if not out_folder.exists():
        raise CommandError(f"job {job_id} succeeded, but {out_folder} is not here: --out must be on a shared disk")


def _pass_on(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
