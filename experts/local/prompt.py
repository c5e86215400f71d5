"""A conversation as tokens: the chat template writes special tokens, what somebody said in it never does."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class ChatPrompt:
    """Conversations in a tokenizer's chat template, as tokens.

    A special token that is spelled out inside a message is read as the text that it is: otherwise a message could end
    its own turn and speak as somebody else.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of `messages`, up to where the answer begins. Raises what the template raises."""
        nonce = secrets.token_hex(8)
        spelled: list[str] = []

        def take_out(match: re.Match[str]) -> str:
            spelled.append(match.group())
            return f"\ue000{nonce}:{len(spelled) - 1}\ue001"  # stands in for it while the template runs

        cleaned = [_map_texts(message, lambda text: self._special.sub(take_out, text)) for message in messages]
        text = self._tokenizer.apply_chat_template(cleaned, tokenize=False, add_generation_prompt=True)
        template, *rest = re.split(f"\ue000{nonce}:(\\d+)\ue001", text)
        tokens = self._tokens(template)
        for index, template in zip(rest[::2], rest[1::2], strict=True):
            tokens += self._tokens(spelled[int(index)], split_special_tokens=True) + self._tokens(template)
        return tokens

    def _tokens(self, text: str, **options: bool) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return tokens


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, as it came from JSON, with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_map_texts(one, change) for one in value]
    return value
