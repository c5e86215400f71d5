"""The engine of local experts beside PEFT's mixed batches, PEFT one by one, and the base's static batching."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.build import build_group
from experts.expert import ExpertRequest, Part
from experts.fleet import POCKET_FLEET, ExpertGroup, LocalSource, load_fleet
from experts.local.expert import LocalExpert

_QUESTIONS = (
    "What is {a} plus {b}?",
    "Sort these numbers: {a}, {b}, {c}",
    "How many metres are {a} kilometres?",
    "Write {a} as a Roman numeral.",
    "Reverse the word number{b}",
    "Which day comes {c} days after 2024-03-{d:02d}?",
)


def questions(n: int, seed: int = 0) -> list[str]:
    """Short questions of different lengths."""
    rng = random.Random(seed)
    numbers = [{"a": rng.randrange(1000), "b": rng.randrange(100), "c": rng.randrange(50)} for _ in range(n)]
    return [_QUESTIONS[i % len(_QUESTIONS)].format(**one, d=1 + i % 28) for i, one in enumerate(numbers)]


@dataclass(frozen=True)
class Bench:
    """A base with adapters, as an expert of ours and as files for PEFT."""

    expert: LocalExpert
    experts: Mapping[str, Any]
    base: Path
    adapters: Mapping[str, Path]

    async def close(self) -> None:
        for expert in self.experts.values():
            await expert.close()


def pocket_group(*, max_batch: int, max_adapters: int) -> ExpertGroup:
    """The pocket base with its adapters, with room for so many answers and adapters at once."""
    group = load_fleet(POCKET_FLEET).groups[0]
    source = group.head.local or LocalSource(model="")
    local = source.model_copy(update={"max_batch": max_batch, "max_queue": 4096, "max_adapters": max_adapters})
    return group.model_copy(update={"head": group.head.model_copy(update={"local": local})})


async def open_bench(adapters: int, *, max_batch: int = 64, max_adapters: int = 32) -> Bench:
    """The pocket base with `adapters` adapters `a0`, `a1` ...: the fleet's own, under many names."""
    group = pocket_group(max_batch=max_batch, max_adapters=max_adapters)
    experts = build_group(group)
    expert = experts[group.name]
    paths = [Path(entry.adapter.path) for entry in group.adapters if entry.adapter]
    named = {f"a{i}": paths[i % len(paths)] for i in range(adapters)}
    for name, path in named.items():
        await expert.load_adapter(name, str(path))
    return Bench(expert, experts, Path(group.head.local.model), named)


async def ask(bench: Bench, text: str, adapter: str | None, *, tokens: int, **body: Any) -> Part:
    """One answer of exactly `tokens` tokens."""
    name = bench.expert.name
    body = {
        "model": name if adapter is None else f"{name}+{adapter}",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **body,
    }
    request = ExpertRequest(id="bench", endpoint="chat/completions", body=body, timeout_s=600)
    return [part async for part in bench.expert.generate(request)][-1]
