"""The policy that ships with the fleet does on fresh questions what docs/router_r1.md says, as it is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from experts.fleet import POCKET_FLEET
from routers.strategies.router_r1.strategy import RouterR1Options
from training.pocket.fleet import FLEET, POLICY
from training.router_r1.measure import play
from training.router_r1.questions import pocket_questions
from training.router_r1.spec import RouterR1Spec
from training.router_r1.train import fleet_cards, limits_of, load_policy, make_environment, outcome_of

SHIPPED = POCKET_FLEET.parents[1] / "policies" / "router_r1.yaml"
EACH = 60


def spec(folder: Path) -> RouterR1Spec:
    """The shipped policy with the bounds of training."""
    return RouterR1Spec(policy=str(FLEET / POLICY), out=folder / "unused")


def test_it_is_served_within_the_bounds_that_it_was_trained_in(tmp_path: Path) -> None:
    options = RouterR1Options(**yaml.safe_load(SHIPPED.read_text())["strategy"]["options"])
    trained = spec(tmp_path)
    assert (options.turn_tokens, options.reply_tokens, options.reply_chars, options.max_calls) == (
        trained.turn_tokens, trained.reply_tokens, trained.reply_chars, trained.max_calls,
    )  # fmt: skip


@pytest.mark.slow
def test_it_answers_two_skill_questions_and_asks_no_more_than_it_must(tmp_path: Path) -> None:
    asked = pocket_questions(20261, EACH, EACH, "held_out")
    shipped = spec(tmp_path)
    model, tokenizer = load_policy(shipped)
    environment = make_environment(shipped)
    try:
        limits = replace(limits_of(shipped), temperature=0.0)
        episodes = play(model.eval(), tokenizer, asked, fleet_cards(shipped), environment, limits)
    finally:
        environment.close()
    outcomes = [outcome_of(one, question) for one, question in zip(episodes, asked, strict=True)]
    one, two = outcomes[:EACH], outcomes[EACH:]
    assert fmean(outcome.quality for outcome in one) >= 0.85
    assert fmean(outcome.quality for outcome in two) >= 0.85
    assert fmean(len(episode.searches) for episode in episodes[:EACH]) <= 1.2
    assert sum(outcome.broken is not None for outcome in outcomes) <= 1
