"""How soon the first word of a streamed answer comes, and how much memory the whole service takes."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from router_service.bench.load import Answer, ask_all
from router_service.bench.processes import descendants, pss_bytes, title_of
from router_service.bench.service import service

_WARM_UP = 8


def measure_first_token(*, clients: int, requests: int, ray: bool) -> dict[str, Any]:
    """Milliseconds to the first word with `clients` streaming at once, and PSS over the process tree in MiB.

    The questions go to `auto` on the pocket fleet, each a different one, so that every one is embedded and routed.
    """
    options = () if ray else ("--no-ray",)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, service(Path(name), options=options) as running:
        asyncio.run(ask_all(running.url, _bodies(_WARM_UP, start=10_000), connections=clients))
        answers = asyncio.run(ask_all(running.url, _bodies(requests, start=0), connections=clients))
        memory = _memory(running.process.pid)
    return {
        "host": "Ray Serve" if ray else "uvicorn",
        "clients": clients,
        "requests": requests,
        "first_token_ms": _milliseconds(answers),
        "memory_mib": sum(memory.values()),
        "memory_mib_by_process": dict(memory.most_common()),
    }


def _bodies(count: int, *, start: int) -> list[dict[str, Any]]:
    questions = ("What is {} + {}?", "Sort these numbers: {} {}", "Write {} as a Roman numeral, not {}.")
    return [
        {
            "model": "auto",
            "stream": True,
            "max_tokens": 48,
            "messages": [{"role": "user", "content": questions[n % len(questions)].format(n % 90 + 10, n // 90 + 10)}],
        }
        for n in range(start, start + count)
    ]


def _milliseconds(answers: list[Answer]) -> dict[str, float]:
    times = [1000 * answer.first_s for answer in answers if answer.first_s]
    return {"median": round(median(times), 1), "p90": round(quantiles(times, n=10)[-1], 1), "answers": len(times)}


def _memory(root: int) -> Counter[str]:
    memory: Counter[str] = Counter()
    for process in descendants(root):
        words = title_of(process).split()
        if words:
            name = next((word for word in words if not word.startswith("-") and "python" not in word), words[0])
            memory[Path(name).name] += pss_bytes(process) >> 20
    return memory
