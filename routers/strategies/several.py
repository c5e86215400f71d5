"""What strategies that ask several experts have in common: one answer, and the policy's fallbacks where there is none.

Those that a strategy asks are its first attempt, with `attempt_timeout_s` for each of them. Where nobody of them
answered, the others of the ranking are asked one after the other, as `single` does it, while attempts and time last.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from experts.errors import ExpertError
from experts.expert import ExpertRequest, Part
from routers.contracts import Call, Decision
from routers.policy import Fallbacks
from routers.strategies.base import BaseStrategy, StrategyOptions
from routers.strategies.replies import check_one_choice
from routers.strategies.single import SingleStrategy, all_failed, another_may

OptionsT = TypeVar("OptionsT", bound=StrategyOptions)


class SeveralStrategy(BaseStrategy[OptionsT]):
    """A strategy that makes one answer of several experts'. A subclass says how, in `answer`."""

    @abstractmethod
    def answer(self, decision: Decision, request: ExpertRequest, call: Call) -> AsyncGenerator[Part, None]:
        """The parts of the answer. Raises `ExpertError` before the first of them where nobody answered."""

    async def run(self, decision: Decision, request: ExpertRequest, call: Call) -> AsyncGenerator[Part, None]:
        """The parts of `answer`, or of the first of the other experts that answers in its stead.

        Raises `ExpertError`: what broke an answer that had begun, the request's fault, or what all failed of.
        """
        check_one_choice(request)
        clock = asyncio.get_running_loop().time
        deadline = clock() + request.timeout_s
        asked: set[str] = set()

        def noted(expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
            asked.add(expert)
            return call(expert, request, why=why)

        begun = False
        try:
            async with aclosing(self.answer(decision, request, noted)) as parts:
                async for part in parts:
                    begun = True
                    yield part
            return
        except ExpertError as error:
            if begun or not another_may(error):
                raise
            failed = error
        others = [candidate for candidate in decision.ranking if candidate.expert not in asked]
        left, attempts = deadline - clock(), self.fallbacks.max_attempts - 1
        if not others or not attempts or left <= 0:
            raise failed
        rest = self._rest(replace(decision, ranking=others), replace(request, timeout_s=left), call, failed)
        async with aclosing(rest) as parts:
            async for part in parts:
                yield part

    async def _rest(
        self, decision: Decision, request: ExpertRequest, call: Call, failed: ExpertError
    ) -> AsyncGenerator[Part, None]:
        first = f"fallback: {self.name} failed: {failed}"

        def named(expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
            return call(expert, request, why=first if expert == decision.ranking[0].expert else why)

        fallbacks = Fallbacks(
            max_attempts=self.fallbacks.max_attempts - 1, attempt_timeout_s=self.fallbacks.attempt_timeout_s
        )
        begun = False
        try:
            async with aclosing(SingleStrategy(fallbacks).run(decision, request, named)) as parts:
                async for part in parts:
                    begun = True
                    yield part
        except ExpertError as error:
            if begun or not another_may(error):
                raise
            raise all_failed({self.name: failed, "fallbacks": error}) from error
