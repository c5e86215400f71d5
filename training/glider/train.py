"""`router-service train glider`: every expert's part, and the mixture and the router that they make.

    OUT/adapters/NAME/       PEFT's files, as they were
    OUT/gate.safetensors     the gate of them all: with the adapters a mixture that `load_mixture` reads
    OUT/router/              the router `glider`: instructions' embeddings and examples of each expert
    OUT/parts/NAME/          what belongs to that expert alone (training.glider.part)
    OUT/experts.json         how it was made, and each expert's instruction

Parts know nothing of each other. In a Ray job they are made side by side, each in a task of its own; else one after
another. With an earlier OUT as `start`, what is the same is taken over, and only new experts are trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from experts.cards import ExpertCard
from experts.mixing import assemble_mixture
from experts.mixing.install import GATE_FILE
from routers.contracts import Observations
from routers.registry import AnyRouter, create_router
from training.errors import TrainJobError
from training.glider.part import OnProgress, Part, make_part, part_key
from training.glider.spec import GliderSpec, check_adapters
from training.manifest import git_commit, package_versions
from training.work_folder import publish, started_at, work_folder

MANIFEST = "experts.json"


class GliderExpert(BaseModel):
    """An expert of the mixture. `right` is the share of its own examples that its adapter alone answers rightly."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    instruction: str
    loss: float | None
    right: float
    examples: int


class GliderManifest(BaseModel):
    """How a mixture was made. Times are seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    gate: str
    steps: int
    seed: int
    experts: dict[str, GliderExpert]
    versions: dict[str, str]
    git_commit: str | None
    started_at: float
    finished_at: float

    @classmethod
    def read(cls, folder: Path) -> GliderManifest:
        """The manifest in a mixture's folder. Raises `TrainJobError`."""
        try:
            return cls.model_validate_json((folder / MANIFEST).read_bytes())
        except (OSError, ValidationError) as error:
            raise TrainJobError(f"{folder} holds no mixture that `train glider` made: {error}") from error


def train_glider(spec: GliderSpec, *, resume: bool = True, on_progress: OnProgress = lambda *_: None) -> GliderManifest:
    """Make the mixture and its router in `spec.out`, whole or not at all; returns its manifest.

    A killed run goes on where it was, in `OUT.part`. Raises `TrainJobError`, `MixingError` or `RoutingError`.
    """
    check_adapters(spec)
    keys = {name: part_key(spec, name) for name in spec.file.tasks}
    if spec.out.exists():
        return _finished(spec, keys)
    with work_folder(spec.out, _run_key(keys), resume) as work:
        whole = work / "mixture"
        _take_over(spec, keys, whole / "parts")
        parts = _make_parts(spec, keys, whole / "parts", on_progress)
        assemble_mixture(
            {name: whole / "parts" / name / GATE_FILE for name in parts},
            {name: spec.adapter(name) for name in parts},
            whole,
        )
        fit_router(spec, parts).save(whole / "router")
        manifest = GliderManifest(
            base=spec.base,
            gate=spec.gate,
            steps=spec.steps,
            seed=spec.seed,
            experts={name: _described(part) for name, part in parts.items()},
            versions=package_versions(),
            git_commit=git_commit(),
            started_at=started_at(work),
            finished_at=time.time(),
        )
        (whole / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        publish(whole, spec.out)
    return manifest


def _run_key(keys: Mapping[str, str]) -> str:
    """A hash of all that decides the mixture."""
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def fit_router(spec: GliderSpec, parts: Mapping[str, Part]) -> AnyRouter:
    """The global router over the parts' experts, fitted on what each made of its own examples."""
    router = create_router("glider", {"embedder": spec.file.embedder, "seed": spec.seed})
    return router.fit(observations(parts))


def observations(parts: Mapping[str, Part]) -> Observations:
    """Every expert on its own examples; no expert was asked another's. The table has no task labels."""
    cards = [ExpertCard(name=name, kind="adapter", description=part.instruction) for name, part in parts.items()]
    rows = [(e, observed) for e, part in enumerate(parts.values()) for observed in part.observed]
    shape = (len(rows), len(cards))
    quality, input_tokens, output_tokens, unknown = (np.full(shape, np.nan, np.float32) for _ in range(4))
    for row, (e, observed) in enumerate(rows):
        quality[row, e] = observed.right
        input_tokens[row, e], output_tokens[row, e] = observed.input_tokens, observed.output_tokens
    return Observations(
        ids=[str(row) for row in range(len(rows))],
        texts=[observed.query for _, observed in rows],
        tasks=[""] * len(rows),
        cards=cards,
        quality=quality,
        cost_usd=np.zeros(shape, np.float32),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        latency_s=unknown,
    )


def _described(part: Part) -> GliderExpert:
    right = sum(observed.right for observed in part.observed) / len(part.observed)
    return GliderExpert(
        key=part.key, instruction=part.instruction, loss=part.loss, right=right, examples=len(part.observed)
    )


def _finished(spec: GliderSpec, keys: Mapping[str, str]) -> GliderManifest:
    """What is there already, where it is the same."""
    manifest = GliderManifest.read(spec.out)
    if {name: expert.key for name, expert in manifest.experts.items()} != dict(keys):
        raise TrainJobError(
            f"{spec.out} holds another mixture (other experts, data or options), and a service may be using it: "
            "choose another folder"
        )
    return manifest


def _take_over(spec: GliderSpec, keys: Mapping[str, str], parts: Path) -> None:
    """Copy the parts that an earlier run made of the same."""
    if spec.start is None:
        return
    old = GliderManifest.read(spec.start)
    for name, key in keys.items():
        if name in old.experts and old.experts[name].key == key and not (parts / name).exists():
            shutil.copytree(spec.start / "parts" / name, parts / name)


def _make_parts(spec: GliderSpec, keys: Mapping[str, str], folder: Path, on_progress: OnProgress) -> dict[str, Part]:
    address = os.environ.get("RAY_ADDRESS", "")
    if address and not address.startswith("http"):  # within a job; with http it names a job server, for --submit
        return _in_parallel(spec, keys, folder, on_progress)
    return {name: make_part(spec, name, key, folder / name, on_progress=on_progress) for name, key in keys.items()}


def _in_parallel(spec: GliderSpec, keys: Mapping[str, str], folder: Path, on_progress: OnProgress) -> dict[str, Part]:
    """Each part in a Ray task of the job's cluster, which shares `folder`'s disk; one that failed is tried again."""
    import ray

    ray.init(log_to_driver=False, logging_level="warning")
    try:
        task = ray.remote(num_cpus=1, max_retries=2)(make_part)
        running = {task.remote(spec, name, key, folder / name): name for name, key in keys.items()}
        parts: dict[str, Part] = {}
        while len(parts) < len(running):
            done, _ = ray.wait([ref for ref, name in running.items() if name not in parts])
            parts[running[done[0]]] = ray.get(done[0])
            on_progress("experts", len(parts), len(running))
        return {name: parts[name] for name in keys}
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    finally:
        ray.shutdown()
