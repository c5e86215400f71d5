"""From a query to the bias of a gate: the seam between GLIDER's global half and an engine that mixes adapters.

    guide = Guide(load_router(folder), writer="some-expert")
    guidance = await guide(query, call)
    RequestMixture(bias=guidance.bias)          # `experts.mixing`: what this request asks of its gate

The writer is any expert of the fleet. It is told what the caller asked, and nothing else of the request: no label, tag
or session. What it wrote is kept by the content's hash, so a question that comes again costs no call, and the same
question asked by several callers at once is one call, of the first of them. Where there is no writer, or it fails, the
query's own embedding stands in, and the guidance says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

from experts.errors import ExpertError, ExpertUnavailableError
from experts.expert import ExpertRequest, Usage
from routers.contracts import Call, Query
from routers.errors import RouterConfigError
from routers.glider import GliderRouter, Guidance
from routers.registry import AnyRouter
from routers.strategies.deadline import until
from routers.strategies.replies import Ask, collect

MOST_WORDS = 60  # of an instruction
_MOST_TOKENS = 2 * MOST_WORDS
_CHARS_PER_TOKEN = 4
_STANDS_IN = "the query itself stands for its task"
_MOST_ASKED = 4_000  # characters of a query that a writer is shown
_PROMPT = (
    "Below is what somebody asked for. Do not answer it. Say in one general sentence, as an instruction, which kind of "
    "task it is, without the details of this one case.\n\nAsked:\n{asked}\n\nInstruction:"
)
_PROMPT_OF_EXAMPLES = (
    "Below are questions with their answers, all of the same kind. Say in one general sentence, as an instruction, "
    "which kind of task they are, without the details of any one case.\n\n{examples}\n\nInstruction:"
)


def prompt_for_query(text: str) -> str:
    """What a writer is asked about a query."""
    return _PROMPT.format(asked=text[:_MOST_ASKED])


def prompt_for_examples(examples: Sequence[tuple[str, str]]) -> str:
    """What a writer is asked about an expert, of whose task (question, answer) pairs are given."""
    share = _MOST_ASKED // max(1, len(examples))
    shown = (f"Question: {question[:share]}\nAnswer: {answer[:share]}" for question, answer in examples)
    return _PROMPT_OF_EXAMPLES.format(examples="\n\n".join(shown))


def clean_instruction(reply: str) -> str:
    """The instruction in a writer's reply: its first line that says something, without quotes; at most 60 words."""
    lines = (re.sub(r"^(Instruction:)?[\s\"'`*-]+|[\s\"'`*]+$", "", line) for line in reply.splitlines())
    return " ".join(next((line for line in lines if line), "").split()[:MOST_WORDS])


class Guide:
    """Gives each query its guidance. Belongs to one event loop."""

    def __init__(
        self, router: AnyRouter, *, writer: str | None = None, timeout_s: float = 10.0, remembered: int = 10_000
    ) -> None:
        if not isinstance(router, GliderRouter):
            raise RouterConfigError(f"a gate is guided by a 'glider' router, not by {router.name!r}")
        self.writer = writer
        self._router, self._timeout_s, self._remembered = router, timeout_s, remembered
        self._written: OrderedDict[str, str] = OrderedDict()
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def __call__(self, query: Query, call: Call | None = None) -> Guidance:
        """The guidance of one query. `call` asks the writer; without it only what was written before is known."""
        instruction, why = await self._instruction(query.text, call)
        (found,) = await asyncio.to_thread(self._router.guidance, [query.text], [instruction])
        return replace(found, why=why)

    async def _instruction(self, text: str, call: Call | None) -> tuple[str | None, str]:
        if self.writer is None:
            return None, f"no expert is configured to write instructions: {_STANDS_IN}"
        if not text.strip():
            return None, "the query has no text"
        key = hashlib.sha256(prompt_for_query(text).encode("utf-8", "replace")).hexdigest()
        try:
            if key not in self._written and call is not None:
                await self._have_written(key, text, call)
        except ExpertError as error:
            return None, f"{self.writer!r} wrote no instruction ({error}): {_STANDS_IN}"
        if key not in self._written:
            return None, f"{self.writer!r} was not asked: {_STANDS_IN}"
        self._written.move_to_end(key)
        return self._written[key], ""

    async def _have_written(self, key: str, text: str, call: Call) -> None:
        """Of callers with the same question one asks. If it fails or leaves the next one does, as long as it may."""
        by = asyncio.get_running_loop().time() + self._timeout_s
        turn = self._asking.setdefault(key, asyncio.Lock())
        async with until(by, "it is late with the same question of another caller"):
            await turn.acquire()
        try:
            if key not in self._written:
                self._written[key] = await self._write(text, call, by)
                while len(self._written) > self._remembered:
                    self._written.popitem(last=False)
        finally:
            turn.release()

    async def _write(self, text: str, call: Call, by: float) -> str:
        writer = self.writer or ""
        body = writer_body(writer, prompt_for_query(text))
        request = ExpertRequest(id=f"guide-{uuid.uuid4().hex}", endpoint="chat/completions", body=body)
        reply = await collect(call, Ask(expert=writer, body=body, why="the query's instruction"), request, by=by)
        instruction = clean_instruction(reply.text)
        if not instruction:
            raise ExpertUnavailableError("its answer is empty")
        return instruction


def writer_body(writer: str, prompt: str) -> Mapping[str, object]:
    """The body of a call that asks for an instruction."""
    return {
        "model": writer,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": _MOST_TOKENS,
        "temperature": 0,
    }


def writer_usage(text: str) -> Usage:
    """What a call for the instruction of a query is likely to use at most."""
    return Usage(len(prompt_for_query(text)) // _CHARS_PER_TOKEN + 1, _MOST_TOKENS, estimated=True)
