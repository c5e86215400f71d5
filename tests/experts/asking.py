"""Asking an expert of this process, as tests do."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from experts.expert import Endpoint, Expert, ExpertRequest, Part

TEXT = "Tell me: 12 + 30?"
ENDLESS = {"max_tokens": 480, "ignore_eos": True}


def ask(
    text: str = TEXT,
    *,
    endpoint: Endpoint = "chat/completions",
    timeout_s: float = 60,
    tenant: str = "",
    **body: Any,
) -> ExpertRequest:
    prompt = {"messages": [{"role": "user", "content": text}]} if endpoint == "chat/completions" else {"prompt": text}
    body = {"model": "auto", "max_tokens": 12, "temperature": 0, **prompt, **body}
    return ExpertRequest(id="req-1", endpoint=endpoint, body=body, timeout_s=timeout_s, tenant=tenant)


async def run(expert: Expert, request: ExpertRequest) -> list[Part]:
    return [part async for part in expert.generate(request)]


async def answer(expert: Expert, request: ExpertRequest) -> dict[str, Any]:
    [part] = await run(expert, request)
    reply: dict[str, Any] = orjson.loads(part.data)
    assert part.usage is not None
    assert reply["usage"]["prompt_tokens"] == part.usage.input_tokens
    assert reply["usage"]["completion_tokens"] == part.usage.output_tokens
    return reply


async def text_of(expert: Expert, request: ExpertRequest) -> str:
    choice = (await answer(expert, request))["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # another thread's doing, which sets no event
            await asyncio.sleep(0.005)
