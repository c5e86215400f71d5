"""What one request may cost at most, whatever its experts do.

Before a call begins the most that it can cost is set aside: a token for each byte of its text (no tokenizer makes
more), and as many output tokens as the body allows, or as the rest of the ceiling pays for; the body then says so to
the expert. When the call ends, what it did not use is free for the next. An expert that does not keep to its bound is
cut off where its stream reaches it. So calls that run beside each other cannot exceed the ceiling together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from experts.cards import ExpertCard
from experts.errors import ExpertUnavailableError
from experts.expert import ExpertRequest, Usage

_TEMPLATE_TOKENS = 256  # what a chat template may add: a default system prompt, a date, the turn to answer
_TEMPLATE_TOKENS_PER_MESSAGE = 16
_ASSUMED_OUTPUT = 1024  # set aside for a call whose body names no bound, as far as the ceiling pays for it
_BYTES_PER_TOKEN = 4  # by which a piece of several tokens is counted


@dataclass(slots=True)
class Grant:
    """What one call may use. `output_tokens` is its bound, `used` what its stream has shown so far."""

    usd: float
    output_tokens: int
    used: int = 0

    def take(self, data: bytes) -> bool:
        """Count a piece of the stream; whether the bound is still kept."""
        self.used += _tokens_of(data)
        return self.used <= self.output_tokens


class CostCeiling:
    """The ceiling of one request, in USD, and what is set aside of it for calls under way."""

    def __init__(self, usd: float) -> None:
        self._usd = usd
        self._spent = 0.0
        self._set_aside = 0.0

    def grant(self, card: ExpertCard, request: ExpertRequest) -> tuple[Grant, ExpertRequest]:
        """Set aside what the call may cost, and the request with its output bounded to that.

        Raises `ExpertUnavailableError` where not even one token of output is left.
        """
        read = Usage(input_tokens=most_input_tokens(request.body))
        dearest = card.model_copy(update={"cached_input_price": None})
        left = self._usd - self._spent - self._set_aside - dearest.cost(read)
        wanted = _output_bound(request.body)
        choices = max(1, int(request.body.get("n") or 1))
        a_token = dearest.cost(Usage(output_tokens=choices))
        affordable = wanted if a_token == 0 and left >= 0 else int(left / a_token) if a_token else 0
        if affordable < 1:
            raise ExpertUnavailableError(f"the policy's ceiling of {self._usd:g} USD a request leaves no call of it")
        tokens = min(wanted, affordable)
        usd = dearest.cost(replace(read, output_tokens=tokens * choices))
        self._set_aside += usd
        return Grant(usd, tokens * choices), replace(request, body=_bounded(request.body, tokens))

    def settle(self, grant: Grant, cost_usd: float) -> None:
        """The call has ended, and cost so much."""
        self._set_aside -= grant.usd
        self._spent += cost_usd


def most_input_tokens(body: Mapping[str, Any]) -> int:
    """The most tokens that a body's text can be."""
    messages = body.get("messages") or ()
    text = json.dumps([messages, body.get("prompt"), body.get("tools")], ensure_ascii=False)
    return len(text.encode()) + _TEMPLATE_TOKENS + _TEMPLATE_TOKENS_PER_MESSAGE * len(messages)


def _output_bound(body: Mapping[str, Any]) -> int:
    for field in ("max_completion_tokens", "max_tokens"):
        if isinstance(body.get(field), int):
            return int(body[field])
    return _ASSUMED_OUTPUT


def _bounded(body: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    field = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return {**body, field: tokens}


def _tokens_of(data: bytes) -> int:
    """At least one for a piece with text; one for every four bytes of a longer one."""
    try:
        choices = json.loads(data).get("choices") or ()
    except (ValueError, AttributeError):
        return -(-len(data) // _BYTES_PER_TOKEN)
    said = 0
    for choice in choices:
        delta = choice.get("delta") or {}
        text = choice.get("text") or "".join(
            value for name, value in delta.items() if name != "role" and isinstance(value, str)
        )
        text += json.dumps(delta["tool_calls"]) if delta.get("tool_calls") else ""
        said += -(-len(text.encode()) // _BYTES_PER_TOKEN)
    return said
