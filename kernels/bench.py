"""What the mixture kernel costs beside the ways that are usual now, as records that can be written as JSON.

All ways of one shape are timed in turns, so that a busy machine slows all of them alike; each figure is the median of
its runs. Ways whose memory would pass `memory_limit` are left out and recorded as such.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor, nn

from kernels.mixed import mixed_lora
from kernels.stack import AdapterStack

MIXED_RANKS = (4, 8, 16, 64)


class Record(TypedDict):
    """One way at one shape. `milliseconds` is None where it was left out.

    `extra_bytes` is the size of its largest temporary by formula; nothing of memory is measured.
    """

    way: str
    tokens: int
    experts: int
    rank: str
    dim: int
    slots: int
    dtype: str
    device: str
    threads: int
    milliseconds: float | None
    runs: int
    extra_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Which shapes to time. The default is the whole grid; ranks are numbers or "mixed" (4, 8, 16, 64 in turn)."""

    tokens: Sequence[int] = (1, 8, 32, 256)
    experts: Sequence[int] = (8, 64, 256, 1024)
    ranks: Sequence[int | str] = (8, 16, 64, "mixed")
    dims: Sequence[int] = (1024, 4096)
    slots: int = 2
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seconds: float = 0.5  # of measuring for each way and shape
    memory_limit: int = 4 * 2**30  # bytes

    def shapes(self) -> Iterator[tuple[int, int | str, int, int]]:
        """(dim, rank, experts, tokens), so that neighbours share their adapters."""
        return itertools.product(self.dims, self.ranks, self.experts, self.tokens)


@dataclass(slots=True, eq=False)
class _Case:
    """The inputs of one shape, in the layouts that the ways want."""

    x: Tensor
    stack: AdapterStack
    indices: Tensor
    weights: Tensor
    padded: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # equal ranks: what gather, Arrow and others need

    @property
    def rank(self) -> int:
        return self.stack.max_rank


def bench_kernels(plan: Plan | None = None, *, on_record: Callable[[Record], None] | None = None) -> list[Record]:
    """Time every way at every shape of `plan`; `on_record` sees each record as it comes."""
    plan = plan or Plan()
    records: list[Record] = []
    for shape in plan.shapes():
        for record in _shape_records(plan, *shape):
            records.append(record)
            if on_record is not None:
                on_record(record)
    return records


def machine() -> dict[str, str | int]:
    """What a figure needs beside it to mean something."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()) or platform.machine(),
        "gpu": gpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def _shape_records(plan: Plan, dim: int, rank: int | str, experts: int, tokens: int) -> Iterator[Record]:
    ranks = [MIXED_RANKS[e % len(MIXED_RANKS)] if rank == "mixed" else int(rank) for e in range(experts)]
    size = torch.finfo(plan.dtype).bits // 8
    needs = {way: need(tokens, plan.slots, experts, max(ranks), dim) * size for way, (_, need) in _WAYS.items()}
    stack = 2 * sum(ranks) * dim * size
    copies = 2 * experts * max(ranks) * dim * size  # of equal ranks, or in another layout, that the other ways take
    held = {way: stack if way in _ON_STACK else stack + copies for way in _WAYS}
    fitting = [way for way, need in needs.items() if need + held[way] <= plan.memory_limit]
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    if fitting:
        case = _case(plan, dim, ranks, tokens, padded=not _ON_STACK.issuperset(fitting))
        calls = {way: _WAYS[way][0](case) for way in fitting}
        times |= _times(calls, plan)
    for way, runs in times.items():
        yield Record(
            way=way,
            tokens=tokens,
            experts=experts,
            rank=str(rank),
            dim=dim,
            slots=plan.slots,
            dtype=str(plan.dtype).removeprefix("torch."),
            device=plan.device,
            threads=torch.get_num_threads(),
            milliseconds=1e3 * statistics.median(runs) if runs else None,
            runs=len(runs),
            extra_bytes=needs[way],
        )


def _case(plan: Plan, dim: int, ranks: list[int], tokens: int, *, padded: bool = True) -> _Case:
    torch.manual_seed(0)
    options = {"dtype": plan.dtype, "device": plan.device}
    adapters = [[(torch.randn(r, dim, **options), torch.randn(dim, r, **options))] for r in ranks]  # type: ignore[call-overload]
    top = max(ranks)
    equal = [
        (nn.functional.pad(A, (0, 0, 0, top - len(A))), nn.functional.pad(B, (0, top - len(A))))
        for ((A, B),) in adapters
        if padded
    ]
    indices = torch.rand(tokens, len(ranks), device=plan.device).topk(plan.slots).indices
    weights = torch.rand(tokens, plan.slots, device=plan.device).softmax(1)
    stack = AdapterStack.pack(adapters, [1.0] * len(ranks))
    return _Case(torch.randn(tokens, dim, **options), stack, indices, weights, equal)  # type: ignore[call-overload]


def _times(calls: dict[str, Callable[[], Tensor]], plan: Plan) -> dict[str, list[float]]:
    """Seconds of each run, the ways taking turns until each had its time, at least three runs and at most 1000."""
    times: dict[str, list[float]] = {way: [] for way in calls}
    for call in calls.values():  # build, compile, fill caches
        call()
    while waiting := [w for w, t in times.items() if len(t) < 3 or (sum(t) < plan.seconds and len(t) < 1000)]:
        for way in waiting:
            _synchronise(plan.device)
            start = time.perf_counter()
            calls[way]()
            _synchronise(plan.device)
            times[way].append(time.perf_counter() - start)
    return times


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _ours(case: _Case) -> Callable[[], Tensor]:
    return lambda: mixed_lora(case.x, case.stack, case.indices, case.weights)


def _loop(case: _Case) -> Callable[[], Tensor]:
    """One adapter after another: select its tokens, two products, add back."""
    pairs = [(A.T.contiguous(), B.T.contiguous()) for ((A, B),) in map(case.stack.adapter, range(case.stack.experts))]

    def call() -> Tensor:
        y = torch.zeros_like(case.x)
        for e in case.indices.unique().tolist():
            token, slot = (case.indices == e).nonzero(as_tuple=True)
            weight = case.weights[token, slot, None].to(case.x.dtype)
            y.index_add_(0, token, weight * (case.x[token] @ pairs[e][0]) @ pairs[e][1])
        return y

    return call


def _gather(case: _Case) -> Callable[[], Tensor]:
    """Copy each pair's adapter, then two batched products."""
    A, B = (torch.stack(side) for side in zip(*case.padded, strict=True))

    def call() -> Tensor:
        hidden = torch.einsum("tkrd,td->tkr", A[case.indices], case.x)
        return torch.einsum("tkor,tkr->to", B[case.indices], hidden * case.weights[..., None].to(case.x.dtype))

    return call


def _stacked(case: _Case) -> Callable[[], Tensor]:
    """Two dense products over all adapters, what is not chosen being zero."""
    return lambda: mixed_lora(case.x, case.stack, case.indices, case.weights, backend="stacked")


def _arrow(case: _Case) -> Callable[[], Tensor]:
    """PEFT's Arrow layer, with its own choice of k adapters."""
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer
    from peft.tuners.lora.config import ArrowConfig

    lora_A, lora_B, scaling = _peft_modules(case)
    config = ArrowConfig(top_k=case.indices.shape[1])
    config.task_adapter_names = []  # read from the modules below
    arrow = ArrowLoraLinearLayer(case.x.shape[1], config)
    arrow.on_adapter_change(lora_A, lora_B)
    arrow.build_prototypes(lora_A, lora_B)
    arrow.to(case.x.device)

    @torch.no_grad()
    def call() -> Tensor:
        y: Tensor = arrow(case.x, lora_A, lora_B, dropout=nn.Identity(), scaling=scaling)
        return y

    return call


def _adapter_names(case: _Case) -> Callable[[], Tensor]:
    """PEFT's batches of mixed adapters: one adapter a row, so one call for each slot, weighted by the caller."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    dim = case.x.shape[1]
    base = nn.Linear(dim, dim, bias=False, device=case.x.device, dtype=case.x.dtype)
    layer = Linear(base, "0", LoraConfig(r=case.rank), r=case.rank, lora_alpha=case.rank)
    layer.lora_A, layer.lora_B, scaling = _peft_modules(case)
    layer.lora_dropout = nn.ModuleDict({name: nn.Identity() for name in scaling})
    layer.scaling, layer.use_dora = scaling, dict.fromkeys(scaling, False)
    layer._active_adapter = list(scaling)
    layer.base_layer = _Nothing()
    names = [[str(e) for e in slot] for slot in case.indices.T.tolist()]

    @torch.no_grad()
    def call() -> Tensor:
        outputs = (layer._mixed_batch_forward(case.x, adapter_names=slot) for slot in names)
        return sum(
            (w[:, None].to(case.x.dtype) * y for w, y in zip(case.weights.T, outputs, strict=True)), torch.zeros(())
        )

    return call


class _Nothing(nn.Module):
    """In place of the base layer, which no other way computes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _peft_modules(case: _Case) -> tuple[nn.ModuleDict, nn.ModuleDict, dict[str, float]]:
    sides = (nn.ModuleDict(), nn.ModuleDict())
    for e, matrices in enumerate(case.padded):
        for side, matrix in zip(sides, matrices, strict=True):
            module = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            module.weight = nn.Parameter(matrix, requires_grad=False)
            side[str(e)] = module
    return *sides, {str(e): 1.0 for e in range(len(case.padded))}


_ON_STACK = frozenset({"mixed_lora", "stacked_masked"})  # the ways that need no other copy of the adapters

# each way, and how many numbers its largest temporary has, given (tokens, slots, experts, rank, dim)
_WAYS: dict[str, tuple[Callable[[_Case], Callable[[], Tensor]], Callable[[int, int, int, int, int], int]]] = {
    "mixed_lora": (_ours, lambda t, k, _e, r, _d: t * k * r),
    "loop": (_loop, lambda t, _k, _e, _r, d: t * d),
    "gather_bmm": (_gather, lambda t, k, _e, r, d: t * k * r * d),
    "stacked_masked": (_stacked, lambda t, _k, e, r, _d: t * e * r),
    "peft_arrow": (_arrow, lambda t, _k, e, r, d: max(t * e * d, e * r * d)),
    "peft_adapter_names": (_adapter_names, lambda t, _k, _e, _r, d: t * d),
}
