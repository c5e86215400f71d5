"""Prompts to collect answers to: JSON lines of `{"id", "query" | "messages", "task"?, "answer"?, "grader"?, "split"?}`.

`answer` is one right answer or a list of them, text or number. `grader` overrides the run's grader, `split` its share
of test rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.errors import CollectError
from training.graders import GraderName

Split = Literal["train", "test"]


class Message(BaseModel):
    """One turn of a chat. Text only: what an image costs cannot be bounded beforehand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class Prompt(BaseModel):
    """One prompt. `messages` is a chat in OpenAI's form; `query` stands for a chat of one user message."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    id: str = Field(min_length=1, max_length=256)
    query: str | None = Field(default=None, min_length=1)
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1)
    task: str = ""
    answer: str | tuple[str, ...] = ()
    grader: GraderName | None = None
    split: Split | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.query is None) == (self.messages is None):
            raise ValueError("give either query or messages")
        return self

    @property
    def chat(self) -> Sequence[Mapping[str, str]]:
        """The messages to send."""
        turns = self.messages or (Message(role="user", content=self.query or ""),)
        return [turn.model_dump() for turn in turns]

    @property
    def answers(self) -> Sequence[str]:
        """The answers that count as right."""
        return (self.answer,) if isinstance(self.answer, str) else self.answer


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file. Raises `CollectError`, which names line and field."""
    prompts: dict[str, Prompt] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would part a text at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise CollectError(f"cannot read prompts: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompt = _parse(line, f"{path}:{number}")
            if prompt.id in prompts:
                raise CollectError(f"{path}:{number}: id {prompt.id!r} is there twice")
            prompts[prompt.id] = prompt
    if not prompts:
        raise CollectError(f"{path} holds no prompts")
    return list(prompts.values())


def split_of(text: str, test_share: float) -> Split:
    """`train` or `test` by a hash of the routed text: it stays where it is when others join, and equal texts together.

    A question that many users ask must not be learnt in one split and measured in the other.
    """
    draw = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64
    return "test" if draw < test_share else "train"


def _parse(line: str, where: str) -> Prompt:
    try:
        return Prompt.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "line"
        raise CollectError(f"{where}: {field}: {first['msg']}") from error
