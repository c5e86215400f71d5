"""Examples: a chat with its answer, and, for gates that are trained one by one, whose adapter's data it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import ValidationError, model_validator

from training.errors import TrainJobError
from training.prompts import Prompt

if TYPE_CHECKING:
    from datasets import Dataset

ADAPTER = "adapter"


class Example(Prompt):
    """A prompt as `collect` takes it, with its answer; `id` may be left out."""

    id: str = "-"
    adapter: str | None = None

    @model_validator(mode="after")
    def _answered(self) -> Self:
        if not self.answers:
            raise ValueError("an answer is needed to learn from")
        return self


def read_examples(path: Path) -> list[Example]:
    """All examples of a file. Raises `TrainJobError`, which names line and field."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainJobError(f"cannot read examples: {error}") from error
    examples = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise TrainJobError(f"{path} holds no examples")
    return examples


def _parse(line: str, where: str) -> Example:
    try:
        return Example.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "line"
        raise TrainJobError(f"{where}: {field}: {first['msg']}") from error


def dataset(examples: Sequence[Example], adapters: Sequence[str], *, alone: bool) -> Dataset:
    """Examples as SFTTrainer takes them. `alone`: each must name one of the adapters, whose number goes with it."""
    from datasets import Dataset

    if alone:
        for number, example in enumerate(examples, 1):
            if example.adapter not in adapters:
                message = (
                    f"its gates are trained one by one: name one of {', '.join(adapters)}, not {example.adapter!r}"
                )
                raise TrainJobError(f"example {number}: adapter: {message}")
    rows = [
        {
            "prompt": list(example.chat),
            "completion": [{"role": "assistant", "content": example.answers[0]}],
            **({ADAPTER: adapters.index(example.adapter or "")} if alone else {}),
        }
        for example in examples
    ]
    return Dataset.from_list(rows)


class Collator:
    """SFTTrainer's own, which pads, with each example's adapter beside it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = dict(self._inner([{k: v for k, v in row.items() if k != ADAPTER} for row in rows]))
        if ADAPTER in rows[0]:
            batch[ADAPTER] = torch.tensor([row[ADAPTER] for row in rows])
        return batch
