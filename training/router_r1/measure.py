"""What a policy does with questions that it was not trained on: share right, calls, cost, broken format.

Greedy, as it is served. Intervals are of the bootstrap over the questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experts.cards import ExpertCard
from routers.strategies.router_r1.protocol import opening
from training.metrics import Floats, bootstrap, weighted_mean
from training.router_r1.environment import Replies
from training.router_r1.questions import Asked
from training.router_r1.rollout import Episode, Limits, roll_out
from training.router_r1.spec import RouterR1Spec
from training.router_r1.train import (
    described,
    fleet_cards,
    limits_of,
    load_policy,
    make_environment,
    outcome_of,
    read_questions,
)

_BATCH = 64
Json = dict[str, Any]


def play(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Asked],
    cards: Sequence[ExpertCard],
    environment: Replies,
    limits: Limits,
    *,
    instructions: str = "",
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Episode]:
    """One conversation about each question, in their order, with the same cards."""
    cards = sorted(cards, key=lambda card: card.name)  # as the strategy lists them
    episodes: list[Episode] = []
    for start in range(0, len(questions), _BATCH):
        part = questions[start : start + _BATCH]
        conversations = [(opening(cards, question.text, instructions), cards) for question in part]
        episodes += roll_out(model, tokenizer, conversations, environment, limits)
        on_progress(len(episodes), len(questions))
    return episodes


def figures(episodes: Sequence[Episode], questions: Sequence[Asked], *, resamples: int = 1000) -> dict[str, Json]:
    """By kind of question: how many, share right, calls, USD for the calls of a thousand questions, broken."""
    measured: dict[str, Json] = {}
    for kind in dict.fromkeys(question.kind for question in questions):
        rows = [(one, question) for one, question in zip(episodes, questions, strict=True) if question.kind == kind]
        outcomes = [outcome_of(one, question) for one, question in rows]
        draws = bootstrap(len(rows), resamples=resamples)
        columns = {
            "right": [outcome.quality for outcome in outcomes],
            "calls": [float(len(one.searches)) for one, _ in rows],
            "usd_per_1k": [1e3 * one.usd for one, _ in rows],
            "broken": [float(outcome.broken is not None) for outcome in outcomes],
        }
        measured[kind] = {
            "questions": len(rows),
            **{name: interval(weighted_mean(np.asarray(values), draws)) for name, values in columns.items()},
        }
    return measured


def interval(draws: Floats) -> Json:
    """The value itself, which is the first draw, with a 95% interval."""
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return {"value": round(float(draws[0]), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def measure_policy(spec: RouterR1Spec, episodes_file: Path | None = None) -> Json:
    """The figures of the spec's policy on its questions for tests; every conversation goes to `episodes_file`."""
    questions, cards = read_questions(spec, train=False), fleet_cards(spec)
    model, tokenizer = load_policy(spec)
    environment = make_environment(spec)
    limits = replace(limits_of(spec), temperature=0.0)
    try:
        episodes = play(model.eval(), tokenizer, questions, cards, environment, limits, instructions=spec.instructions)
    finally:
        environment.close()
    if episodes_file:
        lines = [
            json.dumps({"question": question.text, "kind": question.kind, **described(one)}) + "\n"
            for one, question in zip(episodes, questions, strict=True)
        ]
        episodes_file.write_text("".join(lines), encoding="utf-8")
    return {"policy": spec.policy, "seed": spec.seed, "experts": len(cards), "kinds": figures(episodes, questions)}
