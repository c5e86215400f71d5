"""Texts of one request, each embedded by its own expert.

One call for each expert that any text goes to, all at once: experts of one encoder compute them as one batch. Their
vectors are of one space, since their documents' side is the same. The answer says of each vector whose it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import orjson

from experts.embedding.request import texts_of
from experts.errors import ExpertError, ExpertTimeoutError, ExpertUnavailableError
from experts.expert import ExpertRequest, Part, Usage
from router_service.core.calls import Caller
from routers.contracts import Decision
from routers.policy import Fallbacks

_ROUTED = "the router chose it for {} of {} texts"
_FELL_BACK = "it is next for {} of {} texts"

T = TypeVar("T")

Items = dict[int, dict[str, Any]]
"""By a text's place: its item of the answer."""


async def embed_routed(
    decisions: Sequence[Decision], request: ExpertRequest, caller: Caller, fallbacks: Fallbacks
) -> AsyncIterator[Part]:
    """The one part of the answer. Where an expert cannot answer, or not in time, its texts go to the next they rank.

    Raises what an expert raised that was the last that could be tried.
    """
    texts = texts_of(request.body)
    if fallbacks.attempt_timeout_s is not None:
        request = replace(request, timeout_s=min(request.timeout_s, fallbacks.attempt_timeout_s))
    items: Items = {}
    tokens = 0
    for attempt in range(min(fallbacks.max_attempts, min(len(decision.ranking) for decision in decisions))):
        groups: dict[str, list[int]] = {}
        for place in set(range(len(texts))) - set(items):
            groups.setdefault(decisions[place].ranking[attempt].expert, []).append(place)
        calls = [
            _embed(caller, expert, request, {place: texts[place] for place in sorted(places)}, attempt, len(texts))
            for expert, places in groups.items()
        ]
        failures: list[ExpertError] = []
        for answer in await _together(calls):
            if isinstance(answer, ExpertError):
                failures.append(answer)
            else:
                items |= answer[0]
                tokens += answer[1].input_tokens
        if not failures:
            break
    else:
        raise failures[0]
    usage = Usage(input_tokens=tokens)
    yield Part(_answer([items[place] for place in range(len(texts))], usage), usage)


async def _together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all calls give. Where one raises, the others are stopped, and have ended, before it is raised here."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _embed(
    caller: Caller, expert: str, request: ExpertRequest, texts: Mapping[int, str], attempt: int, total: int
) -> tuple[Items, Usage] | ExpertError:
    """An expert's items, or why another must be asked. What is the request's own fault is raised."""
    body = {**request.body, "input": list(texts.values())}
    why = (_FELL_BACK if attempt else _ROUTED).format(len(texts), total)
    try:
        part = await caller.embed(expert, replace(request, body=body), why=why)
    except (ExpertUnavailableError, ExpertTimeoutError) as error:
        return error
    data = orjson.loads(part.data)["data"]
    items = {place: {**item, "index": place, "expert": expert} for place, item in zip(texts, data, strict=True)}
    return items, part.usage or Usage()


def _answer(items: Sequence[Mapping[str, Any]], usage: Usage) -> bytes:
    experts = list(dict.fromkeys(item["expert"] for item in items))
    tokens = usage.input_tokens
    return orjson.dumps(
        {
            "object": "list",
            "data": items,
            "model": ", ".join(experts),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )
