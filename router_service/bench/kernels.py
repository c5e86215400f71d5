"""The mixture kernel beside its alternatives, for all shapes asked for, as one JSON document and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from router_service.errors import SettingsError

OURS, ARROW = "mixed_lora", "peft_arrow"
_DTYPES = ("float32", "bfloat16", "float16")
_SHAPE = ("device", "dtype", "threads", "dim", "rank", "experts", "tokens", "slots")
_SLACK = 1.1  # slower than the best alternative by more than this counts as slower


@dataclass(frozen=True, slots=True)
class Shapes:
    """What to measure: the product of all lists. `ranks` are numbers or "mixed"."""

    dims: Sequence[int]
    ranks: Sequence[str]
    experts: Sequence[int]
    tokens: Sequence[int]
    dtype: str
    device: str
    threads: int


def measure_kernels(
    shapes: Shapes,
    *,
    seconds: float,
    memory_gib: float,
    out: Path | None = None,
    plot: Path | None = None,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Records of every way at every shape, with the machine, and what they come to; added to those in `out`."""
    import torch

    from kernels.bench import bench_kernels, machine

    plan = _plan(shapes, seconds, memory_gib)
    threads = torch.get_num_threads()
    torch.set_num_threads(shapes.threads)
    kept, this = _read(out), machine()
    total = len(list(plan.shapes()))
    done: dict[tuple[Any, ...], None] = {}

    def note(record: Mapping[str, Any]) -> None:
        kept[(*_shape(record), record["way"])] = {**record, "machine": this}
        done[_shape(record)] = None
        on_progress("shapes", len(done), total)

    try:
        bench_kernels(plan, on_record=note)
    finally:
        torch.set_num_threads(threads)
    records = sorted(kept.values(), key=lambda r: [str(v) if i in (0, 1, 4) else v for i, v in enumerate(_shape(r))])
    results = {
        "command": "router-service bench kernels --out docs/results/kernels.json --plot docs/results/kernels.png",
        "summary": summary(records),
        "records": records,
    }
    if out is not None:
        _write(results, out)
    if plot is not None:
        draw(records, plot)
    return results


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each width: how much faster than PEFT's Arrow at each number of adapters (least, median, most over ranks and
    tokens), and the shapes where another way is faster by more than a tenth."""
    return {
        f"dim {dim}": {
            "times_arrow": {str(e): _spread(of) for e, of in _grouped(own, "experts").items()},
            "times_best_other": _spread(own, best=True),
            "slower_than_best": [line for line in map(_slower, _by_shape(own)) if line],
        }
        for dim, own in _grouped(records, "dim").items()
    }


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Milliseconds over tokens, a panel for each width and number of adapters, at one rank."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rank = "16" if any(r["rank"] == "16" for r in records) else str(records[0]["rank"])
    own = [r for r in records if r["rank"] == rank and r["milliseconds"] is not None]
    rows, columns = _grouped(own, "dim"), sorted({r["experts"] for r in own})
    size = (3.2 * len(columns), 2.8 * len(rows))
    figure, axes = pyplot.subplots(len(rows), len(columns), figsize=size, squeeze=False, sharex=True)
    for row, (dim, of_dim) in zip(axes, rows.items(), strict=True):
        for axis, experts in zip(row, columns, strict=True):
            here = [r for r in of_dim if r["experts"] == experts]
            for way, line in _grouped(here, "way").items():
                x, y = zip(*sorted((r["tokens"], r["milliseconds"]) for r in line), strict=True)
                axis.plot(x, y, marker="o", markersize=3, label=way, linewidth=2.5 if way == OURS else 1)
            axis.set(xscale="log", yscale="log", title=f"d {dim}, {experts} adapters", xlabel="tokens", ylabel="ms")
    axes[0][0].legend(fontsize=6)
    figure.suptitle(f"rank {rank}, 2 adapters a token, {records[0]['dtype']} on {records[0]['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plan(shapes: Shapes, seconds: float, memory_gib: float) -> Any:
    import torch

    from kernels.bench import Plan

    if shapes.dtype not in _DTYPES:
        raise SettingsError(f"unknown dtype {shapes.dtype!r}: choose one of {', '.join(_DTYPES)}")
    if wrong := [rank for rank in shapes.ranks if rank != "mixed" and not rank.isdigit()]:
        raise SettingsError(f'rank {wrong[0]!r} is neither a number nor "mixed"')
    if shapes.device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"device {shapes.device!r} is asked for, but there is no GPU")
    if min(shapes.experts) < 2:
        raise SettingsError("at least 2 adapters are needed, since a token gets 2")
    return Plan(
        tokens=shapes.tokens,
        experts=shapes.experts,
        ranks=[rank if rank == "mixed" else int(rank) for rank in shapes.ranks],
        dims=shapes.dims,
        dtype=getattr(torch, shapes.dtype),
        device=shapes.device,
        seconds=seconds,
        memory_limit=int(memory_gib * 2**30),
    )


def _write(results: Mapping[str, Any], out: Path) -> None:
    """Readable, with a line for each record."""
    head = json.dumps({name: value for name, value in results.items() if name != "records"}, indent=1)
    lines = ",\n".join(json.dumps(record) for record in results["records"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{head[:-2]},\n "records": [\n{lines}\n ]\n}}\n')


def _read(out: Path | None) -> dict[tuple[Any, ...], dict[str, Any]]:
    if out is None or not out.exists():
        return {}
    try:
        records = json.loads(out.read_text())["records"]
        return {(*_shape(record), record["way"]): record for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{out} holds no records of this benchmark: {error!r}") from error


def _shape(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in _SHAPE)


def _grouped(records: Iterable[Mapping[str, Any]], field: str) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[field], []).append(record)
    return groups


def _by_shape(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Way -> milliseconds for each shape, with the shape under its fields' names."""
    shapes = []
    for shape, own in groupby(records, key=_shape):
        times = {r["way"]: r["milliseconds"] for r in own if r["milliseconds"] is not None}
        if OURS in times:
            shapes.append({"shape": dict(zip(_SHAPE, shape, strict=True)), "times": times})
    return shapes


def _best_other(times: Mapping[str, float]) -> tuple[str, float]:
    others = {way: ms for way, ms in times.items() if way != OURS}
    name = min(others, key=lambda way: others[way])
    return name, others[name]


def _spread(records: Sequence[Mapping[str, Any]], *, best: bool = False) -> dict[str, float]:
    ratios = []
    for line in _by_shape(records):
        times = line["times"]
        if best and len(times) > 1:
            ratios.append(_best_other(times)[1] / times[OURS])
        elif not best and ARROW in times:
            ratios.append(times[ARROW] / times[OURS])
    ratios.sort()
    return {
        name: round(ratios[place], 2)
        for name, place in (("least", 0), ("median", len(ratios) // 2), ("most", -1))
        if ratios
    }


def _slower(line: Mapping[str, Any]) -> dict[str, Any] | None:
    times = line["times"]
    if len(times) < 2:
        return None
    way, best = _best_other(times)
    if times[OURS] <= _SLACK * best:
        return None
    return {**line["shape"], "best": way, "best_ms": best, OURS: times[OURS]}
