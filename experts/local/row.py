"""One answer in the making."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from experts.errors import ExpertError, ExpertUnavailableError
from experts.local.request import Generation
from experts.local.sampling import Sampler, TokenLogprob, logprobs_of
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


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """A request that the engine works on. Pieces, or the error that ended it, are put in `replies` on `loop`."""

    prompts: Sequence[Sequence[int]]
    generation: Generation
    adapter: int
    max_tokens: Sequence[int]
    loop: asyncio.AbstractEventLoop
    replies: asyncio.Queue[Piece | ExpertError] = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    @property
    def rows(self) -> int:
        """How many answers it asks for."""
        return len(self.prompts) * self.generation.n

    def reply(self, reply: Piece | ExpertError) -> None:
        """Hand `reply` over to the event loop; nobody listens any more where the loop is closed."""
        try:
            self.loop.call_soon_threadsafe(self.replies.put_nowait, reply)
        except RuntimeError:
            self.cancelled = True


class Row:
    """One choice of a job: a row of the batch."""

    def __init__(self, job: Job, prompt: int, n: int, decoder: Decoder, end_tokens: frozenset[int]) -> None:
        generation = job.generation
        self.job = job
        self.last_token = -1
        self._choice = prompt * generation.n + n
        self._max_tokens = job.max_tokens[prompt]
        self._end_tokens = end_tokens
        self._sampler = Sampler(generation.sampling, self._choice)
        context = () if generation.messages is not None else job.prompts[prompt][-_CONTEXT_TOKENS:]
        self._text = Detokenizer(decoder, context)
        self._stops = StopStrings(generation.stop)
        self._tokens = 0
        self._chars_read = 0
        self._chars_sent = 0
        self._logprobs: list[Logprob] = []
        self.finished = False

    @property
    def wants_logits(self) -> bool:
        """Whether more than the likeliest token is needed of the logits."""
        return not self.job.generation.sampling.greedy or self.job.generation.top_logprobs is not None

    def choose(self, logits: Tensor) -> int:
        """The next token for `logits` ([V], float32, on the CPU)."""
        token = self._sampler.choose(logits)
        self._sampler.observe(token, len(logits))
        top = self.job.generation.top_logprobs
        if top is not None and token not in self._end_tokens:
            self._logprobs.append(Logprob(*logprobs_of(logits, token, top), self._chars_read))
        return token

    def accept(self, token: int) -> None:
        """Add `token` to the answer and send what text it completes."""
        self.last_token = token
        if token in self._end_tokens:
            return self._finish("stop")
        self._tokens += 1
        new = self._text.push(token)
        self._chars_read += len(new)
        text = self._stops.push(new)
        if self._stops.found:
            self._send(text, "stop")
        elif self._tokens >= self._max_tokens:
            self._finish("length", text)
        elif text:
            self._send(text, None)
        return None

    def fail(self) -> None:
        """End the whole job, because the model's numbers are of no use."""
        self.finished = self.job.cancelled = True
        self.job.reply(ExpertUnavailableError("the model gave numbers that are not finite"))

    def _finish(self, reason: FinishReason, text: str = "") -> None:
        """Send the rest, in which a stop string may still be found."""
        text += self._stops.push(self._text.finish())
        if self._stops.found:
            reason = "stop"
        self._send(text + self._stops.finish(), reason)

    def _send(self, text: str, reason: FinishReason | None) -> None:
        self._chars_sent += len(text)
        ended = reason is not None and not self._stops.found
        sent = [one for one in self._logprobs if ended or one.offset < self._chars_sent]
        self._logprobs = self._logprobs[len(sent) :]
        self.finished = reason is not None
        self.job.reply(Piece(self._choice, text, sent, reason, self._tokens))
