"""The gates' comparison: how learning rates are chosen."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.mixing.compare import RATES, chosen, right_token_by_token
from training.pocket.fleet import FLEET
from training.pocket.generate import respond
from training.pocket.grading import is_right, sample
from training.pocket.tokens import build_tokenizer


def test_the_best_rate_is_chosen_and_the_smaller_of_equals() -> None:
    validation = {"lora": {"0.0002": 0.5, "0.0005": 0.7, "0.002": 0.7}, "phatgoose": {"0.002": 0.1}}
    assert chosen(validation) == {"lora": 5e-4, "phatgoose": 2e-3, "glider": 2e-3}
    assert {float(f"{rate:g}") for rate in RATES} == set(RATES)


@pytest.mark.slow
def test_validation_counts_what_generation_gets_right() -> None:
    model = AutoModelForCausalLM.from_pretrained(FLEET / "base", dtype=torch.float32).eval()
    questions = list(sample(0, 24, "one", "observed"))
    answers = respond(model, build_tokenizer(), [q.query for q in questions])
    right = [is_right(q.skills, q.answer, a.text) for q, a in zip(questions, answers, strict=True)]
    assert 0 < sum(right) < len(right)
    assert right_token_by_token(model, questions) == sum(right) / len(right)
