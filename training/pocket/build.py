"""Builds the whole fleet: every member trained in a process of its own, two at a time, then measured."""

import logging
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from training.pocket.fleet import BASE, GENERALIST
from training.pocket.questions import PocketError
from training.pocket.skills import SKILLS

logger = logging.getLogger(__name__)


def _train_in_process(name: str, folder: Path, work: Path, seed: int) -> None:
    """Trains one member on one thread: two such processes do more than one with two threads."""
    log = work / f"{name}.log"
    command = [sys.executable, "-m", "training.pocket", "train", name]
    command += ["--folder", str(folder), "--work", str(work), "--seed", str(seed)]
    logger.info("training pocket-%s, see %s", name, log)
    with log.open("a") as output:
        done = subprocess.run(
            command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        )
    if done.returncode != 0:
        raise PocketError(f"training of {name!r} failed with status {done.returncode}, see {str(log)!r}")
    logger.info("trained pocket-%s", name)


def train_all(folder: Path, work: Path, seed: int = 0, workers: int = 2) -> None:
    """Trains the base and the generalist beside each other, then the specialists on the base."""
    work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        base: Future[None] = pool.submit(_train_in_process, BASE, folder, work, seed)
        others = [pool.submit(_train_in_process, GENERALIST, folder, work, seed)]
        base.result()
        others += [pool.submit(_train_in_process, name, folder, work, seed) for name in SKILLS]
        for future in others:
            future.result()
