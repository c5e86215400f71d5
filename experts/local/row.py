"""One answer in the making."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from experts.errors import ExpertError
from experts.expert import Work
from experts.local.mixture import Mixture
from experts.local.request import Generation
from experts.local.sampling import Sampler, TokenLogprob
from experts.local.text import Decoder, Detokenizer, StopStrings

FinishReason = Literal["stop", "length"]

_CONTEXT_TOKENS = 8  # of a prompt that is continued: enough for a character or a leading space


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token of the answer, and the likeliest tokens in its place; `offset` is where its text starts in the answer."""

    chosen: TokenLogprob
    top: Sequence[TokenLogprob]
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to one choice of an answer. The last piece of a choice has a `finish_reason`."""

    choice: int
    text: str
    logprobs: Sequence[Logprob]
    finish_reason: FinishReason | None
    tokens: int
    """Tokens of the choice so far, without the one that ends it."""


@dataclass(slots=True)
class Pace:
    """When a job went through the engine, and in which company. Times are of `time.perf_counter`."""

    submitted: float
    admitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    steps: int = 0  # of the engine, in the time between; rows are summed over them
    rows: int = 0
    cache_use: float | None = None
    adapter_hits: int = 0
    adapter_loads: int = 0

    def work(self, tokens: int) -> Work:
        """What is told of a job that made `tokens` tokens after the first of each answer."""
        seconds = self.ended - self.first_token
        return Work(
            queue_s=self.admitted - self.submitted if self.admitted else None,
            first_token_s=self.first_token - self.submitted,
            tokens_per_s=tokens / seconds if tokens > 0 and seconds > 0 else None,
            batch_size=self.rows / self.steps if self.steps else 1.0,
            cache_use=self.cache_use,
            adapter_hits=self.adapter_hits,
            adapter_loads=self.adapter_loads,
        )


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """A request that the engine works on. Pieces, or the error that ended it, are put in `replies` on `loop`.

    `tenant` is whose it is.
    """

    prompts: Sequence[Sequence[int]]
    generation: Generation
    mixture: Mixture
    max_tokens: Sequence[int]
    loop: asyncio.AbstractEventLoop
    tenant: str = ""
    replies: asyncio.Queue[Piece | ExpertError] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    overtaken: int = 0
    rows_left: int = 0
    pace: Pace = field(default_factory=lambda: Pace(time.perf_counter()))

    @property
    def rows(self) -> int:
        """How many answers it asks for."""
        return len(self.prompts) * self.generation.n

    @property
    def flow(self) -> tuple[str, str]:
        """The queue that it waits in."""
        return self.tenant, self.mixture.label

    @property
    def sends_parts(self) -> bool:
        """Whether its text is needed as it comes: it is streamed, may be stopped by it, or has its places told."""
        return self.generation.stream or bool(self.generation.stop) or self.generation.top_logprobs is not None


class Row:
    """One choice of a job: a row of the batch."""

    def __init__(self, job: Job, prompt: int, n: int, decoder: Decoder, end_tokens: frozenset[int]) -> None:
        generation = job.generation
        self.job = job
        self.prompt = job.prompts[prompt]
        self.finished = self.broken = False
        self.top_logprobs = generation.top_logprobs
        self._choice = prompt * generation.n + n
        self.sampler = Sampler(generation.sampling, self._choice)
        self._max_tokens = job.max_tokens[prompt]
        self._end_tokens = frozenset[int]() if generation.ignore_eos else end_tokens
        self._eager = job.sends_parts
        context = () if generation.messages is not None else self.prompt[-_CONTEXT_TOKENS:]
        self._text = Detokenizer(decoder, context)
        self._stops = StopStrings(generation.stop)
        self._tokens = 0
        self._chars_read = 0
        self._chars_sent = 0
        self._unsent = ""
        self._logprobs: list[Logprob] = []

    def accept(self, token: int, logprob: tuple[TokenLogprob, Sequence[TokenLogprob]] | None = None) -> Piece | None:
        """Add `token` to the answer; the piece that it completes, if it does."""
        if token in self._end_tokens:
            return self._finish("stop")
        if logprob is not None:
            self._logprobs.append(Logprob(*logprob, self._chars_read))
        self._tokens += 1
        if not self._eager:
            self._text.hold(token)
            return self._finish("length") if self._tokens >= self._max_tokens else None
        new = self._text.push(token)
        self._chars_read += len(new)
        text = self._stops.push(new)
        if self._stops.found:
            return self._piece(text, "stop")
        if self._tokens >= self._max_tokens:
            return self._finish("length", text)
        self._unsent += text
        return self._piece("", None) if self._unsent and self.job.generation.stream else None

    def _finish(self, reason: FinishReason, text: str = "") -> Piece:
        """The rest, in which a stop string may still be found."""
        text += self._stops.push(self._text.finish())
        if self._stops.found:
            reason = "stop"
        return self._piece(text + self._stops.finish(), reason)

    def _piece(self, text: str, reason: FinishReason | None) -> Piece:
        text, self._unsent = self._unsent + text, ""
        self._chars_sent += len(text)
        ended = reason is not None and not self._stops.found
        sent = [one for one in self._logprobs if ended or one.offset < self._chars_sent]
        self._logprobs = self._logprobs[len(sent) :]
        self.finished = reason is not None
        return Piece(self._choice, text, sent, reason, self._tokens)
