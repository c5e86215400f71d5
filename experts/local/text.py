"""From tokens to text as they come, and stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no (or not yet a whole) character
_MAX_PENDING = 32


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens."""
        ...


class Detokenizer:
    """Text for each next token; nothing while a character's bytes are incomplete.

    A token's text depends on those before it (leading spaces, bytes of one character), so a short window is decoded
    together: tokens up to `_read` have been written, those since `_start` are decoded again as context. `context` are
    tokens before the first one, as when a text is continued.
    """

    def __init__(self, decoder: Decoder, context: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._tokens = list(context)
        self._start = 0
        self._read = len(self._tokens)
        self._known = self._decode(self._tokens)

    def push(self, token: int) -> str:
        """The text that is complete with `token`."""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._start :])
        pending = len(self._tokens) - self._read
        if text.endswith(_REPLACEMENT) and pending < _MAX_PENDING:
            return ""
        return self._advance(text)

    def hold(self, token: int) -> None:
        """Take a token whose text `finish` gives."""
        self._tokens.append(token)

    def finish(self) -> str:
        """The text of tokens that were held, or whose last character never was completed."""
        return self._advance(self._decode(self._tokens[self._start :]))

    def _advance(self, text: str) -> str:
        new = text[len(self._known) :]
        self._start, self._read = self._read, len(self._tokens)
        self._known = self._decode(self._tokens[self._start :])
        return new

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=True) if tokens else ""


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to come before any stop string."""
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        certain = len(text) - self._uncertain(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _uncertain(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
