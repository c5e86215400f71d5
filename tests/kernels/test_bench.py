"""The benchmark's ways all compute the same, and its records say what was timed."""

from __future__ import annotations

import json

import pytest
import torch
from mixtures import error, exact

from kernels import bench


@pytest.mark.parametrize("way", sorted(set(bench._WAYS) - {"peft_arrow"}))
def test_every_way_computes_the_same(way: str) -> None:
    case = bench._case(bench.Plan(), 32, [4, 8, 4], tokens=5)
    reference = exact(case.x, case.stack, case.indices, case.weights)
    assert error(bench._WAYS[way][0](case)(), reference) < 1e-5


def test_arrow_runs_with_its_own_choice() -> None:
    case = bench._case(bench.Plan(), 32, [4, 8, 4], tokens=5)
    assert bench._WAYS["peft_arrow"][0](case)().shape == (5, 32)


def test_records_say_what_was_timed_and_what_was_left_out() -> None:
    plan = bench.Plan(tokens=[3], experts=[2], ranks=[4, "mixed"], dims=[16], seconds=0.0, dtype=torch.bfloat16)
    seen: list[bench.Record] = []
    records = bench.bench_kernels(plan, on_record=seen.append)
    assert records == seen == json.loads(json.dumps(records))
    assert [(r["way"], r["rank"]) for r in records] == [(way, rank) for rank in ("4", "mixed") for way in bench._WAYS]
    assert all(r["runs"] >= 3 and r["milliseconds"] for r in records)
    none = bench.bench_kernels(bench.Plan(tokens=[3], experts=[2], ranks=[4], dims=[16], memory_limit=1))
    assert all(r["milliseconds"] is None and r["runs"] == 0 for r in none)
    assert "torch" in bench.machine()


def test_copies_that_other_ways_need_do_not_count_against_ours() -> None:
    stack = 2 * (4 + 8 + 16 + 64) * 16 * 4
    limit = stack + 4096
    records = bench.bench_kernels(bench.Plan([3], [4], ["mixed"], [16], seconds=0.0, memory_limit=limit))
    assert {r["way"] for r in records if r["milliseconds"]} == {"mixed_lora", "stacked_masked"}
