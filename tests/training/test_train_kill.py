"""A training that is killed by SIGKILL in the middle, and started again, ends with the arrays of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.tables import small_table
from training.manifest import Manifest

# Trains as the command line does, but dies at a given point of a given step.
_SCRIPT = """
import os, signal, sys
from pathlib import Path
from training.train_router import TrainSpec, train

router, table, out, at_step, at = sys.argv[1:]

def die(step, done, total):
    if step == at_step and done >= int(at):
        os.kill(os.getpid(), signal.SIGKILL)

train(TrainSpec(router=router, observations=Path(table), out=Path(out)), on_progress=die)
"""


def run(table: Path, out: Path, cache: Path, *die: str) -> int:
    environment = {**os.environ, "ROUTER_CACHE_DIR": str(cache)}
    arguments = ["linear", str(table), str(out), *(die or ("never", "0"))]
    return subprocess.run([sys.executable, "-c", _SCRIPT, *arguments], env=environment, timeout=900).returncode


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_table(tmp_path_factory.mktemp("table"), 800)


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(table, folder / "artefact", folder / "cache") == 0
    return folder / "artefact"


@pytest.mark.slow
@pytest.mark.parametrize(("step", "at"), [("embed", "512"), ("fit", "0"), ("fit", "1")])
def test_a_killed_training_resumes_to_the_same_artefact(
    table: Path, whole: Path, tmp_path: Path, step: str, at: str
) -> None:
    cache = tmp_path / "cache" if step == "embed" else whole.parent / "cache"
    killed = tmp_path / "killed"
    assert run(table, killed, cache, step, at) == -signal.SIGKILL
    assert not killed.exists()
    assert run(table, killed, cache) == 0
    assert (killed / "router.safetensors").read_bytes() == (whole / "router.safetensors").read_bytes()
    assert Manifest.read(killed).metrics == Manifest.read(whole).metrics
    assert Manifest.read(killed).run == Manifest.read(whole).run
