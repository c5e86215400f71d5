"""A small seeded search over a router's own options, through Ray Tune.

A trial fits on one part of the train rows and is scored by AIQ on another. Its result is a file named by its options,
so that a search that was killed answers what it knows at once and goes on; the same seed draws the same trials.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from routers.search_space import Choice, Range
from training.errors import TrainJobError
from training.manifest import Trial

_OBJECT_STORE_BYTES = 200 << 20  # holds the table once, for all trials

_QUIET = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one writes to stdout, which is the result's
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}

Evaluate = Callable[[Mapping[str, Any]], float]
"""The AIQ on the validation part that a router with these options reaches. It is pickled to Ray's workers."""


def search(
    evaluate: Evaluate,
    space: Mapping[str, Range | Choice],
    *,
    start: Mapping[str, Any],
    trials: int,
    seed: int,
    folder: Path,
    on_trial: Callable[[int], None] = lambda _: None,
) -> list[Trial]:
    """Try `start` and `trials - 1` random draws of `space`; all of them, the best first.

    `start` are the options that the router has anyway, so that the best is never worse than those. `folder` is where
    the results lie; `on_trial` hears how many are done. Inside a Ray job the trials run on its cluster, else on this
    machine's cores. Raises `TrainJobError` when a trial fails.
    """
    if not space:
        raise TrainJobError("this router has no options to search: leave --trials out")
    folder.mkdir(parents=True, exist_ok=True)
    first = {name: start[name] for name in space if name in start}
    with _ray():
        from ray import tune
        from ray.tune.logger import JsonLoggerCallback
        from ray.tune.search.basic_variant import BasicVariantGenerator

        tuner = tune.Tuner(
            tune.with_parameters(_trial, evaluate=evaluate, folder=folder),
            param_space={name: _domain(mark) for name, mark in space.items()},
            tune_config=tune.TuneConfig(
                metric="aiq",
                mode="max",
                num_samples=trials,
                search_alg=BasicVariantGenerator(points_to_evaluate=[first], random_state=seed),
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(folder / "ray"),
                verbose=0,
                callbacks=[JsonLoggerCallback(), _progress(on_trial)],
            ),
        )
        results = tuner.fit()
    if results.errors:
        raise TrainJobError(f"{len(results.errors)} of {trials} trials failed, first with: {results.errors[0]}")
    found = [Trial.model_validate(result.metrics["trial"]) for result in results]
    return sorted(found, key=lambda trial: -trial.aiq)


def _trial(config: dict[str, Any], evaluate: Evaluate, folder: Path) -> dict[str, Any]:
    name = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
    known = folder / f"{name}.json"
    if known.exists():
        trial = Trial.model_validate_json(known.read_text())
    else:
        started = time.perf_counter()
        trial = Trial(config=config, aiq=evaluate(config), seconds=time.perf_counter() - started)
        part = known.with_suffix(".part")
        part.write_text(trial.model_dump_json())
        part.replace(known)
    return {"aiq": trial.aiq, "trial": trial.model_dump()}


def _domain(mark: Range | Choice) -> Any:
    """`mark` as Ray Tune says it; Tune's integers stop one before their end."""
    from ray import tune

    if isinstance(mark, Choice):
        return tune.choice(mark.values)
    if isinstance(mark.low, int) and isinstance(mark.high, int):
        return (tune.lograndint if mark.log else tune.randint)(mark.low, mark.high + 1)
    return (tune.loguniform if mark.log else tune.uniform)(mark.low, mark.high)


def _progress(on_trial: Callable[[int], None]) -> Any:
    from ray.tune import Callback

    class Progress(Callback):  # type: ignore[misc]
        done = 0

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.done += 1
            on_trial(self.done)

    return Progress()


@contextmanager
def _ray() -> Iterator[None]:
    """The cluster of the job that this runs in, or else a private Ray on this machine for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="tune-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = bool(os.environ.get("RAY_ADDRESS"))
        private = {} if cluster else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        for name, value in {**_QUIET, **private}.items():
            os.environ.setdefault(name, value)  # Ray reads them when it is imported
        import ray

        ray.init(log_to_driver=False, logging_level="warning", **({} if cluster else _private(folder)))
        try:
            yield
        finally:
            ray.shutdown()


def _private(folder: str) -> dict[str, Any]:
    """A Ray of this process alone; its sockets need a short path."""
    return {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": folder,
    }
