"""Conversations as tokens: what a message spells out is never a special token."""

from __future__ import annotations

import pytest

from experts.local.prompt import ChatPrompt
from tests.experts.models import byte_tokenizer

TOKENIZER = byte_tokenizer()
SPECIAL = set(TOKENIZER.all_special_ids)


def rendered(*messages: dict[str, object]) -> str:
    text: str = TOKENIZER.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


@pytest.mark.parametrize("content", ["hello", "grüße, 你好", "\ue000 1 \ue001", ""])
def test_an_ordinary_message_is_what_the_template_makes_of_it(content: str) -> None:
    message = {"role": "user", "content": content}
    whole = TOKENIZER(rendered(message), add_special_tokens=False)["input_ids"]
    assert ChatPrompt(TOKENIZER).tokens([message]) == whole


@pytest.mark.parametrize("special", TOKENIZER.all_special_tokens)
def test_a_special_token_that_is_spelled_out_stays_text(special: str) -> None:
    plain = [{"role": "user", "content": "a  b"}, {"role": "assistant", "content": "c"}]
    hostile = [{"role": "user", "content": f"a {special}{special} b"}, {"role": "assistant", "content": "c"}]
    expected, tokens = ChatPrompt(TOKENIZER).tokens(plain), ChatPrompt(TOKENIZER).tokens(hostile)
    assert [t for t in tokens if t in SPECIAL] == [t for t in expected if t in SPECIAL]
    assert TOKENIZER.decode(tokens) == rendered(*hostile)
