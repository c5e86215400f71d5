"""The gates' comparison: how learning rates are chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.errors import TrainJobError
from training.mixing.compare import RATES, Comparison, chosen, right_token_by_token, run
from training.pocket.fleet import FLEET
from training.pocket.generate import respond
from training.pocket.grading import is_right, sample
from training.pocket.tokens import build_tokenizer
from training.work_folder import REPORT_FILE


def test_the_best_rate_is_chosen_and_the_smaller_of_equals() -> None:
    validation = {"lora": {"0.0002": 0.5, "0.0005": 0.7, "0.002": 0.7}, "phatgoose": {"0.002": 0.1}}
    assert chosen(validation) == {"lora": 5e-4, "phatgoose": 2e-3, "glider": 2e-3}
    assert {float(f"{rate:g}") for rate in RATES} == set(RATES)


def test_gliders_rate_is_that_of_phatgoose_chosen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparison, "validated", lambda self, method, rate: rate if method == "phatgoose" else 1 / 0)
    monkeypatch.setattr(Comparison, "run", lambda self, method, rate: {"accuracy": 0.5, "learning_rate": rate})
    results = run(1, tmp_path / "results.json", tmp_path / "work", ["glider"])
    assert results["accuracy"]["glider"]["learning_rate"] == max(RATES)


def test_what_was_kept_of_another_comparison_is_refused(tmp_path: Path) -> None:
    comparison = Comparison(0, tmp_path)
    spec = comparison.spec("phatgoose", 1e-3)
    spec.out.mkdir()
    (spec.out / REPORT_FILE).write_text(json.dumps({"spec": {**spec.model_dump(mode="json"), "batch": 1}}))
    with pytest.raises(TrainJobError, match="trained by another configuration"):
        comparison.learn("phatgoose", spec)
    assert Comparison(0, tmp_path).data.read_text() == comparison.data.read_text()
    comparison.data.write_text("{}\n")
    with pytest.raises(TrainJobError, match="holds other questions"):
        Comparison(0, tmp_path)


@pytest.mark.slow
def test_validation_counts_what_generation_gets_right() -> None:
    model = AutoModelForCausalLM.from_pretrained(FLEET / "base", dtype=torch.float32).eval()
    questions = list(sample(0, 24, "one", "observed"))
    answers = respond(model, build_tokenizer(), [q.query for q in questions])
    right = [is_right(q.skills, q.answer, a.text) for q, a in zip(questions, answers, strict=True)]
    assert 0 < sum(right) < len(right)
    assert right_token_by_token(model, questions) == sum(right) / len(right)
