"""Where a training keeps what it has so far, and how its result gets to its place: whole or not at all.

A training works in `OUT.part`, which is locked and belongs to one run: the same data, options and versions. A run that
was killed goes on there. What is whole is synced and renamed to `OUT`, which is never overwritten: a service may be
reading it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import TrainJobError

_RUN = "run.json"
REPORT_FILE = "report.json"


@contextmanager
def work_folder(out: Path, key: str, resume: bool) -> Iterator[Path]:
    """`OUT.part`, locked, of the run `key` alone, and gone once its block is done. Raises `TrainJobError`.

    Without `resume` what an unfinished run left there is thrown away first.
    """
    work = out.with_name(out.name + ".part")
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainJobError(f"another run is training into {out}") from error
        if not resume:
            _empty(work)
        known = read_json(work / _RUN, {"run": key, "started_at": time.time()})
        if known["run"] != key:
            raise TrainJobError(
                f"{work} holds an unfinished run with other data, options or versions: "
                "throw it away with --no-resume, or choose another folder"
            )
        write_json(work / _RUN, known)
        yield work
        shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def started_at(work: Path) -> float:
    """When the run in `work` began, before any kill, in seconds since the epoch."""
    return float(read_json(work / _RUN, {})["started_at"])


def publish(whole: Path, out: Path) -> None:
    """Sync the folder `whole` and rename it to `out`: it is there as a whole or not at all."""
    for path in whole.rglob("*"):
        _sync(path)
    _sync(whole)
    whole.rename(out)
    _sync(out.parent)


def read_report(out: Path) -> dict[str, Any]:
    """The report of a finished run. Raises `TrainJobError`."""
    try:
        report: dict[str, Any] = json.loads((out / REPORT_FILE).read_text())
    except (OSError, ValueError) as error:
        raise TrainJobError(f"{out} holds no report: {error}") from error
    return report


def last_checkpoint(work: Path) -> Path | None:
    """The latest of a trainer's checkpoints in `work` that is whole."""
    folders = (work / "checkpoints").glob("checkpoint-*")
    whole = [folder for folder in folders if (folder / "trainer_state.json").exists()]
    return max(whole, key=steps_of, default=None)


def steps_of(checkpoint: Path | None) -> int:
    """How many steps a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def read_json(path: Path, default: Any) -> Any:
    """What `path` holds, or `default` where it is not there."""
    return json.loads(path.read_text()) if path.exists() else default


def write_json(path: Path, value: Any) -> None:
    """Write `value` whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2))
    part.replace(path)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
