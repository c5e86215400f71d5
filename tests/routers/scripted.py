"""A fleet that follows a script, for strategies: parts, failures, silence."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from experts.cards import ExpertCard
from experts.errors import ExpertError, ExpertUnavailableError
from experts.expert import ExpertRequest, Part, Usage
from routers.contracts import Candidate, Decision

Step = Part | ExpertError | float  # a part, a failure, or seconds of silence


def chunk(**delta: Any) -> Part:
    return Part(json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}).encode())


ROLE, EMPTY = chunk(role="assistant", content=""), chunk(content="")
STOP = Part(b'{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}')
END = Part(b"", Usage(3, 2))
WHOLE = Part(b'{"choices": [{"message": {"content": "four"}}]}', Usage(3, 1))
DEAD = ExpertUnavailableError("connection lost")


class FakeFleet:
    """Experts that follow a script, and the service's `call` to them; records who was called, why, and who closed."""

    def __init__(self, **scripts: Sequence[Step]) -> None:
        self.scripts: Mapping[str, Sequence[Step]] = scripts
        self.calls: list[tuple[str, str, float]] = []
        self.closed: list[str] = []

    async def __call__(self, expert: str, request: ExpertRequest, *, why: str) -> AsyncGenerator[Part, None]:
        self.calls.append((expert, why, request.timeout_s))
        try:
            for step in self.scripts[expert]:
                if isinstance(step, ExpertError):
                    raise step
                if isinstance(step, Part):
                    yield step
                else:
                    await asyncio.sleep(step)
        finally:
            self.closed.append(expert)

    @property
    def called(self) -> list[str]:
        return [expert for expert, _, _ in self.calls]


def _card(name: str) -> ExpertCard:
    return ExpertCard(name=name, context_length=8192 if name.isupper() else 4096, features=frozenset({"logprobs"}))


def decision(*experts: str) -> Decision:
    """Experts in this order, all with the feature `logprobs`; what is in capitals has a longer context."""
    ranking = [
        Candidate(expert=e, card=card, context_length=card.context_length, score=1, quality=1, cost_usd=0, latency_s=0)
        for e in experts
        for card in [_card(e)]
    ]
    return Decision(policy="p", router="r", strategy="single", ranking=ranking)


def request(*, stream: bool, timeout_s: float = 5.0) -> ExpertRequest:
    return ExpertRequest(id="1", endpoint="chat/completions", body={"stream": stream}, timeout_s=timeout_s)


async def collect(parts: AsyncIterator[Part], seen: list[Part]) -> None:
    async for part in parts:
        seen.append(part)


def says(text: str, *, probability: float | None = None) -> list[Step]:
    """The script of an expert that streams `text`, a token a word, each of this probability."""
    logprob = None if probability is None else {"content": [{"token": "x", "logprob": math.log(probability)}]}
    words = [
        Part(json.dumps({"choices": [{"index": 0, "delta": {"content": word}, "logprobs": logprob}]}).encode())
        for word in re.findall(r"\s*\S+", text)
    ]
    return [ROLE, *words, STOP, Part(b"", Usage(5, len(words)))]


def text_of(parts: Sequence[Part], *, stream: bool) -> str:
    """What a client reads in `parts`."""
    chunks = [json.loads(part.data) for part in parts if part.data]
    if not stream:
        (whole,) = chunks
        return str(whole["choices"][0]["message"]["content"])
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c.get("choices"))
