"""Instructions from examples, by a configured expert."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from experts.build import build_group, build_remotes
from experts.errors import ExpertError
from experts.expert import Expert, ExpertRequest
from experts.fleet import Fleet, load_fleet
from routers.guide import clean_instruction, prompt_for_examples, writer_body
from training.errors import TrainJobError
from training.glider.spec import Writer
from training.mixing.data import Example

SHOWN = 5
"""Examples that the writer sees; the paper shows three to five."""


def write_instruction(writer: Writer, examples: Sequence[Example]) -> str:
    """What the writer says that the examples' task is. Raises `TrainJobError`."""
    pairs = [(example.chat[-1]["content"], example.answers[0]) for example in examples[:SHOWN]]
    try:
        reply = asyncio.run(_ask(writer, prompt_for_examples(pairs)))
    except ExpertError as error:
        raise TrainJobError(f"{writer.expert!r} wrote no instruction: {error}") from error
    instruction = clean_instruction(reply)
    if not instruction:
        raise TrainJobError(f"{writer.expert!r} wrote no instruction: its answer is empty")
    return instruction


async def _ask(writer: Writer, prompt: str) -> str:
    expert = _build(load_fleet(writer.fleet), writer)
    try:
        body = writer_body(writer.expert, prompt)
        request = ExpertRequest(id="instruction", endpoint="chat/completions", body=body, timeout_s=120.0)
        data = b"".join([part.data async for part in expert.generate(request)])
        return str(json.loads(data)["choices"][0]["message"]["content"] or "")
    finally:
        await expert.close()


def _build(fleet: Fleet, writer: Writer) -> Expert:
    """That expert alone, and the model it runs on."""
    entry = next((entry for entry in fleet.experts if entry.name == writer.expert), None)
    if entry is None:
        known = ", ".join(entry.name for entry in fleet.experts)
        raise TrainJobError(f"{writer.fleet} has no expert {writer.expert!r}: there are {known}")
    if entry.remote:
        return build_remotes([entry])[entry.name]
    group = next(group for group in fleet.groups if entry in group.entries)
    only = tuple(adapter for adapter in group.adapters if adapter.name == entry.name)
    return build_group(group.model_copy(update={"adapters": only}))[entry.name]
