"""Train a router on a table of observations: resumable, reproducible, and whole or not at all.

    embed     every text, once, into the cache on disk
    tune      optional: a search over the router's own options, scored on a validation part of train
    validate  fit on the rest of train, measure on the validation part
    fit       fit on all of train, with the options chosen

What each step gives lies in `OUT.part` until the artefact is whole; then one rename makes it `OUT`. A run that was
killed goes on from there and ends with the same arrays. An artefact is never overwritten: a service may be reading it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from routers.checkpoint import Checkpoint
from routers.contracts import Observations, Query
from routers.embedder import shared_embedder
from routers.registry import AnyRouter, create_router
from training.errors import TrainJobError
from training.manifest import Manifest, Trial, data_sha256, git_commit, package_versions
from training.metrics import aiq, bootstrap, frontier, sweep, weighted_mean
from training.observations import load_table
from training.tune import search
from training.work_folder import publish, read_json, started_at, work_folder, write_json

OnProgress = Callable[[str, int, int], None]
"""Hears of a step's name, how much of it is done, and how much there is."""

CHECKPOINT_EVERY_S = 10.0
"""How much of a fit of many steps a kill can cost."""

_EMBED_BATCH = 512
_METRICS = "validation.json"


class TrainSpec(BaseModel):
    """What to train. `config` are the router's options; `seed` is one of them unless `config` has its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    router: str
    observations: Path
    out: Path
    config: dict[str, Any] = {}
    seed: int = Field(default=0, ge=0)
    trials: int = Field(default=0, ge=0)
    validation_share: float = Field(default=0.2, gt=0, lt=1)

    @property
    def options(self) -> dict[str, Any]:
        """The router's options with the seed."""
        return {"seed": self.seed, **self.config}


def train(spec: TrainSpec, *, resume: bool = True, on_progress: OnProgress = lambda *_: None) -> Manifest:
    """Train as `spec` says and leave the artefact in `spec.out`; returns its manifest.

    A finished artefact of the same run is left as it is. Without `resume` an unfinished run is thrown away first.
    Raises `TrainJobError`, `ObservationError` or `RouterConfigError`.
    """
    router = create_router(spec.router, spec.options)
    data = data_sha256(spec.observations)
    key = _run_key(spec, router, data)
    if spec.out.exists():
        return _finished(spec.out, key)
    table = load_table(spec.observations)
    with work_folder(spec.out, key, resume) as work:
        run = _Run(spec, key, data, table.train, len(table.test), work, on_progress)
        return run.finish()


def score(router: AnyRouter, held_out: Observations) -> dict[str, float]:
    """How a fitted router does on rows that it has not seen: AIQ, and quality and cost of choosing by quality alone."""
    estimates = router.estimate([Query(text=text) for text in held_out.texts], held_out.cards)
    draws = bootstrap(len(held_out), resamples=0)
    front = frontier(sweep(estimates, held_out.quality, held_out.cost_usd), draws)
    expert_cost = weighted_mean(held_out.cost_usd, draws)
    return {
        "aiq": float(aiq(front, expert_cost)[0]),
        "quality": float(front.quality[0, 0]),
        "cost_usd_per_1k": 1000 * float(front.cost_usd[0, 0]),
        "best_single_quality": float(np.nanmax(weighted_mean(held_out.quality, draws)[0])),
    }


@dataclass(frozen=True, slots=True)
class Evaluate:
    """AIQ on `held_out` of a router with given options, fitted on `fitted`: what a tune maximises."""

    router: str
    base: Mapping[str, Any]
    fitted: Observations
    held_out: Observations

    def __call__(self, options: Mapping[str, Any]) -> float:
        router = create_router(self.router, {**self.base, **options}).fit(self.fitted)
        return score(router, self.held_out)["aiq"]


@dataclass(frozen=True, slots=True)
class _Run:
    spec: TrainSpec
    key: str
    data: str
    table: Observations
    test_rows: int
    work: Path
    on_progress: OnProgress

    def finish(self) -> Manifest:
        """Do what is left to do, and put the artefact in its place."""
        fitted, held_out = self._split()
        self._embed()
        trials = self._tune(fitted, held_out)
        config = {**self.spec.options, **(trials[0].config if trials else {})}
        metrics = self._validate(config, fitted, held_out)
        router = self._fit(config, self.table, "fit")
        manifest = Manifest(
            run=self.key,
            router=self.spec.router,
            config=router.config.model_dump(mode="json"),
            seed=self.spec.seed,
            observations=str(self.spec.observations),
            data_sha256=self.data,
            rows={"train": len(self.table), "validation": len(held_out), "test": self.test_rows},
            experts=[card.name for card in router.cards],
            metrics=metrics,
            trials=trials,
            versions=package_versions(),
            git_commit=git_commit(),
            started_at=started_at(self.work),
            finished_at=time.time(),
        )
        self._publish(router, manifest)
        return manifest

    def _split(self) -> tuple[Observations, Observations]:
        """Train rows to fit on, and the validation part, chosen by the seed."""
        order = np.random.default_rng(self.spec.seed).permutation(len(self.table))
        held_out = round(self.spec.validation_share * len(order))
        if not 0 < held_out < len(order):
            raise TrainJobError(f"{len(order)} train rows are too few to hold out {self.spec.validation_share:.0%}")
        return self.table.rows(np.sort(order[held_out:])), self.table.rows(np.sort(order[:held_out]))

    def _embed(self) -> None:
        """Fill the cache batch by batch, shortest texts first, so that a killed run embeds in the same batches."""
        router = create_router(self.spec.router, self.spec.options)
        if not router.embeds:
            return
        embedder = shared_embedder(router.config.embedder)
        texts = sorted(set(self.table.texts), key=lambda text: (len(text), text))
        for start in range(0, len(texts), _EMBED_BATCH):
            self.on_progress("embed", start, len(texts))
            embedder.embed(texts[start : start + _EMBED_BATCH])
        self.on_progress("embed", len(texts), len(texts))

    def _tune(self, fitted: Observations, held_out: Observations) -> list[Trial]:
        if not self.spec.trials:
            return []
        router = create_router(self.spec.router, self.spec.options)
        self.on_progress("tune", 0, self.spec.trials)
        return search(
            Evaluate(self.spec.router, self.spec.options, fitted, held_out),
            router.search_space(),
            start=router.config.model_dump(mode="json"),
            trials=self.spec.trials,
            seed=self.spec.seed,
            folder=self.work / "trials",
            on_trial=lambda done: self.on_progress("tune", done, self.spec.trials),
        )

    def _validate(self, config: Mapping[str, Any], fitted: Observations, held_out: Observations) -> dict[str, float]:
        known: dict[str, float] | None = read_json(self.work / _METRICS, None)
        if known is None:
            known = score(self._fit(config, fitted, "validate"), held_out)
            write_json(self.work / _METRICS, known)
        return known

    def _fit(self, config: Mapping[str, Any], table: Observations, step: str) -> AnyRouter:
        router = create_router(self.spec.router, config)
        router.checkpoint = Checkpoint(
            self.work / step,
            every_s=CHECKPOINT_EVERY_S,
            on_progress=lambda done, total: self.on_progress(step, done, total),
        )
        self.on_progress(step, 0, 1)
        router.fit(table)
        self.on_progress(step, 1, 1)
        return router

    def _publish(self, router: AnyRouter, manifest: Manifest) -> None:
        """Save into the work folder, sync, and rename: the artefact is there as a whole or not at all."""
        whole = self.work / "artefact"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        router.save(whole)
        manifest.write(whole)
        publish(whole, self.spec.out)


def _run_key(spec: TrainSpec, router: AnyRouter, data: str) -> str:
    """A hash of all that decides the arrays, but not of where things lie."""
    decides = {
        "router": spec.router,
        "config": router.config.model_dump(mode="json"),
        "seed": spec.seed,
        "trials": spec.trials,
        "validation_share": spec.validation_share,
        "data": data,
        "versions": package_versions(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _finished(out: Path, key: str) -> Manifest:
    manifest = Manifest.read(out)
    if manifest.run != key:
        raise TrainJobError(
            f"{out} holds the router of another run (other data, options or versions), and a service may be using it: "
            "choose another folder"
        )
    return manifest
