"""What one request may cost at most, whatever its experts do.

One rule holds for what is read and for what is written: a token a byte, for no tokenizer makes more, until the expert
has said what it used. Before a call begins the most that it can cost is set aside: every byte of its body, and of
output `BYTES_PER_TOKEN` bytes for each token that it is allowed, which is what its body allows or what the rest of the
ceiling pays for; the body then says so to the expert. So an expert that keeps to its bound has room for all of it. One
that writes longer tokens is given more as long as there is any, one that writes on is cut off where it would not be.

A call is charged what its expert says that it used, but no more than was set aside. Where it never said, because it was
cut off or came too late, all that was set aside counts as spent, for so much may have been billed. What a call did not
use is free for the next. So calls that run beside each other cannot exceed the ceiling together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from experts.cards import ExpertCard
from experts.errors import ExpertRequestError, ExpertUnavailableError
from experts.expert import ExpertRequest, Usage

BYTES_PER_TOKEN = 4
"""How many bytes of output are set aside for a token that a call may write: what tokens have on the mean, or more."""
ASSUMED_OUTPUT = 1024
"""Output tokens of a call whose body names no bound."""

_FRAME_BYTES = 32  # of output beside the answer's words: pieces that say a role, an end, a usage
_TEMPLATE_TOKENS = 256  # what a chat template may add: a default system prompt, a date, the turn to answer
_TEMPLATE_TOKENS_PER_MESSAGE = 16
_TOKENS_PER_PICTURE = 50_000  # the dearest way of counting one that is known is GPT-4o mini's: 48,169 tokens
_PICTURES = frozenset({"image_url", "image", "input_image"})
_WORDS = frozenset({"text", "input_text", "output_text", "refusal"})
_BOUNDS = ("max_completion_tokens", "max_tokens")

# What the wire format has in a chunk, and in each of its choices, beside the answer itself.
_ENVELOPE = frozenset(
    {"id", "object", "created", "model", "system_fingerprint", "service_tier", "usage", "obfuscation", "provider"}
    | {"prompt_filter_results"}
)
_FRAME = frozenset({"index", "logprobs", "content_filter_results", "content_filter_offsets"})
_NAMES = frozenset(
    {"delta", "message", "text", "content", "refusal", "reasoning", "reasoning_content", "role", "type", "id"}
    | {"tool_calls", "function_call", "function", "name", "arguments", "index", "finish_reason"}
)
_WRITER = {"role": "assistant"}  # some say it in every piece


@dataclass(slots=True)
class Grant:
    """What one call may use: `usd` in all, and `output_bytes`, of which its pieces have taken `used` so far."""

    usd: float
    output_bytes: int
    used: int = 0


class CostCeiling:
    """The ceiling of one request, in USD, and what is set aside of it for calls under way."""

    def __init__(self, usd: float) -> None:
        self._usd = usd
        self._spent = 0.0
        self._set_aside = 0.0

    @property
    def left(self) -> float:
        """What is neither spent nor set aside, in USD."""
        return max(self._usd - self._spent - self._set_aside, 0.0)

    def grant(self, card: ExpertCard, request: ExpertRequest) -> tuple[Grant, ExpertRequest]:
        """Set aside what the call may cost, and the request with its output bounded to that.

        Raises `ExpertUnavailableError` where not even one token of output is left, and `ExpertRequestError` for a bound
        that is none.
        """
        reads = most_input_tokens(request, card.context_length)
        if request.endpoint == "embeddings":
            return self.reserve(card, reads=reads, wanted=0, choices=0)[0], request
        wanted = min(output_bound(request.body), card.context_length)
        grant, tokens = self.reserve(card, reads=reads, wanted=wanted, choices=_choices(request))
        return grant, replace(request, body=_bounded(request.body, tokens))

    def reserve(self, card: ExpertCard, *, reads: int, wanted: int, choices: int) -> tuple[Grant, int]:
        """Set aside `reads` tokens of input and up to `wanted` of output for each choice: the grant, and how many.

        Raises `ExpertUnavailableError` where not even one token of output is left.
        """
        reading, byte = reads * _dearest_input(card), _output_price(card)
        left, tokens = self.left - reading, wanted
        if byte * choices:
            tokens = min(wanted, int((left / byte / choices - _FRAME_BYTES) // BYTES_PER_TOKEN))
        if left < 0 or tokens < min(1, wanted):
            raise ExpertUnavailableError(f"the policy's ceiling of {self._usd:g} USD a request leaves no call of it")
        output_bytes = (tokens * BYTES_PER_TOKEN + _FRAME_BYTES) * choices
        grant = Grant(reading + output_bytes * byte, output_bytes)
        self._set_aside += grant.usd
        return grant, tokens

    def take(self, grant: Grant, card: ExpertCard, data: bytes) -> bool:
        """Count a piece of the call's stream, giving it more where it needs more; whether the ceiling allows it."""
        grant.used += most_output_tokens(data)
        if grant.used <= grant.output_bytes:
            return True
        more = (grant.used - grant.output_bytes) * _output_price(card)
        if more > self.left:
            return False
        grant.usd, grant.output_bytes = grant.usd + more, grant.used
        self._set_aside += more
        return True

    def settle(self, grant: Grant, cost_usd: float | None) -> None:
        """The call has ended, and cost so much by its expert's word; `None` where the expert never said."""
        self._set_aside -= grant.usd
        self._spent += grant.usd if cost_usd is None else min(cost_usd, grant.usd)


def most_input_tokens(request: ExpertRequest, context_length: int) -> int:
    """The most tokens that an expert can read of a request: a token a byte of all that the body says.

    A picture counts as the dearest that is known; of sounds, files and whatever else there is nothing can be known but
    that it fits into the context, as everything has to.
    """
    messages = request.body.get("messages")
    turns = messages if isinstance(messages, list) else []
    media = [part for part in _parts(turns) if part.get("type") not in _WORDS]
    contexts = context_length * _texts(request)
    if any(part.get("type") not in _PICTURES for part in media):
        return contexts
    written = len(orjson.dumps(request.body)) - sum(len(orjson.dumps(part)) for part in media)
    template = _TEMPLATE_TOKENS + _TEMPLATE_TOKENS_PER_MESSAGE * len(turns)
    return min(written + template + _TOKENS_PER_PICTURE * len(media), contexts)


def most_output_tokens(data: bytes) -> int:
    """The most tokens that a piece of a stream can be: one a byte of what it says, wherever it does; at least one."""
    try:
        piece = orjson.loads(data)
    except orjson.JSONDecodeError:
        return len(data)
    if not isinstance(piece, dict):
        return len(data)
    said = 0
    for name, value in piece.items():
        if name == "choices" and isinstance(value, list):
            said += sum(map(_said_by_choice, value))
        elif name not in _ENVELOPE:
            said += len(name) + _said(value)
    return max(1, said)


def output_bound(body: Mapping[str, Any]) -> int:
    """How many tokens a body lets each choice have; `ASSUMED_OUTPUT` where it names no bound.

    Raises `ExpertRequestError` for a bound that is none.
    """
    named = [_count(body, field) for field in _BOUNDS if body.get(field) is not None]
    return min(named, default=ASSUMED_OUTPUT)


def _bounded(body: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The body with every bound that it names, or else `max_tokens`, at `tokens`."""
    fields = [field for field in _BOUNDS if body.get(field) is not None] or ["max_tokens"]
    return {**body, **dict.fromkeys(fields, tokens)}


def _choices(request: ExpertRequest) -> int:
    """How many answers the request makes: `n`, or `best_of` of which `n` are given, for each of its prompts."""
    counts = [_count(request.body, field) for field in ("n", "best_of") if request.body.get(field) is not None]
    return max(counts, default=1) * _texts(request)


def _texts(request: ExpertRequest) -> int:
    """How many texts stand by themselves in it: a chat is one, prompts and inputs may be several."""
    given = request.body.get({"completions": "prompt", "embeddings": "input"}.get(request.endpoint, ""))
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    return len(given) if several and isinstance(given, list) else 1


def _count(body: Mapping[str, Any], field: str) -> int:
    value = body[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ExpertRequestError(f"{field!r} must be a whole number from 1", param=field, code="invalid_value")
    return value


def _parts(messages: list[Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of the messages' contents that are no mere text."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping):
                yield part


def _said_by_choice(choice: Any) -> int:
    if not isinstance(choice, dict):
        return _said(choice)
    return _said({name: value for name, value in choice.items() if name not in _FRAME})


def _said(value: Any) -> int:
    """Bytes of all that a value says: texts, numbers, and names that the wire format does not have."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, dict):
        return sum(
            (0 if name in _NAMES else len(name.encode())) + _said(part)
            for name, part in value.items()
            if _WRITER.get(name) != part
        )
    if isinstance(value, list):
        return sum(map(_said, value))
    return 0 if value is None or isinstance(value, bool) else len(str(value))


def _dearest_input(card: ExpertCard) -> float:
    """USD for a token of input, cached or not."""
    return max(card.cost(Usage(input_tokens=1)), card.cost(Usage(input_tokens=1, cached_input_tokens=1)))


def _output_price(card: ExpertCard) -> float:
    return card.cost(Usage(output_tokens=1))
