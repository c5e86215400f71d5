"""What a gate over many adapters costs a decoding step: `OMP_NUM_THREADS=1 python -m training.glider.speed`.

The pocket base with adapters of rank 16 on every projection, rows of a batch that each made 64 tokens before. Timed in
turns: the plain base, each row with an adapter of its own, GLIDER's gate free among all adapters, and the same left the
eight adapters that the global half chose for each row. It fills the table of docs/glider.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from experts.mixing import LayerAdapter, Mixture, RequestMixture, install_mixture, new_adapters
from experts.mixing.post_hoc import glider_bias
from training.doc_tables import fill_tables, markdown
from training.pocket.fleet import FLEET
from training.pocket.model import RANK
from training.results import RESULTS, write

COMMAND = "OMP_NUM_THREADS=1 python -m training.glider.speed"
DOCUMENT = Path("docs/glider.md")
EXPERTS, ROWS = (8, 64, 256), (1, 32)
LEFT, PAST, RUNS = 8, 64, 15
_WAYS = ("base", "own adapter", "free gate", "gate among 8")


def measure(experts: int, rows: int) -> dict[str, Any]:
    """Median milliseconds of a decoding step of `rows` rows, each way."""
    plain = AutoModelForCausalLM.from_pretrained(FLEET / "base", dtype=torch.float32).eval()
    mixed = AutoModelForCausalLM.from_pretrained(FLEET / "base", dtype=torch.float32).eval()
    mixture = install_mixture(mixed, _adapters(mixed, experts), "glider")
    generator = torch.Generator().manual_seed(0)
    for gate in mixture.gates.values():
        torch.nn.init.normal_(gate.get_parameter("vectors"), generator=generator)
    scores = glider_bias(torch.rand(rows, experts, generator=generator)).tolist()
    wishes = {
        "own adapter": [RequestMixture.only(mixture.adapters[row % experts]) for row in range(rows)],
        "free gate": [RequestMixture(bias=dict(zip(mixture.adapters, own, strict=True))) for own in scores],
        "gate among 8": [_narrowed(mixture, own) for own in scores],
    }
    cache = _past(plain, rows)
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    for run in range(RUNS + 2):
        for way in _WAYS:
            if way == "base":
                took = _step(plain, cache, rows)
            else:
                with mixture.requests(wishes[way]):
                    took = _step(mixed, cache, rows)
            if run >= 2:
                times[way].append(took)
    return {"adapters": experts, "rows": rows, "ms": {way: round(1e3 * median(own), 2) for way, own in times.items()}}


def _adapters(model: torch.nn.Module, experts: int) -> dict[str, dict[str, LayerAdapter]]:
    """Random adapters that all do something."""
    made = new_adapters(model, experts=experts, rank=RANK)
    return {
        name: {layer: LayerAdapter(part.a, torch.randn_like(part.b) * 0.01, part.scale) for layer, part in own.items()}
        for name, own in made.items()
    }


def _narrowed(mixture: Mixture, bias: Sequence[float]) -> RequestMixture:
    kept = sorted(range(len(bias)), key=lambda e: -bias[e])[:LEFT]
    left = {name: bias[e] if e in kept else -torch.inf for e, name in enumerate(mixture.adapters)}
    return RequestMixture(bias=left)


def _past(model: Any, rows: int) -> DynamicCache:
    """What rows of 64 tokens leave behind."""
    tokens = torch.randint(10, 200, (rows, PAST), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache: DynamicCache = model(input_ids=tokens, use_cache=True).past_key_values
    return cache


@torch.inference_mode()
def _step(model: Any, cache: DynamicCache, rows: int) -> float:
    """Seconds of one step, which the cache forgets again."""
    tokens = torch.full((rows, 1), 42)
    started = time.perf_counter()
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    took = time.perf_counter() - started
    cache.crop(-1)
    return took


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of a step, and in how many times the base's."""
    head = ["adapters", "rows", "base, ms", *(f"{way}, ms (times the base)" for way in _WAYS[1:])]
    rows = []
    for record in records:
        ms = record["ms"]
        ways = [f"{ms[way]:.2f} ({ms[way] / ms['base']:.2f})" for way in _WAYS[1:]]
        rows.append([str(record["adapters"]), str(record["rows"]), f"{ms['base']:.2f}", *ways])
    return markdown(head, rows)


def main() -> None:
    """Measure all."""
    from kernels.bench import machine

    records = [measure(experts, rows) for experts in EXPERTS for rows in ROWS]
    write("glider-speed", {"machine": machine(), "records": records}, command=COMMAND)
    found = json.loads((RESULTS / "glider-speed.json").read_bytes())["results"]["records"]
    document = fill_tables(DOCUMENT.read_text("utf-8"), lambda name: table(found) if name == "speed" else None)
    DOCUMENT.write_text(document, "utf-8")


if __name__ == "__main__":
    main()
