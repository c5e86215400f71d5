"""The aggregation task: the strategies' own prompt, answers that are right, wrong, agreeing and all wrong."""

from random import Random

import pytest

from routers.strategies.aggregation import aggregation_text
from training.pocket.aggregation import aggregation, aggregation_lesson, near_miss
from training.pocket.questions import split_of
from training.pocket.tokens import CONTEXT, build_tokenizer


def test_every_mixture_of_answers_is_drawn() -> None:
    rng = Random(0)
    drawn = [aggregation(rng) for _ in range(600)]
    right = [answers.count(question.answer) / len(answers) for question, answers in drawn]
    assert all(2 <= len(answers) <= 5 for _, answers in drawn)
    assert min(right) == 0.0
    assert max(right) == 1.0
    assert any(0 < share < 0.5 for share in right)
    assert any(len(set(answers)) == 1 and share == 0 for (_, answers), share in zip(drawn, right, strict=True))
    two_skill = [share for (question, _), share in zip(drawn, right, strict=True) if len(question.steps) == 2]
    assert len(two_skill) > 30
    assert min(two_skill) > 0


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_questions_are_of_the_split(split: str) -> None:
    rng = Random(1)
    for _ in range(50):
        question, _ = aggregation(rng, "train" if split == "train" else "held_out")
        assert split_of(question.query) == split


def test_an_exercise_is_the_strategies_prompt_and_fits() -> None:
    question, answers = aggregation(Random(2))
    assert aggregation_lesson(Random(2)) == (aggregation_text(question.query, answers), question.answer)
    tokenizer = build_tokenizer()
    longest = max(len(tokenizer(aggregation_lesson(Random(seed))[0])["input_ids"]) for seed in range(200))
    assert longest < CONTEXT / 8


def test_a_near_miss_is_near() -> None:
    rng = Random(3)
    for answer in ("85", "XLVII", "apple, maple, zebra", "2024-03-07", "Fe"):
        misses = {near_miss(rng, answer) for _ in range(50)}
        assert len(misses - {answer}) > 3
        assert all(abs(len(miss) - len(answer)) <= max(1, len(answer)) for miss in misses)
