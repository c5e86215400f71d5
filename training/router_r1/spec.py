"""What a run's configuration file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experts.fleet import POCKET_FLEET
from routers.strategies.router_r1.protocol import MAX_CALLS
from training.config_file import read_config
from training.router_r1.questions import Metric


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PocketSource(_Model):
    """So many one-skill and two-skill pocket questions, none with a skill of `without`."""

    one: int = Field(default=1000, ge=0)
    two: int = Field(default=1000, ge=0)
    without: tuple[str, ...] = ()


class TableSource(_Model):
    """Tables of questions with answers; those numbered below 350 are for training."""

    tables: tuple[Path, ...] = Field(min_length=1)
    metric: Metric = "exact"


class RouterR1Spec(_Model):
    """One run. Relative paths are relative to the file.

    Attributes:
        policy: Folder, or hub name, of the policy model to begin with.
        out: Folder that the trained policy goes to; never overwritten.
        questions: What is asked.
        fleet: The fleet file; those of its experts that are not `routed` are left out.
        without: Experts whose cards the policy is not shown either.
        environment: `live` asks the fleet and records what it replied in `recorded`, where that is named; `replay` has
            nothing but `recorded`.
        shuffle: Whether each question's cards come in an order of its own.
        vary: Whether each question has a fleet of its own, in which experts are missing or have other names: a policy
            that sees one fleet alone learns its names and reads no cards.
        instructions: What the policy is told before the cards.
        cost_weight: The paper's alpha: what of a right answer's reward is for cheapness.
        format_reward: Whether a broken format is punished.
        steps: Optimizer steps.
        questions_per_step, rollouts: Questions in a step, and conversations sampled for each.
        micro_batch: Conversations in a pass of one process; by default all.
        learning_rate: Peak, after `warmup` steps and before a linear decay to zero.
        temperature: Of sampling.
        turn_tokens, completion_tokens: Bounds on the policy's turn and on a whole conversation after its prompt.
        reply_tokens, reply_chars: Bounds on what an expert writes and on what the policy reads of it.
        dtype: Of the weights.
        activation_checkpointing: Compute activations again in the backward pass rather than keep them.
        log_samples_every: Steps between conversations put into `samples.jsonl`.
        checkpoint_every: Steps between checkpoints, from which a killed run goes on.
    """

    policy: str
    out: Path
    questions: PocketSource | TableSource = PocketSource()
    fleet: Path = POCKET_FLEET
    without: tuple[str, ...] = ()
    environment: Literal["live", "replay"] = "live"
    recorded: Path | None = None
    shuffle: bool = True
    vary: bool = False
    instructions: str = ""
    cost_weight: float = Field(default=0.0, ge=0, le=1)
    format_reward: bool = True
    steps: int = Field(default=60, ge=1)
    questions_per_step: int = Field(default=8, ge=1)
    rollouts: int = Field(default=8, ge=2)
    micro_batch: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup: int = Field(default=5, ge=0)
    temperature: float = Field(default=1.0, gt=0, le=2)
    turn_tokens: int = Field(default=96, ge=16)
    completion_tokens: int = Field(default=320, ge=32)
    max_calls: int = Field(default=MAX_CALLS, ge=1, le=MAX_CALLS)
    reply_tokens: int = Field(default=64, ge=1)
    reply_chars: int = Field(default=200, ge=1)
    concurrency: int = Field(default=64, ge=1)
    call_timeout_s: float = Field(default=60.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    activation_checkpointing: bool = False
    seed: int = Field(default=0, ge=0)
    log_samples_every: int = Field(default=5, ge=1)
    checkpoint_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.environment == "replay" and self.recorded is None:
            raise ValueError("environment: `replay` needs `recorded`, the file of replies")
        batch = self.questions_per_step * self.rollouts
        if self.micro_batch is not None and batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} must divide questions_per_step * rollouts = {batch}")
        return self


def read_spec(path: Path, **overrides: object) -> RouterR1Spec:
    """The spec in a YAML or JSON file; `overrides` that are not None come first. Raises `TrainJobError`."""
    return _at(read_config(path, RouterR1Spec, overrides), path.resolve().parent)


def _at(spec: RouterR1Spec, folder: Path) -> RouterR1Spec:
    """The spec with its relative paths made absolute."""
    changed: dict[str, Any] = {"out": folder / spec.out, "fleet": folder / spec.fleet}
    if spec.recorded:
        changed["recorded"] = folder / spec.recorded
    if spec.policy.startswith((".", "~")):
        changed["policy"] = str((folder / Path(spec.policy).expanduser()).resolve())
    if isinstance(spec.questions, TableSource):
        tables = tuple(folder / table for table in spec.questions.tables)
        changed["questions"] = spec.questions.model_copy(update={"tables": tables})
    return spec.model_copy(update=changed)
