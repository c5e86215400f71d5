"""Demonstrations of Router-R1's protocol and the sheets that the policy learns them from."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from routers.strategies.router_r1.protocol import MAX_CALLS, NO_REPLY, parse
from training.pocket.fleet import FLEET, POLICY
from training.pocket.planner import UNSEEN, Fleet, demonstration
from training.pocket.policy import (
    RECIPE,
    draw_sheet,
    new_policy,
    policy_tokenizer,
    sheet_loss,
    train_policy,
    use_sheets,
)
from training.pocket.questions import split_of
from training.pocket.skills import SKILLS
from training.pocket.tokens import build_tokenizer


def test_demonstrations_keep_to_the_protocol_and_ask_whom_the_cards_name() -> None:
    rng = Random(1)
    asked = 0
    for _ in range(60):
        fleet = Fleet(rng)
        names = [card.name for card in fleet.cards]
        assert len(set(names)) == len(names)
        for _ in range(5):
            _, _, *rest = demonstration(rng, fleet)
            turns = [parse(message["content"], names) for message in rest[::2]]
            assert [turn.kind for turn in turns] == ["search"] * (len(turns) - 1) + ["answer"]
            assert len(turns) - 1 <= MAX_CALLS
            assert all(message["content"].startswith("<information>") for message in rest[1::2])
            asked += len(turns) - 1
    assert asked > 300


def test_who_is_asked_may_know_and_is_another_where_that_gave_no_reply() -> None:
    rng = Random(2)
    asked: set[str] = set()
    for _ in range(200):
        fleet = Fleet(rng)
        skills = {one.card.name: one.skill for one in fleet.listed}
        first, again = fleet.who("roman"), fleet.who("roman")
        able = [name for name, skill in skills.items() if skill in {"roman", "general"}]
        assert first in able
        assert fleet.who("roman", [first]) != first or len(able) == 1
        asked |= {skills[first], skills[again]}
        if fleet.invented:
            topics = [name for name, skill in skills.items() if skill not in {*SKILLS, "general"}]
            assert fleet.who(skills[topics[0]]) in topics
    assert asked == {"roman", "general"}


def test_the_unseen_specialist_is_in_no_demonstration() -> None:
    rng = Random(3)
    own = SKILLS[UNSEEN].description
    for _ in range(150):
        fleet = Fleet(rng)
        assert not any(card.name == f"pocket-{UNSEEN}" or card.description == own for card in fleet.cards)


def test_demonstrations_are_about_training_questions() -> None:
    rng = Random(4)
    fleet = Fleet(rng)
    for _ in range(200):
        messages = demonstration(rng, fleet)
        if NO_REPLY not in str(messages) and len(messages) == 7:  # two steps, none of which failed
            query = str(messages[1]["content"])
            if "What is the" in query:
                continue
            assert split_of(query) == "train"
            for message in messages[2:-1:2]:
                assert split_of(parse(str(message["content"]), [card.name for card in fleet.cards]).text) == "train"


def test_the_policy_reads_as_the_base_does_and_has_a_token_for_each_tag() -> None:
    base, own = build_tokenizer(), policy_tokenizer()
    text = "What is 47 + 38? Write 'tovika' backwards."
    assert own(text)["input_ids"] == base(text)["input_ids"]
    assert len(own("</information>", add_special_tokens=False)["input_ids"]) == 1
    assert own.decode(own("<think>a</think>")["input_ids"], skip_special_tokens=True) == "<think>a</think>"


def test_a_sheet_is_read_as_its_conversations_alone() -> None:
    model = new_policy(FLEET / "base", 0).eval()
    sheet = draw_sheet(policy_tokenizer(), Random(5))
    lengths = sheet.filled.sum(1).tolist()
    assert sheet.ids.shape[1] == sheet.prefix + sum(lengths)
    use_sheets(model)
    with torch.inference_mode():
        together = model.model(
            input_ids=sheet.ids, position_ids=sheet.positions, prefix=sheet.prefix, filled=sheet.filled, use_cache=False
        ).last_hidden_state
        model.set_attn_implementation("sdpa")
        for place in (0, 3):
            first = sheet.prefix + sum(lengths[:place])
            own = slice(first, first + lengths[place])
            alone = model.model(torch.cat([sheet.ids[:, : sheet.prefix], sheet.ids[:, own]], 1)).last_hidden_state
            torch.testing.assert_close(together[:, own], alone[:, sheet.prefix :], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_it_learns_from_demonstrations_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(FLEET / "base")
    recipe = replace(RECIPE, steps=6, examples=16, warmup=1, checkpoint_every=3)
    sheet = draw_sheet(policy_tokenizer(), Random("held out"))

    def loss_of(folder: Path) -> float:
        model = new_policy(FLEET / "base", 0)
        if (folder / POLICY).exists():
            model = type(model).from_pretrained(folder / POLICY, dtype=torch.float32)
        use_sheets(model)
        with torch.inference_mode():
            return float(sheet_loss(model, sheet) / sheet.spoken.sum())

    before = loss_of(tmp_path)
    train_policy(tmp_path, tmp_path / "work", recipe=recipe, stop_at=3)
    assert not (tmp_path / POLICY).exists()
    train_policy(tmp_path, tmp_path / "work", recipe=recipe)
    assert loss_of(tmp_path) < 0.8 * before
