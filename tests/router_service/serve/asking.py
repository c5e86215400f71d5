"""Requests to experts behind handles."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from experts.errors import ExpertUnavailableError
from experts.expert import Expert, ExpertRequest, Part
from router_service.serve.handle import HandleExpert

END = 256  # the token that ends an answer


def handle_expert(name: str, group: str | None = None) -> HandleExpert:
    from ray import serve

    from router_service.serve.applications import EXPERTS, experts_app

    handle = serve.get_deployment_handle(EXPERTS, app_name=experts_app(group or name))
    return HandleExpert(name, handle)


def request(max_tokens: int = 8, **fields: Any) -> ExpertRequest:
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "logit_bias": {str(END): -100},
        **fields,
    }
    return ExpertRequest(id="chatcmpl-1", endpoint="chat/completions", body=body)


async def parts_of(expert: Expert, asked: ExpertRequest) -> list[Part]:
    return [part async for part in expert.generate(asked)]


def text_of(parts: list[Part]) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for part in parts
        if part.data
        for choice in orjson.loads(part.data)["choices"]
    )


async def eventually(expert: Expert, seconds: float = 60.0) -> list[Part]:
    """The parts of a short answer, once the expert gives one."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                return await parts_of(expert, request())
            except ExpertUnavailableError:
                await asyncio.sleep(0.05)
