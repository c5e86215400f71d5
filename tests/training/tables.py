"""Small tables of observations, made by a rule that routers can learn: one expert is good at sums, another at words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from experts.cards import ExpertCard
from routers.contracts import Observation
from training.observations import ObservedQuery, write_table

CARDS = [
    ExpertCard(name="words", description="Answers questions about words.", input_price=0.1, output_price=0.4),
    ExpertCard(name="sums", description="Answers sums.", input_price=1.0, output_price=4.0),
]


def rows(count: int, *, seed: int = 0) -> Iterator[ObservedQuery]:
    """`count` rows, every fifth of them for test."""
    draw = random.Random(seed)
    for i in range(count):
        task = draw.choice(["sums", "words"])
        text = f"What is {draw.randrange(999)} plus {draw.randrange(999)}?"
        if task == "words":
            text = "Spell backwards: " + "".join(draw.choices("abcdefghijklmnop", k=8))
        experts = [_observed(f"q{i}", card, task) for card in CARDS]
        yield ObservedQuery(id=f"q{i}", query=text, task=task, split="train" if i % 5 else "test", experts=experts)


def _observed(query_id: str, card: ExpertCard, task: str) -> Observation:
    return Observation(
        query_id=query_id,
        expert=card.name,
        quality=float(card.name == task),
        cost_usd=1e-3 if card.name == "sums" else 1e-4,
        input_tokens=20,
        output_tokens=10,
        latency_s=0.2,
    )


def small_table(folder: Path, count: int = 200, *, seed: int = 0) -> Path:
    """Writes such a table into `folder`, and returns it."""
    write_table(folder, CARDS, rows(count, seed=seed), format="jsonl")
    return folder
