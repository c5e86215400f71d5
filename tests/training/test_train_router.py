"""Training runs: what they leave, what they refuse, and that a killed one ends with the same artefact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from routers import registry
from routers.errors import ObservationError, RouterConfigError
from routers.registry import load_router
from tests.training.stepwise import KilledError, StepwiseRouter
from tests.training.tables import small_table
from training.errors import TrainJobError
from training.manifest import Manifest
from training.observations import load_table
from training.train_router import TrainSpec, score, train


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_table(tmp_path_factory.mktemp("table"))


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> type[StepwiseRouter]:
    """The stepwise router, known by name, that checkpoints after every step."""
    known: Mapping[str, EntryPoint] = dict(registry._known())
    point = EntryPoint("stepwise", "tests.training.stepwise:StepwiseRouter", registry.GROUP)
    monkeypatch.setattr(registry, "_known", lambda: {**known, "stepwise": point})
    monkeypatch.setattr("training.train_router.CHECKPOINT_EVERY_S", 0.0)
    StepwiseRouter.taken.clear()
    StepwiseRouter.kill_after = None
    return StepwiseRouter


def spec(table: Path, out: Path, **changes: object) -> TrainSpec:
    return TrainSpec.model_validate({"router": "best", "observations": table, "out": out, **changes})


def arrays(folder: Path) -> bytes:
    return (folder / "router.safetensors").read_bytes()


def test_the_artefact_loads_and_its_manifest_says_how_it_came_about(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "best-1"
    manifest = train(spec(table, out, seed=3))
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "router.json", "router.safetensors"]
    assert Manifest.read(out) == manifest
    assert not out.with_name("best-1.part").exists()
    assert manifest.rows == {"train": 160, "validation": 32, "test": 40}
    assert manifest.experts == ["words", "sums"]
    assert manifest.config["seed"] == 3
    assert manifest.versions["numpy"] == np.__version__
    assert 0 < manifest.metrics["aiq"] < 1
    assert manifest.started_at <= manifest.finished_at
    router = load_router(out)
    measured = score(router, load_table(table).test)
    assert measured["quality"] == pytest.approx(measured["best_single_quality"])


def test_the_artefact_is_fitted_on_all_of_train_and_nothing_of_test(table: Path, tmp_path: Path) -> None:
    train(spec(table, tmp_path / "all"))
    lines = [json.loads(line) for line in (table / "observations.jsonl").read_text().splitlines()]
    for line in lines:
        if line["split"] == "test":
            line["experts"]["sums"]["quality"] = 1 - line["experts"]["sums"]["quality"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "experts.json").write_text((table / "experts.json").read_text())
    (other / "observations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(spec(other, tmp_path / "changed"))
    assert arrays(tmp_path / "all") == arrays(tmp_path / "changed")
    best = load_router(tmp_path / "all")
    assert best.profile.quality == pytest.approx(load_table(table).train.quality.mean(axis=0), abs=0.02)


def test_progress_names_each_step(table: Path, tmp_path: Path, stepwise: type[StepwiseRouter]) -> None:
    heard: list[tuple[str, int, int]] = []
    train(spec(table, tmp_path / "a", router="stepwise"), on_progress=lambda *step: heard.append(step))
    assert [step for step, done, total in heard if done == total] == ["validate", "validate", "fit", "fit"]
    assert ("fit", 7, 20) in heard


@pytest.mark.parametrize("kill_after", [0, 3, 19, 20, 23, 39])
def test_a_killed_run_ends_with_the_same_arrays(
    table: Path, tmp_path: Path, stepwise: type[StepwiseRouter], kill_after: int
) -> None:
    """Twenty steps to validate, twenty to fit: killed between any two of them."""
    train(spec(table, tmp_path / "whole", router="stepwise"))
    killed = spec(table, tmp_path / "killed", router="stepwise")
    stepwise.taken.clear()
    stepwise.kill_after = kill_after
    with pytest.raises(KilledError):
        train(killed)
    assert not killed.out.exists()
    manifest = train(killed)
    assert arrays(tmp_path / "killed") == arrays(tmp_path / "whole")
    assert manifest.metrics == Manifest.read(tmp_path / "whole").metrics
    assert len(stepwise.taken) == 40  # no step was taken twice


def test_a_finished_run_is_not_done_again(table: Path, tmp_path: Path, stepwise: type[StepwiseRouter]) -> None:
    one = train(spec(table, tmp_path / "a", router="stepwise"))
    stepwise.taken.clear()
    assert train(spec(table, tmp_path / "a", router="stepwise")) == one
    assert not stepwise.taken


def test_an_artefact_is_never_overwritten(table: Path, tmp_path: Path) -> None:
    train(spec(table, tmp_path / "a"))
    before = arrays(tmp_path / "a")
    with pytest.raises(TrainJobError, match="another run"):
        train(spec(table, tmp_path / "a", seed=1))
    (tmp_path / "mine").mkdir()
    with pytest.raises(TrainJobError, match="no trained router"):
        train(spec(table, tmp_path / "mine"))
    assert arrays(tmp_path / "a") == before


def test_an_unfinished_run_of_something_else_is_kept_unless_told(
    table: Path, tmp_path: Path, stepwise: type[StepwiseRouter]
) -> None:
    stepwise.kill_after = 5
    with pytest.raises(KilledError):
        train(spec(table, tmp_path / "a", router="stepwise"))
    with pytest.raises(TrainJobError, match=r"unfinished run.*--no-resume"):
        train(spec(table, tmp_path / "a", router="stepwise", seed=9))
    train(spec(table, tmp_path / "a", router="stepwise", seed=9), resume=False)
    assert Manifest.read(tmp_path / "a").seed == 9


def test_two_runs_do_not_share_a_folder(table: Path, tmp_path: Path, stepwise: type[StepwiseRouter]) -> None:
    def train_again(step: str, done: int, total: int) -> None:
        if (step, done) != ("fit", 7):
            return
        with pytest.raises(TrainJobError, match="another run is training"):
            train(spec(table, tmp_path / "a", router="stepwise"))

    train(spec(table, tmp_path / "a", router="stepwise"), on_progress=train_again)
    assert (tmp_path / "a").exists()


def test_a_run_is_named_by_what_decides_the_arrays(table: Path, tmp_path: Path) -> None:
    one = train(spec(table, tmp_path / "a"))
    other_table = small_table(tmp_path / "table2", seed=1)
    assert train(spec(table, tmp_path / "b")).run == one.run
    assert train(spec(table, tmp_path / "c", seed=1)).run != one.run
    assert train(spec(other_table, tmp_path / "d")).run != one.run


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"router": "crystal_ball"}, RouterConfigError, "no router is named 'crystal_ball'"),
        ({"config": {"depth": 3}}, RouterConfigError, "depth"),
        ({"observations": Path("/nowhere")}, ObservationError, "nowhere"),
        ({"trials": 3}, TrainJobError, "no options to search"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    table: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(spec(table, tmp_path / "a", **changes))
    assert not (tmp_path / "a").exists()


def test_a_table_without_enough_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainJobError, match="too few"):
        train(spec(small_table(tmp_path / "table", 2), tmp_path / "a"))


def test_a_broken_manifest_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(TrainJobError, match="is not a manifest"):
        Manifest.read(tmp_path)
