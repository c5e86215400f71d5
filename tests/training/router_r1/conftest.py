"""A policy that has learned its conversations by heart, and a fleet and replies for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.training.router_r1.by_heart import CARDS, questions, save_policy


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny policy."""
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet file with the cards; nobody is behind them."""
    remote = {"base_url": "http://127.0.0.1:9/v1", "model": "none"}
    entries = [
        {"name": card.name, "description": card.description, "output_price": card.output_price, "remote": remote}
        for card in CARDS
    ]
    path = tmp_path_factory.mktemp("fleet") / "fleet.yaml"
    path.write_text(yaml.safe_dump({"experts": entries}))
    return path


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the replies to the conversations' searches."""
    path = tmp_path_factory.mktemp("replies") / "recorded.jsonl"
    lines = [
        {"expert": f"pocket-{step.skill}", "query": step.query, "text": step.answer}
        | {"input_tokens": 9, "output_tokens": 4}
        for question in questions()
        for step in question.steps
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
