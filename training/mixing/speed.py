"""What a training pass costs through a mixing layer, beside PEFT's plain LoRA layer of equal total rank.

`python -m training.mixing.speed` times forward and backward of one linear layer, the gate included, the two in turns,
and writes docs/results/mixing-speed.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from experts.mixing import fresh_adapters, install_mixture

RESULTS = Path("docs/results/mixing-speed.json")
COMMAND = "OMP_NUM_THREADS=1 python -m training.mixing.speed"
SHAPES = [(1024, 192, 8, 8), (1024, 1024, 8, 8), (1024, 1024, 8, 16), (1024, 4096, 8, 8), (256, 4096, 8, 16)]
_SECONDS = 2.0


class _Model(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(dim, dim, bias=False)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers[0]["up_proj"](x)  # type: ignore[index]
        return y


def measure(tokens: int, dim: int, experts: int, rank: int) -> dict[str, float | int]:
    """Milliseconds, forward and backward, of `experts` adapters of `rank` under a top-2 gate, and of one LoRA."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    mixed = _Model(dim)
    mixture = install_mixture(mixed, fresh_adapters(mixed, "mola", experts=experts, rank=rank), "mola")
    mixture.prepare_training()
    config = LoraConfig(r=experts * rank, lora_alpha=2 * experts * rank, target_modules=["up_proj"])
    plain = get_peft_model(_Model(dim), config)
    x = torch.randn(tokens, dim, requires_grad=True)  # as in the middle of a model
    dy = torch.randn(tokens, dim)
    calls = {"mixture": _training_pass(mixed, x, dy), "lora": _training_pass(plain, x, dy)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    while sum(map(sum, times.values())) < _SECONDS:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    figures = {f"{name}_ms": round(1e3 * median(own), 3) for name, own in times.items()}
    return {"tokens": tokens, "dim": dim, "experts": experts, "rank": rank, "runs": len(times["lora"]), **figures}


def _training_pass(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        torch.autograd.backward(model(x), dy)

    return call


def main() -> None:
    """Measure all shapes."""
    from kernels.bench import machine

    records = [measure(*shape) for shape in SHAPES]
    results = {"command": COMMAND, "machine": machine(), "records": records}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.write(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
