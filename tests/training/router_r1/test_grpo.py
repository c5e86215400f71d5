"""Training for real, a few steps of it: GRPO through TRL, checkpoints, curves, samples, the command."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from experts.fleet import POCKET_FLEET
from tests.experts.models import save_model
from training.errors import TrainJobError
from training.router_r1.measure import measure_policy
from training.router_r1.questions import table_questions
from training.router_r1.spec import RouterR1Spec, TableSource, read_spec
from training.router_r1.train import CURVES, SAMPLES_FILE, grpo_config, train_policy
from training.work_folder import read_report

CONFIGS = POCKET_FLEET.parent.parent / "router_r1"


@pytest.fixture
def spec(policy: Path, fleet: Path, recorded: Path, tmp_path: Path) -> RouterR1Spec:
    return RouterR1Spec.model_validate(
        {
            "policy": str(policy),
            "out": tmp_path / "trained",
            "fleet": fleet,
            "questions": {"one": 2, "two": 2},
            "environment": "replay",
            "recorded": recorded,
            "shuffle": False,
            "steps": 2,
            "questions_per_step": 2,
            "rollouts": 6,
            "micro_batch": 4,
            "temperature": 1.0,
            "learning_rate": 1e-3,
            "warmup": 0,
            "checkpoint_every": 1,
            "log_samples_every": 1,
        }
    )


@pytest.mark.slow
def test_a_run_trains_saves_and_shows_its_curves(spec: RouterR1Spec) -> None:
    report = train_policy(spec)
    assert [line["step"] for line in report["curves"]] == [1, 2]
    assert all(set(line) >= {"reward", "right", "calls", "cost", "broken"} for line in report["curves"])
    assert any(line["calls"] > 0 for line in report["curves"])
    assert read_report(spec.out) == json.loads(json.dumps(report))
    before = load_file(Path(spec.policy) / "model.safetensors")
    after = load_file(spec.out / "model.safetensors")
    assert any(not torch.equal(before[name].bfloat16(), weight) for name, weight in after.items())
    assert list((spec.out / CURVES).glob("*tfevents*"))
    samples = [json.loads(line) for line in (spec.out / SAMPLES_FILE).read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 1}
    assert all(sample["turns"] for sample in samples)
    assert not spec.out.with_name("trained.part").exists()
    with pytest.raises(TrainJobError, match="is there already"):
        train_policy(spec)
    measured = measure_policy(spec.model_copy(update={"policy": str(spec.out)}))
    assert measured["kinds"]["one"]["questions"] == measured["kinds"]["two"]["questions"] == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(spec: RouterR1Spec, tmp_path: Path) -> None:
    whole = spec.model_copy(update={"out": tmp_path / "whole"})
    train_policy(whole)

    def kill(_: str, done: int, __: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_policy(spec, on_progress=kill)
    report = train_policy(spec)
    assert report["curves"] == read_report(whole.out)["curves"]
    for name, weight in load_file(whole.out / "model.safetensors").items():
        assert torch.equal(weight, load_file(spec.out / "model.safetensors")[name]), name


@pytest.mark.slow
def test_the_config_of_the_paper_runs_dry_on_a_tiny_model_of_its_architecture(tmp_path: Path) -> None:
    model = save_model(tmp_path / "qwen", "qwen2", spread=0.02)
    rows = [{"id": n, "Question": f"who wrote book {n}", "answer": ["somebody"]} for n in (0, 1, 349, 350)]
    table = tmp_path / "nq.json.gz"
    table.write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "none.jsonl").touch()
    content: dict[str, Any] = yaml.safe_load((CONFIGS / "qwen2.5-3b.yaml").read_text())
    small = {
        "policy": str(model),
        "out": str(tmp_path / "out"),
        "fleet": str(CONFIGS / content["fleet"]),
        "questions": {**content["questions"], "tables": [str(table)]},
        "environment": "replay",
        "recorded": str(tmp_path / "none.jsonl"),
        "steps": 1,
        "questions_per_step": 1,
        "rollouts": 2,
        "micro_batch": 2,
        "turn_tokens": 16,
        "completion_tokens": 64,
        "dtype": "float32",
        "device": "cpu",
    }
    (tmp_path / "dry.yaml").write_text(yaml.safe_dump(content | small))
    report = train_policy(read_spec(tmp_path / "dry.yaml"))
    assert report["curves"][0]["broken"] == 1  # random weights keep to no protocol
    assert report["curves"][0]["reward"] == -1
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["pocket", "qwen2.5-3b"])
def test_the_shipped_configs_are_valid(name: str) -> None:
    spec = read_spec(CONFIGS / f"{name}.yaml")
    assert spec.fleet.exists()
    assert grpo_config(spec, Path("x"), on_cpu=True).max_steps == spec.steps
    if isinstance(spec.questions, TableSource):
        assert [table.name for table in spec.questions.tables] == ["nq.json.gz", "hotpotqa.json.gz"]


def test_questions_numbered_below_350_are_for_training_and_the_others_for_tests(tmp_path: Path) -> None:
    rows = [{"id": n, "Question": f"q{n}", "answer": ["The Answer.", "other"]} for n in range(345, 355)]
    table = tmp_path / "nq.json.gz"
    table.write_bytes(gzip.compress(json.dumps(rows).encode()))
    train, test = (table_questions(table, "exact", train=train) for train in (True, False))
    assert [asked.id for asked in train] == [f"nq-{n}" for n in range(345, 350)]
    assert [asked.id for asked in test] == [f"nq-{n}" for n in range(350, 355)]
    assert train[0].grade("answer") == 1
    assert train[0].grade("an answer or two") == 0
    assert 0 < table_questions(table, "f1", train=True)[0].grade("answer or two") < 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"out": "x"}, "policy"),
        ({"policy": "p", "out": "x", "environment": "replay"}, "needs `recorded`"),
        ({"policy": "p", "out": "x", "micro_batch": 7}, "must divide"),
        ({"policy": "p", "out": "x", "cost_weight": 2}, "cost_weight"),
        ({"policy": "p", "out": "x", "nonsense": 2}, "nonsense"),
        (["policy"], "must hold a mapping"),
    ],
)
def test_a_config_that_will_not_do_says_why(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(TrainJobError, match=message):
        read_spec(path)


def test_a_fleet_that_lacks_an_expert_left_out_and_a_policy_that_is_not_there_are_errors(spec: RouterR1Spec) -> None:
    with pytest.raises(TrainJobError, match="no expert 'nobody'"):
        train_policy(spec.model_copy(update={"without": ("nobody",)}))
    with pytest.raises(TrainJobError, match="cannot be loaded"):
        train_policy(spec.model_copy(update={"policy": "./nowhere"}))
