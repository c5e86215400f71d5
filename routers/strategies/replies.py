"""Whole replies from calls that run beside each other, and what a client is given of one of them.

A strategy that looks at an answer before it hands it on asks for it as a stream, whatever the client asked for: so the
service sees an answer grow, and can end one that has no end. A client that wants a stream gets the reply's chunks, one
that wants a whole answer gets it put together from them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experts.errors import ExpertError, ExpertRequestError, ExpertUnavailableError
from experts.expert import ExpertRequest, Part, Usage
from routers.contracts import Call
from routers.strategies.chunks import read_chunk
from routers.strategies.deadline import CLOSING_S, close, until

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Said:
    """What one choice of a reply says. `logprobs` are its tokens' log-probabilities, where the expert told them."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    _tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    _other: dict[str, Any] = field(default_factory=dict)
    _told: dict[str, Any] = field(default_factory=dict)

    def add(self, choice: Mapping[str, Any]) -> None:
        """Take in the choice of the next chunk, as `read_chunk` lets it pass."""
        delta = choice.get("delta") or {}
        self.text += delta.get("content") or choice.get("text") or ""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self._add_logprobs(choice.get("logprobs") or {})
        for call in delta.get("tool_calls") or ():
            _merge_call(self._tool_calls.setdefault(call.get("index", 0), {}), call)
        for name, value in delta.items():
            if name == "function_call" and value:
                _merge_function(self._other.setdefault(name, {}), value)
            elif name not in {"role", "content", "tool_calls"} and value is not None:
                before = self._other.get(name)
                self._other[name] = before + value if isinstance(before, str) and isinstance(value, str) else value

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """Its calls of tools, in their order."""
        return [self._tool_calls[index] for index in sorted(self._tool_calls)]

    @property
    def functions(self) -> list[Any]:
        """The functions that it calls, in either of the wire format's two ways."""
        return [*(call.get("function") for call in self.tool_calls), *filter(None, [self._other.get("function_call")])]

    @property
    def empty(self) -> bool:
        """Whether it says nothing."""
        return not (self.text or self._tool_calls or any(self._other.values()))

    def whole(self, request: ExpertRequest, index: int, *, hide_logprobs: bool) -> dict[str, Any]:
        """The choice as it stands in a whole answer of the endpoint's shape."""
        logprobs = None if hide_logprobs else self._told or None
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": self.finish_reason}
        if request.endpoint == "completions":
            return {**choice, "text": self.text}
        calls = self.tool_calls
        content = self.text or (None if self.functions else "")
        message = {"role": "assistant", "content": content, **self._other}
        return {**choice, "message": message | ({"tool_calls": calls} if calls else {})}

    def _add_logprobs(self, told: Mapping[str, Any]) -> None:
        """Keep the numbers for the confidence, and everything for the client: lists one after the other."""
        tokens = [token["logprob"] for token in told.get("content") or ()] or told.get("token_logprobs") or ()
        self.logprobs += [min(value, 0.0) for value in tokens if value is not None]
        for name, value in told.items():
            before = self._told.get(name)
            self._told[name] = before + value if isinstance(before, list) and isinstance(value, list) else value


@dataclass(slots=True)
class Reply:
    """One expert's whole reply: its parts, and what each of its choices says, by index.

    A strategy asks for one choice, which is what `text`, `key`, `shown` and `confidence` are about.
    """

    expert: str
    parts: list[Part] = field(default_factory=list)
    choices: dict[int, Said] = field(default_factory=dict)
    _head: dict[str, Any] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        """Take in the next part. Raises `ExpertUnavailableError` for one that is no chunk."""
        self.parts.append(part)
        if not part.data:
            return
        chunk = read_chunk(part.data, self.expert)
        self._head = self._head or {key: value for key, value in chunk.items() if key not in {"choices", "usage"}}
        for choice in chunk.get("choices") or ():
            self.choices.setdefault(choice.get("index", 0), Said()).add(choice)

    def check_ended(self) -> None:
        """Raise `ExpertUnavailableError` unless every choice has come to its end."""
        if not self.choices:
            raise ExpertUnavailableError(f"expert {self.expert!r} ended without an answer")
        if not all(said.finish_reason for said in self.choices.values()):
            raise ExpertUnavailableError(f"expert {self.expert!r} ended in the middle of its answer")

    @property
    def text(self) -> str:
        """Its words."""
        return self._said.text

    @property
    def key(self) -> str:
        """What two replies that say the same have in common."""
        functions = self._said.functions
        return normalised(self.text) + (json.dumps(functions, sort_keys=True) if functions else "")

    @property
    def shown(self) -> str:
        """The reply as text for another expert to read."""
        return self.key if self._said.functions else self.text

    @property
    def confidence(self) -> float | None:
        """The geometric mean of its tokens' probabilities; None where the expert told none."""
        told = self._said.logprobs
        return math.exp(sum(told) / len(told)) if told else None

    @property
    def empty(self) -> bool:
        """Whether it says nothing."""
        return self._said.empty

    def for_client(self, request: ExpertRequest, *, logprobs: bool) -> list[Part]:
        """The parts that the client of `request` gets; `logprobs` says whether they were the strategy's wish alone."""
        if request.stream:
            return [replace(self._shown(part, hide=logprobs), expert=self.expert) for part in self.parts]
        return [Part(json.dumps(self._whole(request, hide=logprobs)).encode(), self.usage, expert=self.expert)]

    @property
    def usage(self) -> Usage | None:
        """What the expert said that it used."""
        return next((part.usage for part in reversed(self.parts) if part.usage), None)

    @property
    def _said(self) -> Said:
        return self.choices.get(0) or Said()

    def _shown(self, part: Part, *, hide: bool) -> Part:
        if not hide or not part.data:
            return part
        chunk = json.loads(part.data)
        for choice in chunk.get("choices") or ():
            choice.pop("logprobs", None)
        return replace(part, data=json.dumps(chunk).encode())

    def _whole(self, request: ExpertRequest, *, hide: bool) -> dict[str, Any]:
        """The chunks as one answer of the endpoint's shape."""
        kind = "text_completion" if request.endpoint == "completions" else "chat.completion"
        choices = [self.choices[index].whole(request, index, hide_logprobs=hide) for index in sorted(self.choices)]
        return {**self._head, "object": kind, "choices": choices, "usage": _wire_usage(self.usage)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One call to make: of whom, with which body, and why."""

    expert: str
    body: Mapping[str, Any]
    why: str


def check_one_choice(request: ExpertRequest) -> None:
    """Raise `ExpertRequestError` where the client wants several choices of what a strategy makes one answer of.

    Several prompts are several answers, and one of token ids is for one tokenizer, not for several experts.
    """
    if request.body.get("n") not in (None, 1):
        message = "this policy's strategy makes one answer of several: 'n' must be 1"
        raise ExpertRequestError(message, param="n", code="unsupported_value")
    if request.endpoint == "completions" and not isinstance(request.body.get("prompt", ""), str):
        message = "this policy's strategy makes one answer to one text: 'prompt' must be a string, not a list"
        raise ExpertRequestError(message, param="prompt", code="unsupported_value")


def as_stream(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body as one that asks for a stream; chunks about usage are left out unless the client asked for them."""
    if body.get("stream"):
        return dict(body)
    return {**{name: value for name, value in body.items() if name != "stream_options"}, "stream": True}


async def collect(call: Call, ask: Ask, request: ExpertRequest, *, by: float) -> Reply:
    """The whole reply to one call, by the loop's time `by`.

    Raises `ExpertError`, also for an answer that breaks off or says nothing.
    """
    clock = asyncio.get_running_loop().time
    sent = replace(request, body=as_stream(ask.body), timeout_s=max(by - clock(), 0.001))
    reply, source = Reply(ask.expert), call(ask.expert, sent, why=ask.why)
    try:
        async with until(by, f"expert {ask.expert!r} did not finish its answer in time"):
            async for part in source:
                reply.add(part)
    finally:
        await close(source)
    reply.check_ended()
    if reply.empty:
        raise ExpertUnavailableError(f"expert {ask.expert!r} ended without an answer")
    return reply


async def collect_all(
    call: Call, asks: Sequence[Ask], request: ExpertRequest, *, by: float
) -> AsyncGenerator[tuple[int, Reply | ExpertError], None]:
    """Replies to concurrent calls as they come, each with its place in `asks`; closing it ends those under way."""
    places = {asyncio.create_task(collect(call, ask, request, by=by)): place for place, ask in enumerate(asks)}
    waiting = set(places)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: places[task]):
                error = task.exception()
                if error is None:
                    yield places[task], task.result()
                elif isinstance(error, ExpertError):
                    yield places[task], error
                else:
                    raise error
    finally:
        await _cancelled(places)


def normalised(text: str) -> str:
    """A text without what makes no difference to what it says: case, outer and doubled spaces, a last full stop."""
    return re.sub(r"\s+", " ", text).strip().lower().removesuffix(".")


async def _cancelled(tasks: Iterable[asyncio.Task[Reply]]) -> None:
    """Stop calls that are under way, and wait for their ends, but not for ever."""
    waiting = set(tasks)
    for task in waiting:
        task.cancel()
    done, late = await asyncio.wait(waiting, timeout=CLOSING_S)
    for task in done:
        if not task.cancelled():
            task.exception()  # looked at, so that it is not reported as forgotten
    if late:
        logger.error("%d calls did not end within %g s after they were cancelled", len(late), CLOSING_S)


def _wire_usage(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    total = usage.input_tokens + usage.output_tokens
    return {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens, "total_tokens": total}


def _merge_call(call: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a tool call's next piece: its function's arguments grow, all else is said once."""
    for name, value in delta.items():
        if name == "function" and value:
            _merge_function(call.setdefault(name, {}), value)
        elif name not in {"index", "function"} and value is not None:
            call[name] = value


def _merge_function(function: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for name, value in delta.items():
        if name == "arguments":
            function[name] = function.get(name, "") + (value or "")
        elif value is not None:
            function[name] = value
