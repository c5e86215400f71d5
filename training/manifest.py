"""The manifest beside an artefact: all that is needed to know how it came about and to make it again."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from training.errors import TrainJobError
from training.observations import observations_file

MANIFEST = "manifest.json"

_PACKAGES = ("router-service", "numpy", "scipy", "scikit-learn", "torch", "torch-geometric", "transformers", "ray")


class Trial(BaseModel):
    """One point of a tune: the options that were tried, and the AIQ that they reached on the validation part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any]
    aiq: float
    seconds: float


class Manifest(BaseModel):
    """How an artefact was trained. Times are seconds since the epoch; the start is the first, before any kill.

    `rows` counts queries: `train` (what the artefact was fitted on), `validation` (the part of it that was held out to
    measure `metrics` and to choose among `trials`) and `test` (never looked at). `run` is a hash of everything that
    decides the arrays: equal runs give equal arrays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    router: str
    config: dict[str, Any]
    seed: int
    observations: str
    data_sha256: str
    rows: dict[str, int]
    experts: list[str]
    metrics: dict[str, float]
    trials: list[Trial]
    versions: dict[str, str]
    git_commit: str | None
    started_at: float
    finished_at: float

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of an artefact's folder. Raises `TrainJobError`."""
        try:
            return cls.model_validate_json((folder / MANIFEST).read_text())
        except OSError as error:
            raise TrainJobError(f"{folder} holds no trained router: {error}") from error
        except ValidationError as error:
            raise TrainJobError(f"{folder / MANIFEST} is not a manifest: {error.errors()[0]['msg']}") from error


def data_sha256(folder: Path) -> str:
    """A hash of a table's two files. Raises `ObservationError` where they are not there."""
    digest = hashlib.sha256()
    for path in (folder / "experts.json", observations_file(folder)):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change what is learnt; only those that are installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@cache
def git_commit() -> str | None:
    """The commit that this code was checked out from, with `+changes` where files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
