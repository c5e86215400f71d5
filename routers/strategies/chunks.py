"""The chunks of a streamed answer, checked once: what an expert sends has this shape, or is no chunk.

Only the fields that strategies read are checked; all others pass.
"""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experts.errors import ExpertUnavailableError

_ROUNDING = 1e-3  # by which a log-probability may be above 0
Logprob = Annotated[float, Field(le=_ROUNDING, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Token(_Shape):
    logprob: Logprob


class _Logprobs(_Shape):
    """Of a chat's chunk (`content`), or of a completion's."""

    content: list[_Token] | None = None
    token_logprobs: list[Logprob | None] | None = None


class _Function(_Shape):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(_Shape):
    index: Index = 0
    function: _Function | None = None


class _Delta(_Shape):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _Choice(_Shape):
    index: Index = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Chunk(_Shape):
    choices: list[_Choice] | None = None


def read_chunk(data: bytes, expert: str) -> dict[str, Any]:
    """The JSON of one chunk. Raises `ExpertUnavailableError` for what is none, naming the `expert` that sent it."""
    try:
        _Chunk.model_validate_json(data)
        chunk: dict[str, Any] = orjson.loads(data)
    except (ValidationError, orjson.JSONDecodeError) as error:
        raise ExpertUnavailableError(f"expert {expert!r} sent what is no chunk of an answer") from error
    return chunk
