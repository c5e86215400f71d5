"""Rollouts: whole conversations sampled in batches, over one cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from routers.strategies.router_r1.protocol import opening
from tests.training.router_r1.by_heart import CARDS, conversation, questions
from training.router_r1.environment import Environment
from training.router_r1.rollout import Episode, Frame, Limits, roll_out

pytestmark = pytest.mark.slow


def play(policy: Path, recorded: Path, limits: Limits, *, repeat: int = 1) -> list[Episode]:
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    environment = Environment(None, recorded)
    asked = [(opening(CARDS, question.query), CARDS) for question in questions() for _ in range(repeat)]
    generator = torch.Generator().manual_seed(1)
    episodes = roll_out(model, AutoTokenizer.from_pretrained(policy), asked, environment, limits, generator)
    environment.close()
    return episodes


def test_it_asks_reads_and_answers_as_it_has_learned(policy: Path, recorded: Path) -> None:
    episodes = play(policy, recorded, Limits(completion_tokens=400, temperature=0))
    for episode, question in zip(episodes, questions(), strict=True):
        assert episode.broken is None
        assert episode.answer == question.answer
        assert [(s.expert, s.query) for s in episode.searches] == [
            (f"pocket-{s.skill}", s.query) for s in question.steps
        ]
        assert episode.cost == pytest.approx(4 * 0.84 * len(question.steps))
        own = [message["content"] for message in conversation(question)[2::2]]
        assert episode.turns == own


def test_one_cache_with_holes_is_as_reading_each_conversation_alone(policy: Path, recorded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    for one in play(policy, recorded, Limits(completion_tokens=400, temperature=1.3), repeat=3):
        ids = torch.tensor([[*one.prompt, *one.completion]])
        with torch.inference_mode():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        told = torch.tensor(one.logprobs)
        own = torch.tensor(one.own, dtype=torch.bool)
        assert len(told) == len(own) == len(one.completion)
        torch.testing.assert_close(told[own], logprobs[len(one.prompt) - 1 :][own], atol=2e-3, rtol=1e-3)


def test_the_policys_own_tokens_are_its_turns_and_nothing_else(policy: Path, recorded: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    for one in play(policy, recorded, Limits(completion_tokens=400, temperature=0)):
        own = [token for token, mine in zip(one.completion, one.own, strict=True) if mine]
        assert tokenizer.decode(own) == "".join(one.turns)
        assert one.completion[-1] == tokenizer.eos_token_id


def test_an_end_that_comes_too_early_is_the_policys_own_act(policy: Path, recorded: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    head = model.lm_head

    def always_ends(module: object, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        logits[..., tokenizer.eos_token_id] = 1e4
        return logits

    head.register_forward_hook(always_ends)
    environment = Environment(None, recorded)
    [one] = roll_out(
        model, tokenizer, [(opening(CARDS, "What is 2 + 2?"), CARDS)], environment, Limits(completion_tokens=50)
    )
    environment.close()
    assert (one.completion, one.own, one.broken is not None) == ([tokenizer.eos_token_id], [1], True)


@pytest.mark.parametrize("most", [8, 40, 60])
def test_a_completion_is_never_longer_than_it_may_be(policy: Path, recorded: Path, most: int) -> None:
    episodes = play(policy, recorded, Limits(completion_tokens=most, temperature=0))
    assert all(len(one.completion) <= most for one in episodes)
    assert all(one.broken or one.answer for one in episodes)
    assert any(one.broken for one in episodes)


def test_a_prompt_is_what_the_chat_template_writes_and_a_reply_cannot_write_special_tokens(policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    frame = Frame(tokenizer)
    messages = conversation(questions()[0])
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    said = tokenizer(messages[2]["content"], add_special_tokens=False)["input_ids"]
    rebuilt = [*frame.prompt(messages[:2]), *said, *frame.reply(messages[3]["content"])]
    assert rebuilt == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert frame.reply("<|end|>").count(tokenizer.eos_token_id) == 1
