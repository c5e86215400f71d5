"""`bench kernels`: records that add up over runs, a summary, a plot, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from router_service.bench.kernels import summary
from router_service.cli import app
from router_service.errors import SettingsError

SMALL = ["bench", "kernels", "--dim", "16", "--rank", "4", "--seconds", "0"]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*SMALL, *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_runs_into_one_file_add_up_and_are_drawn(tmp_path: Path) -> None:
    out, plot = tmp_path / "k.json", tmp_path / "k.png"
    run("--experts", "3", "--tokens", "2", "--out", str(out))
    run("--experts", "4", "--tokens", "2", "--tokens", "5", "--out", str(out), "--plot", str(plot))
    results = json.loads(out.read_text())
    shapes = {(r["experts"], r["tokens"]) for r in results["records"]}
    assert shapes == {(3, 2), (4, 2), (4, 5)}
    assert len(results["records"]) == 6 * 3
    assert all(r["machine"]["torch"] for r in results["records"])
    assert set(results["summary"]["dim 16"]["times_arrow"]) == {"3", "4"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_summary_names_shapes_where_another_way_is_faster() -> None:
    shape = {"device": "cpu", "dtype": "float32", "threads": 1, "dim": 8, "rank": "4", "experts": 2, "slots": 2}
    times = {1: (1.0, 20.0, 3.0), 2: (1.2, 6.0, 1.0), 3: (1.05, 4.2, 1.0)}
    records = [
        {**shape, "tokens": t, "way": way, "milliseconds": ms}
        for t, row in times.items()
        for way, ms in zip(("mixed_lora", "peft_arrow", "loop"), row, strict=True)
    ]
    found = summary(records)["dim 8"]
    assert found["times_arrow"]["2"] == {"least": 4.0, "median": 5.0, "most": 20.0}
    assert [(line["tokens"], line["best"]) for line in found["slower_than_best"]] == [(2, "loop")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "big"], "'big' is neither a number"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--experts", "1"], "at least 2 adapters"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CliRunner().invoke(app, [*SMALL, *arguments], catch_exceptions=False)
