"""`single`: the expert ranked first answers; where it fails before its answer has begun, the next one does.

An answer has begun with its first content: the whole body of a plain answer, in a stream the first piece that carries
text, a tool call, a refusal or the reason why it ends. Pieces before it (a role, an empty delta) are held back, so that
a stream whose expert dies before saying anything falls back as a plain answer does, and the client sees one stream, of
one expert. Once content has gone out no other expert can go on in its stead: the failure is raised, for the stream to
end with an error. Nothing is held back after that first piece.

An expert that is unavailable or too late is a reason to fall back; a request that is itself at fault is not, unless the
fault is one that only this expert finds (its context is too short, it lacks the parameter).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import orjson

from experts.errors import ExpertError, ExpertRequestError, ExpertTimeoutError, ExpertUnavailableError
from experts.expert import ExpertRequest, Part
from routers.contracts import Call, Decision
from routers.strategies.base import BaseStrategy, StrategyOptions
from routers.strategies.deadline import close, until

_THIS_EXPERT_ALONE = frozenset(
    {"context_length_exceeded", "model_not_found", "unsupported_endpoint", "unsupported_parameter", "unsupported_value"}
)


class SingleStrategy(BaseStrategy):
    """One expert's answer, with fallback to the next of the ranking."""

    name = "single"
    options_type = StrategyOptions

    async def run(self, decision: Decision, request: ExpertRequest, call: Call) -> AsyncGenerator[Part, None]:
        """The parts of the first answer that begins.

        At most `fallbacks.max_attempts` experts are tried within `request.timeout_s`. Raises `ExpertError`: what broke
        an answer that had begun, the request's fault, or, when every attempt failed, what each of them died of.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + request.timeout_s
        candidates = deque(decision.ranking)
        failures: dict[str, ExpertError] = {}
        while candidates and len(failures) < self.fallbacks.max_attempts:
            candidate = candidates.popleft()
            expert, left = candidate.expert, deadline - clock()
            if failures and left <= 0:
                break
            last = not candidates or len(failures) + 1 == self.fallbacks.max_attempts
            begin_by = clock() + self._time_to_begin(left, stream=request.stream, last=last)
            reply = _Reply(expert, call(expert, replace(request, timeout_s=left), why=_why(failures)))
            try:
                async with aclosing(reply.parts(request, begin_by=begin_by, deadline=deadline)) as parts:
                    async for part in parts:
                        yield part
                return
            except ExpertError as error:
                if reply.begun or not another_may(error):
                    raise
                failures[expert] = error
                if isinstance(error, ExpertRequestError) and error.code == "context_length_exceeded":
                    candidates = deque(one for one in candidates if one.context_length > candidate.context_length)
        raise all_failed(failures)

    def _time_to_begin(self, left: float, *, stream: bool, last: bool) -> float:
        """Half of the time for a stream's first words; a plain answer begins when it is complete, and may take all."""
        own = self.fallbacks.attempt_timeout_s
        return min(left, own if own is not None else left / 2 if stream and not last else left)


class _Reply:
    """One expert's reply; `begun` says whether any of its content was handed on."""

    def __init__(self, expert: str, source: AsyncIterator[Part]) -> None:
        self.begun = False
        self._expert = expert
        self._source = source

    async def parts(self, request: ExpertRequest, *, begin_by: float, deadline: float) -> AsyncGenerator[Part, None]:
        """The reply's parts, none before its content begins; raises `ExpertTimeoutError` where that takes too long."""
        held: list[Part] = []
        try:
            while (part := await self._next(deadline if self.begun else begin_by)) is not None:
                if not self.begun:
                    held.append(part)
                    if not has_content(part, stream=request.stream):
                        continue
                    self.begun = True
                    for early in held:
                        yield early
                else:
                    yield part
            if not self.begun:
                raise ExpertUnavailableError(f"expert {self._expert!r} ended without an answer")
        finally:
            await close(self._source)

    async def _next(self, by: float) -> Part | None:
        what = "finish" if self.begun else "begin"
        async with until(by, f"expert {self._expert!r} did not {what} its answer in time"):
            return await anext(self._source, None)


def has_content(part: Part, *, stream: bool) -> bool:
    """Whether a client that sees `part` has seen some of the answer."""
    if not stream or not part.data:
        return bool(part.data)
    try:
        chunk = orjson.loads(part.data)
    except orjson.JSONDecodeError:
        return True  # not the wire format that we know: let it through
    choices = chunk.get("choices") or [] if isinstance(chunk, dict) else None
    return any(map(_choice_has_content, choices)) if isinstance(choices, list) else True


def _choice_has_content(choice: Any) -> bool:
    if not isinstance(choice, dict):
        return True
    delta = choice.get("delta")
    said = [value for key, value in delta.items() if key != "role"] if isinstance(delta, dict) else []
    return any((choice.get("finish_reason"), choice.get("text"), choice.get("message"), *said))


def another_may(error: ExpertError) -> bool:
    if isinstance(error, ExpertRequestError):
        return error.code in _THIS_EXPERT_ALONE
    return isinstance(error, ExpertUnavailableError | ExpertTimeoutError)


def _why(failures: Mapping[str, ExpertError]) -> str:
    """What the trace says of the next call."""
    if not failures:
        return "ranked first"
    expert, error = list(failures.items())[-1]
    return f"fallback: {expert} failed: {error}"


def all_failed(failures: Mapping[str, ExpertError]) -> ExpertError:
    """One error for all attempts: the request's own fault if any found one, a timeout if all were too late."""
    errors = list(failures.values())
    if len(errors) == 1:
        return errors[0]
    if faults := [error for error in errors if isinstance(error, ExpertRequestError)]:
        return faults[-1]
    message = "no expert could answer: " + "; ".join(f"{expert}: {error}" for expert, error in failures.items())
    if all(isinstance(error, ExpertTimeoutError) for error in errors):
        return ExpertTimeoutError(message)
    waits = [
        error.retry_after_s for error in errors if isinstance(error, ExpertUnavailableError) and error.retry_after_s
    ]
    return ExpertUnavailableError(message, retry_after_s=min(waits, default=None))
