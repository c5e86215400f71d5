"""Who replies to the policy's searches while it is trained: recorded replies, a live fleet, or both.

Calls of all rollouts are concurrent. A recorded reply is one line of JSON: expert, sub-query, text, tokens. With a
fleet, what is not recorded is asked, and recorded; without one it is a call that failed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from experts.errors import ExpertError
from experts.expert import Expert, ExpertRequest, Usage
from routers.strategies.replies import Ask, collect
from routers.strategies.router_r1.protocol import NO_REPLY
from training.errors import TrainJobError


@dataclass(frozen=True, slots=True)
class Search:
    """A sub-query to an expert."""

    expert: str
    query: str


@dataclass(frozen=True, slots=True)
class Found:
    """What an expert replied. `failed` says that it did not, and `text` is `NO_REPLY`."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    failed: bool = False


_FAILED = Found(NO_REPLY, failed=True)


class Replies(Protocol):
    """Who replies to searches."""

    def replies(self, searches: Sequence[Search]) -> list[Found]:
        """A reply to each search, in their order."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """Experts of `source` under other names: `names` has the name that `source` knows of each."""

    source: Replies
    names: Mapping[str, str]

    def replies(self, searches: Sequence[Search]) -> list[Found]:
        """What the experts that are meant reply."""
        return self.source.replies([Search(self.names.get(one.expert, one.expert), one.query) for one in searches])


class Environment:
    """Replies to searches. `experts` are a live fleet's, by name; `recorded` is a file of replies.

    At most `concurrency` calls are under way, each with `timeout_s` and `reply_tokens`.
    """

    def __init__(
        self,
        experts: Mapping[str, Expert] | None = None,
        recorded: Path | None = None,
        *,
        concurrency: int = 32,
        timeout_s: float = 60.0,
        reply_tokens: int = 256,
    ) -> None:
        self._experts = dict(experts or {})
        self._path = recorded
        self._known = _read(recorded) if recorded and recorded.exists() else {}
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._reply_tokens = reply_tokens
        self._runner = asyncio.Runner()
        self.live_calls = 0

    def replies(self, searches: Sequence[Search]) -> list[Found]:
        """A reply to each search, in their order; the same search is asked once."""
        missing = [search for search in dict.fromkeys(searches) if search not in self._known]
        fresh = dict(zip(missing, self._runner.run(self._ask_all(missing)), strict=True)) if self._experts else {}
        self._record({search: found for search, found in fresh.items() if not found.failed})
        return [self._known.get(search) or fresh.get(search, _FAILED) for search in searches]

    def close(self) -> None:
        """End the live fleet."""
        self._runner.run(self._close())
        self._runner.close()

    async def _close(self) -> None:
        for expert in self._experts.values():
            await expert.close()

    async def _ask_all(self, searches: Sequence[Search]) -> list[Found]:
        places = asyncio.Semaphore(self._concurrency)

        async def ask(search: Search) -> Found:
            async with places:
                return await self._ask(search)

        return await asyncio.gather(*(ask(search) for search in searches))

    async def _ask(self, search: Search) -> Found:
        expert = self._experts.get(search.expert)
        if expert is None:
            return _FAILED
        self.live_calls += 1
        body = {
            "messages": [{"role": "user", "content": search.query}],
            "temperature": 0,
            "max_tokens": self._reply_tokens,
        }
        request = ExpertRequest(id="rollout", endpoint="chat/completions", body=body, timeout_s=self._timeout_s)
        by = asyncio.get_running_loop().time() + self._timeout_s
        try:
            reply = await collect(
                lambda _, request, *, why: expert.generate(request),
                Ask(expert=search.expert, body=body, why="rollout"),
                request,
                by=by,
            )
        except ExpertError:
            return _FAILED
        usage = next((part.usage for part in reversed(reply.parts) if part.usage), Usage())
        return Found(reply.text.strip() or NO_REPLY, usage.input_tokens, usage.output_tokens)

    def _record(self, fresh: Mapping[Search, Found]) -> None:
        self._known |= fresh
        if self._path is None or not fresh:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # what a killed run left of a line
        with self._path.open("a", encoding="utf-8") as file:
            for search, found in fresh.items():
                line = {**asdict(search), **asdict(found)}
                del line["failed"]
                file.write(json.dumps(line) + "\n")


def _read(path: Path) -> dict[Search, Found]:
    """Recorded replies. Raises `TrainJobError` for a line that is none; a last line that was cut off is left out."""
    known: dict[Search, Found] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            known[Search(one["expert"], one["query"])] = Found(one["text"], one["input_tokens"], one["output_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise TrainJobError(f"{path}, line {number} is no recorded reply: {error}") from error
    return known
