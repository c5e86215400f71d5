"""Whole replies from calls that run beside each other, and what a client is given of one of them.

A strategy that looks at an answer before it hands it on asks for it as a stream, whatever the client asked for: so the
service sees an answer grow, and can end one that has no end. A client that wants a stream gets the reply's chunks, one
that wants a whole answer gets it put together from them.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from experts.errors import ExpertError, ExpertRequestError, ExpertUnavailableError
from experts.expert import ExpertRequest, Part
from routers.contracts import Call
from routers.strategies.deadline import until


@dataclass(slots=True)
class Reply:
    """One expert's whole reply. `logprobs` are its tokens' log-probabilities, where it told them."""

    expert: str
    parts: list[Part] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    _other: dict[str, Any] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        """Take in the next part. Raises `ExpertUnavailableError` for one that is no chunk."""
        self.parts.append(part)
        if not part.data:
            return
        try:
            chunk = json.loads(part.data)
            choices = chunk.get("choices") or ()
            for choice in choices:
                self._take(choice)
        except (ValueError, AttributeError, TypeError) as error:
            raise ExpertUnavailableError(f"expert {self.expert!r} sent what is no chunk of an answer") from error

    @property
    def key(self) -> str:
        """What two replies that say the same have in common."""
        calls = [self.tool_calls[index].get("function") for index in sorted(self.tool_calls)]
        return normalised(self.text) + (json.dumps(calls, sort_keys=True) if calls else "")

    @property
    def shown(self) -> str:
        """The reply as text for another expert to read."""
        return self.key if self.tool_calls else self.text

    @property
    def confidence(self) -> float | None:
        """The geometric mean of its tokens' probabilities; None where the expert told none."""
        return math.exp(sum(self.logprobs) / len(self.logprobs)) if self.logprobs else None

    def for_client(self, request: ExpertRequest, *, logprobs: bool) -> list[Part]:
        """The parts that the client of `request` gets; `logprobs` says whether they were the strategy's wish alone."""
        if request.stream:
            return [replace(self._shown(part, hide=logprobs), expert=self.expert) for part in self.parts]
        return [Part(json.dumps(self._whole(request, hide=logprobs)).encode(), expert=self.expert)]

    def _take(self, choice: Mapping[str, Any]) -> None:
        delta = choice.get("delta") or {}
        self.text += delta.get("content") or choice.get("text") or ""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.logprobs += _logprobs(choice.get("logprobs") or {})
        for call in delta.get("tool_calls") or ():
            _merge_call(self.tool_calls.setdefault(call.get("index", 0), {}), call)
        for name, value in delta.items():
            if name not in {"role", "content", "tool_calls"} and value is not None:
                before = self._other.get(name)
                self._other[name] = before + value if isinstance(before, str) and isinstance(value, str) else value

    def _shown(self, part: Part, *, hide: bool) -> Part:
        if not hide or not part.data:
            return part
        chunk = json.loads(part.data)
        for choice in chunk.get("choices") or ():
            choice.pop("logprobs", None)
        return replace(part, data=json.dumps(chunk).encode())

    def _whole(self, request: ExpertRequest, *, hide: bool) -> dict[str, Any]:
        """The chunks as one answer of the endpoint's shape."""
        chunks = [json.loads(part.data) for part in self.parts if part.data]
        head = {key: value for key, value in (chunks[0] if chunks else {}).items() if key not in {"choices", "usage"}}
        logprobs = None if hide else _joined_logprobs(chunks)
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": self.finish_reason or "stop"}
        if request.endpoint == "completions":
            head["object"], choice["text"] = "text_completion", self.text
        else:
            calls = [self.tool_calls[index] for index in sorted(self.tool_calls)]
            message = {"role": "assistant", "content": self.text or (None if calls else ""), **self._other}
            head["object"], choice["message"] = "chat.completion", message | ({"tool_calls": calls} if calls else {})
        return {**head, "choices": [choice], "usage": self._usage()}

    def _usage(self) -> dict[str, int] | None:
        usage = next((part.usage for part in reversed(self.parts) if part.usage), None)
        if usage is None:
            return None
        total = usage.input_tokens + usage.output_tokens
        return {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens, "total_tokens": total}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One call to make: of whom, with which body, and why."""

    expert: str
    body: Mapping[str, Any]
    why: str


def check_one_choice(request: ExpertRequest) -> None:
    """Raise `ExpertRequestError` where the client wants several choices of what a strategy makes one answer of."""
    if request.body.get("n") not in (None, 1):
        message = "this policy's strategy makes one answer of several: 'n' must be 1"
        raise ExpertRequestError(message, param="n", code="unsupported_value")


def as_stream(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body as one that asks for a stream; chunks about usage are left out unless the client asked for them."""
    if body.get("stream"):
        return dict(body)
    return {**{name: value for name, value in body.items() if name != "stream_options"}, "stream": True}


async def collect(call: Call, ask: Ask, request: ExpertRequest, *, by: float) -> Reply:
    """The whole reply to one call, by the loop's time `by`. Raises `ExpertError`."""
    clock = asyncio.get_running_loop().time
    sent = replace(request, body=as_stream(ask.body), timeout_s=max(by - clock(), 0.001))
    reply, source = Reply(ask.expert), call(ask.expert, sent, why=ask.why)
    try:
        async with until(by, f"expert {ask.expert!r} did not finish its answer in time"):
            async for part in source:
                reply.add(part)
    finally:
        await close(source)
    if not any(part.data for part in reply.parts):
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


async def close(source: AsyncIterator[Part]) -> None:
    """End a call that may be under way."""
    if isinstance(source, AsyncGenerator):
        await source.aclose()


def normalised(text: str) -> str:
    """A text without what makes no difference to what it says: case, outer and doubled spaces, a last full stop."""
    return re.sub(r"\s+", " ", text).strip().lower().removesuffix(".")


async def _cancelled(tasks: Iterable[asyncio.Task[Reply]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, ExpertError):
            await task


def _merge_call(call: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a tool call's next piece: its arguments grow, all else is said once."""
    for name, value in delta.items():
        if name == "function":
            function = call.setdefault("function", {})
            for part, text in (value or {}).items():
                function[part] = function.get(part, "") + text if part == "arguments" else text
        elif name != "index" and value is not None:
            call[name] = value


def _logprobs(found: Mapping[str, Any]) -> list[float]:
    """Of a chat's chunk or a completion's."""
    tokens = found.get("content") or ()
    return [token["logprob"] for token in tokens] or [
        value for value in found.get("token_logprobs") or () if value is not None
    ]


def _joined_logprobs(chunks: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """All chunks' log-probabilities in one object: lists are put one after the other."""
    joined: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk.get("choices") or ():
            for name, value in (choice.get("logprobs") or {}).items():
                joined[name] = [*(joined.get(name) or ()), *value] if isinstance(value, list) else value
    return joined or None
