"""OpenAI's shapes: the whole answer, or its chunks, for chats and for completions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from experts.expert import ExpertRequest, Usage
from experts.local.row import Logprob, Piece
from experts.local.sampling import TokenLogprob
from experts.local.text import Decoder
from experts.mixing.load import GateLoad


class Replies:
    """Writes the JSON of one request's replies, each with the request's id, the time it began and the expert's name."""

    def __init__(self, request: ExpertRequest, model: str, decoder: Decoder, *, show_usage: bool) -> None:
        self._chat = request.endpoint == "chat/completions"
        self._head = {"id": request.id, "object": "", "created": int(time.time()), "model": model}
        self._decoder = decoder
        self._show_usage = show_usage
        self._begun: set[int] = set()

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage, load: GateLoad | None = None) -> bytes:
        """The answer, from the pieces of each choice; `load` is what it says of its gate."""
        kind = "chat.completion" if self._chat else "text_completion"
        whole = [self._whole_choice(pieces) for pieces in choices]
        return orjson.dumps(
            {**self._head, "object": kind, "choices": whole, "usage": _usage(usage), **_gate_load(load)}
        )

    def chunks(self, piece: Piece) -> list[bytes]:
        """The chunks for one piece. A chat's choice begins with its role and ends with a chunk without text."""
        logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
        if not self._chat:
            body = {"text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
            return [self._chunk([{"index": piece.choice, **body}])]
        chunks = []
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            chunks.append(self._chat_chunk(piece.choice, {"role": "assistant", "content": ""}))
        if piece.text or logprobs:
            chunks.append(self._chat_chunk(piece.choice, {"content": piece.text}, logprobs))
        if piece.finish_reason:
            chunks.append(self._chat_chunk(piece.choice, {}, finish_reason=piece.finish_reason))
        return chunks

    def last_chunk(self, usage: Usage, load: GateLoad | None = None) -> bytes:
        """The chunk that ends a stream for those who asked for usage, or for the load of a gate; else nothing."""
        if not self._show_usage and load is None:
            return b""
        return self._chunk([], _usage(usage), **_gate_load(load))

    def _chat_chunk(
        self, choice: int, delta: dict[str, Any], logprobs: object = None, finish_reason: str | None = None
    ) -> bytes:
        return self._chunk([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}])

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None, **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        shown = {"usage": usage} if self._show_usage else {}
        return orjson.dumps({**self._head, "object": kind, "choices": choices, **shown, **more})

    def _whole_choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [one for piece in pieces for one in piece.logprobs]
        logprobs = self._logprobs(tokens) if tokens else None
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        last = pieces[-1]
        return {"index": last.choice, **body, "logprobs": logprobs, "finish_reason": last.finish_reason}

    def _logprobs(self, tokens: Iterable[Logprob]) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        tokens = list(tokens)
        return {
            "tokens": [self._text(one.chosen) for one in tokens],
            "token_logprobs": [one.chosen.logprob for one in tokens],
            "top_logprobs": [{self._text(top): top.logprob for top in one.top} for one in tokens],
            "text_offset": [one.offset for one in tokens],
        }

    def _chat_logprob(self, one: Logprob) -> dict[str, Any]:
        return {**self._token(one.chosen), "top_logprobs": [self._token(top) for top in one.top]}

    def _token(self, one: TokenLogprob) -> dict[str, Any]:
        """A token as OpenAI shows it; `bytes` is null for a part of a character, which has no text of its own."""
        text = self._text(one)
        return {"token": text, "logprob": one.logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, one: TokenLogprob) -> str:
        return self._decoder.decode([one.token], skip_special_tokens=False)


def _gate_load(load: GateLoad | None) -> dict[str, Any]:
    return {} if load is None else {"gate_load": {"tokens": load.tokens, "layers": load.shares()}}


def _usage(usage: Usage) -> dict[str, int]:
    total = usage.input_tokens + usage.output_tokens
    return {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens, "total_tokens": total}
