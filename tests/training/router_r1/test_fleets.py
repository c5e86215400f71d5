"""Fleets that differ from question to question in training."""

from __future__ import annotations

from pathlib import Path

from tests.training.router_r1.by_heart import CARDS
from training.router_r1.environment import Environment
from training.router_r1.questions import pocket_questions
from training.router_r1.spec import RouterR1Spec
from training.router_r1.train import Run


def openings(folder: Path, *, vary: bool) -> list[str]:
    """What each question's fleet is described as."""
    spec = RouterR1Spec(policy="unused", out=folder / "out", vary=vary)
    environment = Environment(None)
    questions = pocket_questions(0, 30, 0, "train")
    rows = Run(spec, None, questions, CARDS, environment, folder).dataset()
    environment.close()
    return [row["prompt"][0]["content"] for row in rows]


def test_where_fleets_vary_experts_are_missing_or_have_other_names_and_keep_their_descriptions(tmp_path: Path) -> None:
    for text in openings(tmp_path, vary=False):
        assert all(card.name in text and card.description in text for card in CARDS)
    varied = openings(tmp_path, vary=True)
    for card in CARDS:
        described = [text for text in varied if card.description in text]
        assert 0 < len(described) < len(varied)
        assert any(card.name not in text for text in described)
        assert any(card.name in text for text in described)
    assert openings(tmp_path, vary=True) == varied
