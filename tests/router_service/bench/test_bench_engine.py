"""The engine's measurement measures: a small one; what the figures are is the benchmark's matter, not a test's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_service.bench.engine import Limits, measure_engine

pytestmark = pytest.mark.slow


def test_shapes_and_load(tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    out.write_text(json.dumps({"ways": {"kept": True}}))
    limits = Limits(minutes=0.02, batches=(2,), prompts=(8,), registered=40)
    found = measure_engine(["shapes", "load"], limits, out=out)
    assert json.loads(out.read_text()) == found
    assert found["ways"] == {"kept": True}
    [row] = found["shapes"]["rows"]
    assert (row["batch"], row["prompt"]) == (2, 8)
    assert row["tokens_per_s"] > 0
    assert sum(row["share"].values()) == pytest.approx(1, abs=0.01)
    load = found["load"]
    assert load["failed"] == 0
    assert load["answers"] >= load["clients"] == 64
    assert 0 < load["hit_rate"] < 1


def test_loading_beside_a_running_batch() -> None:
    limits = Limits(registered=20, loaded_meanwhile=24, running_tokens=64)
    found = measure_engine(["adapters"], limits)["adapters"]
    assert found["steps"] >= 63
    assert found["copies_to_the_device"] >= 24
    assert 1 <= found["most_copies_between_steps"] <= 4
    assert 0 < found["worst_copying_between_steps_ms"] <= found["worst_gap_with_copies_ms"]
    assert found["median_gap_with_copies_ms"] <= found["worst_gap_with_copies_ms"]
