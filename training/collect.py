"""Collect observations: every prompt to every expert, concurrently, resumable, under a cost ceiling, graded.

How an expert is reached is the caller's: `Ask` is the one seam. Before each call the most that it can cost is reserved
(`cost_bound`), so that the ceiling holds also over several runs and kills: the journal keeps what may have been spent.
An expert that bills for more than it was allowed to answer ends the run.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from experts.cards import ExpertCard
from experts.expert import Usage
from routers.contracts import Observation
from training.errors import CollectError, GradeError
from training.graders import GraderName, grade, judge_messages, judge_quality
from training.journal import Journal, Reply, call_key
from training.observations import ObservedQuery
from training.prompts import Prompt, split_of

Messages = Sequence[Mapping[str, str]]

_TEMPLATE_TOKENS = 256  # what a chat template may add once: a default system prompt, a date, the turn to answer
_TEMPLATE_TOKENS_PER_MESSAGE = 16


class AskError(Exception):
    """One try of a call failed.

    `retryable`: the same call may work later, after `retry_after_s` if the expert said so. `billed`: the expert may
    have worked for it, so the ceiling counts the call's bound.
    """

    def __init__(
        self, message: str, *, retryable: bool = False, billed: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.billed = billed
        self.retry_after_s = retry_after_s


class Ask(Protocol):
    """Sends one chat to one expert. Raises `AskError`, or `CollectError` when the whole run cannot go on."""

    async def __call__(self, card: ExpertCard, messages: Messages, max_tokens: int, temperature: float) -> Reply:
        """The whole answer with its tokens, its cost at the card's prices and how long it took."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to collect. `max_cost_usd` bounds the spending of all runs into the same journal, judge included.

    `temperature` is that of every call, the judge's included; 0 is greedy.
    """

    prompts: Sequence[Prompt]
    cards: Sequence[ExpertCard]
    grader: GraderName = "exact"
    judge: ExpertCard | None = None
    max_tokens: int = 1024
    temperature: float = 0.0
    max_cost_usd: float | None = None
    concurrency: int = 8
    attempts: int = 4
    backoff_s: float = 0.5

    def __post_init__(self) -> None:
        """Refuse at once what would fail after money was spent."""
        if self.max_cost_usd is not None and not (math.isfinite(self.max_cost_usd) and self.max_cost_usd >= 0):
            raise CollectError(f"the ceiling must be a finite number of USD from 0 up, not {self.max_cost_usd!r}")
        for prompt in self.prompts:
            grader = prompt.grader or self.grader
            if grader == "judge":
                if self.judge is None:
                    raise CollectError(f"prompt {prompt.id!r} is graded by a judge, and no judge is named")
            else:
                _check_gradable(prompt, grader)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """One pair that was asked and graded. Its cost is the expert's alone, without the judge's."""

    prompt: Prompt
    expert: str
    quality: float
    reply: Reply


@dataclass(slots=True)
class Collected:
    """What came of a run. The next run asks `failed` pairs again, and under a higher ceiling `unaffordable` ones."""

    total: int
    graded: list[Graded] = field(default_factory=list)
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    unaffordable: list[tuple[str, str]] = field(default_factory=list)
    spent_usd: float = 0.0

    @property
    def done(self) -> int:
        """Pairs that are settled one way or another."""
        return len(self.graded) + len(self.failed) + len(self.unaffordable)


def cost_bound(card: ExpertCard, messages: Messages, max_tokens: int) -> float:
    """The most that a call can cost, in USD.

    No tokenizer makes more tokens of a text than it has bytes in UTF-8; a chat template adds a bounded rest.
    """
    text = sum(len(str(message).encode()) for message in messages)
    tokens = text + _TEMPLATE_TOKENS + _TEMPLATE_TOKENS_PER_MESSAGE * len(messages)
    dearest = card.model_copy(update={"cached_input_price": None})
    return dearest.cost(Usage(input_tokens=tokens, output_tokens=max_tokens))


async def collect(
    plan: Plan, ask: Ask, journal: Journal, on_progress: Callable[[Collected], None] = lambda _: None
) -> Collected:
    """Ask and grade every pair that the journal does not hold; `on_progress` hears of each pair as it is settled.

    Raises `CollectError` when the run cannot go on; what was answered so far is in the journal.
    """
    run = _Run(plan, ask, journal, on_progress)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(plan.concurrency):
                group.create_task(run.work())
    except* CollectError as errors:
        raise errors.exceptions[0] from None
    return run.collected


class _UnaffordableError(Exception):
    """A call does not fit under the ceiling."""


class _Run:
    def __init__(self, plan: Plan, ask: Ask, journal: Journal, on_progress: Callable[[Collected], None]) -> None:
        self.collected = Collected(total=len(plan.prompts) * len(plan.cards), spent_usd=journal.spent_usd)
        self._plan = plan
        self._ask = ask
        self._journal = journal
        self._on_progress = on_progress
        self._pairs: Iterator[tuple[Prompt, ExpertCard]] = (
            (prompt, card) for prompt in plan.prompts for card in plan.cards
        )
        self._settled = asyncio.Condition()
        self._under_way = 0

    async def work(self) -> None:
        """Settle pairs until none is left."""
        for prompt, card in self._pairs:
            await self._settle(prompt, card)
            self.collected.spent_usd = self._journal.spent_usd
            self._on_progress(self.collected)

    async def _settle(self, prompt: Prompt, card: ExpertCard) -> None:
        try:
            reply = await self._call(card, prompt.chat, prompt.id)
            quality = await self._grade(prompt, reply)
        except (AskError, GradeError) as error:
            self.collected.failed.append((prompt.id, card.name, str(error)))
        except _UnaffordableError:
            self.collected.unaffordable.append((prompt.id, card.name))
        else:
            self.collected.graded.append(Graded(prompt=prompt, expert=card.name, quality=quality, reply=reply))

    async def _grade(self, prompt: Prompt, reply: Reply) -> float:
        grader = prompt.grader or self._plan.grader
        if grader != "judge" or self._plan.judge is None:
            return grade(grader, reply.text, prompt.answers)
        question = prompt.query or "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt.chat)
        asked = judge_messages(question, reply.text, prompt.answers)
        verdict = await self._call(self._plan.judge, asked, prompt.id, check=judge_quality)
        return judge_quality(verdict.text)

    async def _call(
        self, card: ExpertCard, messages: Messages, prompt: str, check: Callable[[str], object] = str
    ) -> Reply:
        """The journal's reply, or else a new one, tried a few times; one that fails `check` (`GradeError`) is none."""
        key = call_key(card.name, messages, self._plan.max_tokens, self._plan.temperature)
        if key in self._journal.replies:
            return self._journal.replies[key]
        for attempt in range(1, self._plan.attempts + 1):
            try:
                return await self._try(card, messages, prompt, key, check)
            except AskError as error:
                if not error.retryable or attempt == self._plan.attempts:
                    raise
                await asyncio.sleep(self._pause(attempt, error.retry_after_s))
        raise CollectError(f"attempts is {self._plan.attempts}, and must be at least 1")

    async def _try(
        self, card: ExpertCard, messages: Messages, prompt: str, key: str, check: Callable[[str], object]
    ) -> Reply:
        bound = cost_bound(card, messages, self._plan.max_tokens)
        call = await self._reserve(key, card.name, prompt, bound)
        try:
            reply = await self._ask(card, messages, self._plan.max_tokens, self._plan.temperature)
            check(reply.text)
        except AskError as error:
            self._journal.fail(call, str(error), bound if error.billed else 0.0)
            raise
        except GradeError as error:
            self._journal.fail(call, str(error), reply.cost_usd)
            raise AskError(str(error), retryable=True) from error
        else:
            self._journal.end(call, reply)
            self._check_bound(card, reply, bound)
            return reply
        finally:
            async with self._settled:
                self._under_way -= 1
                self._settled.notify_all()

    def _check_bound(self, card: ExpertCard, reply: Reply, bound: float) -> None:
        """Under a ceiling, go no further with an expert that bills more than its request allowed."""
        if self._plan.max_cost_usd is not None and reply.cost_usd > bound:
            raise CollectError(
                f"{card.name!r} billed {reply.output_tokens} output tokens where {self._plan.max_tokens} were allowed "
                f"({reply.cost_usd:.4f} USD, bound {bound:.4f}): no ceiling can be kept with it. Leave it out, or "
                "collect from it without a ceiling"
            )

    async def _reserve(self, key: str, expert: str, prompt: str, bound: float) -> int:
        """Wait until the bound fits beside the calls that are under way; it may never."""
        ceiling = self._plan.max_cost_usd
        async with self._settled:
            while ceiling is not None and self._journal.spent_usd + bound > ceiling:
                if self._under_way == 0:
                    raise _UnaffordableError
                await self._settled.wait()
            self._under_way += 1
            return self._journal.begin(key, expert, prompt, bound)

    def _pause(self, attempt: int, retry_after_s: float | None) -> float:
        """Seconds to wait: what was asked for, or exponential backoff with full jitter (no two workers in step)."""
        backoff: float = self._plan.backoff_s * 2**attempt * random.random()
        return max(backoff, retry_after_s or 0.0)


def _check_gradable(prompt: Prompt, grader: GraderName) -> None:
    try:
        grade(grader, "", prompt.answers)
    except GradeError as error:
        raise CollectError(f"prompt {prompt.id!r}: {error}") from error


def table_rows(
    graded: Sequence[Graded], text_of: Callable[[Prompt], str], test_share: float
) -> Iterator[ObservedQuery]:
    """The graded pairs as rows of a table, in the order of their ids. `text_of` a prompt is what is routed on."""
    by_prompt: dict[str, list[Graded]] = {}
    for one in graded:
        by_prompt.setdefault(one.prompt.id, []).append(one)
    for prompt_id, pairs in sorted(by_prompt.items()):
        prompt = pairs[0].prompt
        yield ObservedQuery(
            id=prompt_id,
            task=prompt.task,
            query=text_of(prompt),
            split=prompt.split or split_of(text_of(prompt), test_share),
            experts=[_observation(pair) for pair in sorted(pairs, key=lambda pair: pair.expert)],
        )


def _observation(pair: Graded) -> Observation:
    return Observation(
        query_id=pair.prompt.id,
        expert=pair.expert,
        quality=pair.quality,
        cost_usd=pair.reply.cost_usd,
        input_tokens=pair.reply.input_tokens,
        output_tokens=pair.reply.output_tokens,
        latency_s=pair.reply.latency_s,
        observed_at=pair.reply.at,
        confidence=pair.reply.confidence,
    )
