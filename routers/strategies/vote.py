"""`vote`: several answers at once, and the one that most of them agree on.

Self-consistency (arXiv 2203.11171) where one expert is sampled, a vote of different experts where several are asked.
Answers are the same if they are equal but for case, spaces and a last full stop, or in what `answer_pattern` finds in
them. Calls run beside each other and end as soon as the others' votes can change nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from experts.errors import ExpertError
from experts.expert import ExpertRequest, Part
from routers.contracts import Call, Candidate, Decision
from routers.strategies.acceptance import log_odds
from routers.strategies.base import StrategyOptions
from routers.strategies.chosen import chosen
from routers.strategies.replies import Ask, Reply, collect_all, normalised
from routers.strategies.several import SeveralStrategy
from routers.strategies.single import all_failed, another_may

_LEAST_WEIGHT = 0.05


class VoteOptions(StrategyOptions):
    """Who votes: `experts`, else the first `voters` of the ranking, each `samples` times.

    More than one sample is drawn at `temperature`. `weight`: each vote counts the same, or by the log-odds of the
    expert's estimated quality, which is the best rule where experts err independently. `answer_pattern` is a regular
    expression whose first group, or whole match, is what an answer says; its last match counts.
    """

    experts: tuple[str, ...] = ()
    voters: Annotated[int, Field(ge=1, le=20)] = 3
    samples: Annotated[int, Field(ge=1, le=20)] = 1
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.7
    weight: Literal["equal", "quality"] = "equal"
    answer_pattern: str | None = None

    @field_validator("answer_pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return value


class VoteStrategy(SeveralStrategy[VoteOptions]):
    """Majority by normalised answer; ties go to the answer of the expert ranked highest."""

    name = "vote"
    options_type = VoteOptions

    @property
    def experts(self) -> frozenset[str]:
        """Those named as voters."""
        return frozenset(self.options.experts)

    @property
    def least_calls(self) -> int:
        """Two votes may agree already."""
        return min(2, self.most_calls)

    @property
    def most_calls(self) -> int:
        """Every vote."""
        return self.options.samples * (len(self.options.experts) or self.options.voters)

    async def answer(self, decision: Decision, request: ExpertRequest, call: Call) -> AsyncGenerator[Part, None]:
        """The parts of the answer of the highest-ranked expert among the majority. Raises `ExpertError` without any."""
        deadline = asyncio.get_running_loop().time() + self.attempt_s(request.timeout_s)
        candidates = self._voters(decision)
        voters = candidates * self.options.samples
        asks = [self._ask(voter, request, number) for number, voter in enumerate(voters)]
        box = _Box([self._weight(voter) for voter in voters], voters=len(candidates))
        async with aclosing(collect_all(call, asks, request, by=deadline)) as replies:
            async for place, reply in replies:
                box.take(place, reply, self._says)
                if box.decided:
                    break
        for part in box.winner().for_client(request, logprobs=False):
            yield part

    def _voters(self, decision: Decision) -> list[Candidate]:
        if self.options.experts:
            return chosen(decision, self.options.experts)
        return list(decision.ranking[: self.options.voters])

    def _ask(self, voter: Candidate, request: ExpertRequest, number: int) -> Ask:
        body = request.body
        if self.options.samples > 1:
            body = sampled(body, number, self.options.temperature)
        return Ask(expert=voter.expert, body=body, why=f"vote {number + 1}")

    def _weight(self, voter: Candidate) -> float:
        return 1.0 if self.options.weight == "equal" else max(log_odds(voter.quality), _LEAST_WEIGHT)

    def _says(self, reply: Reply) -> str:
        found = re.findall(self.options.answer_pattern, reply.text) if self.options.answer_pattern else []
        if not found:
            return reply.key
        return normalised(found[-1] if isinstance(found[-1], str) else found[-1][0])


class _Box:
    """The votes so far. `weights` are those of all votes by place: a round of all `voters` by rank, and the next."""

    def __init__(self, weights: Sequence[float], *, voters: int) -> None:
        self._voters = voters
        self._left = dict(enumerate(weights))
        self._votes: defaultdict[str, float] = defaultdict(float)
        self._first: dict[str, tuple[tuple[int, int], Reply]] = {}
        self._failures: dict[str, ExpertError] = {}

    def take(self, place: int, reply: Reply | ExpertError, says: Any) -> None:
        weight = self._left.pop(place)
        if isinstance(reply, ExpertError):
            if not another_may(reply):
                raise reply
            self._failures[f"vote {place + 1}"] = reply
            return
        answer = says(reply)
        self._votes[answer] += weight
        by_rank = place % self._voters, place
        if answer not in self._first or by_rank < self._first[answer][0]:
            self._first[answer] = by_rank, reply

    @property
    def decided(self) -> bool:
        """Whether the first answer has more votes than any other can still get."""
        first, second = [*sorted(self._votes.values(), reverse=True), 0.0, 0.0][:2]
        return first > second + sum(self._left.values())

    def winner(self) -> Reply:
        if not self._votes:
            raise all_failed(self._failures)
        best = min(self._votes, key=lambda answer: (-round(self._votes[answer], 9), self._first[answer][0]))
        return self._first[best][1]


def sampled(body: Mapping[str, Any], number: int, temperature: float) -> dict[str, Any]:
    """The body for one sample of several: warm, and with a seed of its own where the client named one."""
    seed = {} if body.get("seed") is None else {"seed": int(body["seed"]) + number}
    return {**body, "temperature": temperature, **seed}
