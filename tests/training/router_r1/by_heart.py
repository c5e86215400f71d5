"""A tiny policy that learns a few conversations by heart, and the replies that they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from experts.fleet import POCKET_FLEET, load_fleet
from routers.strategies.router_r1.protocol import Message, opening
from training.pocket.grading import sample
from training.pocket.policy import policy_tokenizer
from training.pocket.questions import Question
from training.router_r1.rollout import Frame


def questions() -> list[Question]:
    """Those of a run with two one-skill and two two-skill questions and seed 0."""
    return [*sample(0, 2, "one", "train"), *sample(0, 2, "two", "train")]


SKILLS = {skill for question in questions() for skill in question.skills}
CARDS = sorted(
    (card for card in load_fleet(POCKET_FLEET).cards if card.name.removeprefix("pocket-") in SKILLS),
    key=lambda card: card.name,
)
"""Of the experts that the questions need, by name."""


def conversation(question: Question) -> list[Message]:
    """How the question should be answered."""
    messages = opening(CARDS, question.query)
    for step in question.steps:
        said = f"<think>for {step.skill}</think><search> pocket-{step.skill}:{step.query} </search>"
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": f"<information>{step.answer}</information>"})
    said = f"<think>done</think><answer>{question.answer}</answer>"
    return [*messages, {"role": "assistant", "content": said}]


def save_policy(folder: Path) -> Path:
    """The tiny policy, in `folder`."""
    torch.manual_seed(0)
    tokenizer = policy_tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    frame = Frame(tokenizer)
    rows = [_tokens(frame, tokenizer, conversation(question)) for question in questions()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        for ids, own in rows:
            logits = model(ids[None]).logits[0, :-1]
            loss = functional.cross_entropy(logits[own[1:]], ids[1:][own[1:]])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokens(frame: Frame, tokenizer: object, messages: Sequence[Message]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of a conversation and which are the policy's own."""
    ids = frame.prompt(messages[:2])
    own = [False] * len(ids)
    for message in messages[2:]:
        if message["role"] == "assistant":
            tokens = tokenizer(message["content"], add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        else:
            tokens = frame.reply(message["content"])
        own += [message["role"] == "assistant"] * len(tokens)
        ids += tokens
    return torch.tensor(ids), torch.tensor(own)
