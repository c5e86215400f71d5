"""Where a run's unfinished work lies, so that its result is there whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import TrainJobError


@contextmanager
def work_folder(out: Path, resume: bool) -> Iterator[Path]:
    """`OUT.part`, locked; a rename makes it `OUT`."""
    work = out.with_name(out.name + ".part")
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainJobError(f"another run is training into {out}") from error
        if not resume:
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield work
    finally:
        os.close(lock)
