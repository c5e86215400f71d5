"""What a run's configuration file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.config_file import read_config


class MixtureSpec(BaseModel):
    """One run. Paths are relative to where the command is given.

    Attributes:
        base: Folder, or hub name, of the base model.
        gate: The method.
        options: Of the method.
        adapters: Name -> folder of a PEFT adapter. Without any, new ones are made and trained with the gate.
        experts, rank, targets: Of new adapters; by default the method's. Several numbers of experts are for successive
            parts of the model's depth.
        data: JSON lines of `{"query" | "messages", "answer", "adapter"?}`.
        out: Folder that the mixture goes to; never overwritten.
        steps: Optimizer steps.
        batch: Examples in a step, over all processes.
        micro_batch: Examples in a pass of one process.
        learning_rate, gate_learning_rate: Peak, after a linear warm-up of `warmup` steps and before a decay to zero;
            the second is the gate's own.
        max_tokens: Longer examples are cut.
        checkpoint_every: Steps between checkpoints, from which a killed run goes on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: str
    gate: str
    options: dict[str, Any] = {}
    adapters: dict[str, Path] = {}
    experts: int | tuple[int, ...] | None = None
    rank: int | None = Field(default=None, ge=1)
    targets: tuple[str, ...] | None = None
    data: Path
    out: Path
    steps: int = Field(default=500, ge=1)
    batch: int = Field(default=32, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    gate_learning_rate: float | None = Field(default=None, gt=0)
    warmup: int = Field(default=10, ge=0)
    max_tokens: int = Field(default=1024, ge=2)
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=100, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.adapters and (self.experts is not None or self.rank is not None or self.targets is not None):
            raise ValueError("experts, rank and targets are of new adapters: leave them out where adapters are given")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} must be a multiple of micro_batch {self.micro_batch}")
        return self


def read_spec(path: Path, **overrides: object) -> MixtureSpec:
    """The spec in a YAML or JSON file; `overrides` that are not None come first. Raises `TrainJobError`."""
    return read_config(path, MixtureSpec, overrides)
