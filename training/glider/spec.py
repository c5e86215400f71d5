"""What a run is about: the command's options and the tasks file.

    tasks:
      units: {data: units.jsonl, instruction: Convert a quantity from one unit to another.}
      roman: {data: roman.jsonl}                 # its instruction is written by the writer, or is the card's own
    writer: {fleet: fleet.yaml, expert: big}     # any expert of any fleet
    batch: 16                                    # and any other field of `GateTraining`

A task is named as its adapter's folder is. Paths are relative to the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experts.embedding.encoder import EmbedderConfig
from training.errors import TrainJobError

GateName = Literal["phatgoose", "glider", "arrow"]
STEPS: Mapping[GateName, int] = {"phatgoose": 100, "glider": 200, "arrow": 0}
"""The papers' numbers of steps. Arrow's prototypes are made of the adapter alone."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Task(_Model):
    """An expert's examples, JSON lines of `{"query" | "messages", "answer"}`, and its instruction, if it is known."""

    data: Path
    instruction: str | None = Field(default=None, min_length=1)


class Writer(_Model):
    """The expert that writes instructions from examples: a name in a fleet file."""

    fleet: Path
    expert: str


class GateTraining(_Model):
    """How one expert's vectors are trained. `steps` None is the paper's number.

    `observed` examples of each expert are answered by its adapter alone: that is what the router is fitted on.
    """

    steps: int | None = Field(default=None, ge=1)
    batch: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    warmup: int = Field(default=10, ge=0)
    max_tokens: int = Field(default=1024, ge=2)
    observed: int = Field(default=64, ge=1)


class TasksFile(GateTraining):
    """What stands in the tasks file."""

    tasks: dict[str, Task] = Field(min_length=1)
    writer: Writer | None = None
    embedder: EmbedderConfig = EmbedderConfig()


class GliderSpec(_Model):
    """One run. `start` is an earlier run's folder, from which experts that are the same are taken over."""

    base: str
    adapters: Path
    gate: GateName = "glider"
    file: TasksFile
    out: Path
    start: Path | None = None
    seed: int = Field(default=0, ge=0)

    @property
    def steps(self) -> int:
        """Of each expert; none where there is nothing to train."""
        return (self.file.steps or STEPS[self.gate]) if STEPS[self.gate] else 0

    def adapter(self, name: str) -> Path:
        """The folder of an expert's adapter."""
        return self.adapters / name


def read_tasks_file(path: Path) -> TasksFile:
    """The tasks file, its paths made absolute. Raises `TrainJobError` that names file and field."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainJobError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise TrainJobError(f"{path} must hold a mapping with `tasks`, not {type(content).__name__}")
    try:
        found = TasksFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise TrainJobError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return found.model_copy(update=_resolved(found, path.resolve().parent))


def _resolved(found: TasksFile, folder: Path) -> dict[str, Any]:
    tasks = {name: task.model_copy(update={"data": folder / task.data}) for name, task in found.tasks.items()}
    writer = found.writer and found.writer.model_copy(update={"fleet": folder / found.writer.fleet})
    return {"tasks": tasks, "writer": writer}


def check_adapters(spec: GliderSpec) -> None:
    """Raise `TrainJobError` unless each task has an adapter."""
    for name in spec.file.tasks:
        if "/" in name or name.startswith(".") or not (spec.adapter(name) / "adapter_config.json").is_file():
            found = sorted(path.parent.name for path in spec.adapters.glob("*/adapter_config.json"))
            there = ", ".join(found) or "none"
            raise TrainJobError(f"task {name!r} has no adapter in {spec.adapters}: there are {there}")
