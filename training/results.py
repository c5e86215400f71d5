"""Make every figure of docs/evaluation.md again: `python -m training.results`.

Writes one JSON file per experiment into docs/results, each with the command that makes it, and the tables between the
markers of docs/evaluation.md from those files. The public tables are read from ROUTER_DATA_DIR, by default
../shared/data.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation import evaluate
from training.left_out import COUNTS, LeftOutReport, left_out
from training.metrics import Floats
from training.observations import load_table
from training.reference import KNOWN, reference
from training.report import Json, interval, to_json

TABLES = ("frontier15", "open9", "pair-mmlu", "pair-gsm8k")
BASELINES = ("knn", "cluster", "matrix_factorization", "linear")
SEEDS = 3
RESULTS, DOCUMENT = Path("docs/results"), Path("docs/evaluation.md")

_FIGURES = {
    "quality": "quality", "cost_usd_per_1k": "USD/1k", "aiq": "AIQ", "saved": "saved", "gain": "gain",
    "gap_closed": "gap closed", "apgr": "APGR", "cpt50": "CPT 50%", "cpt80": "CPT 80%",
}  # fmt: skip
_SHARES = ("saved", "gap_closed", "cpt50", "cpt80")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments named, or all, then write the document's tables."""
    parser = argparse.ArgumentParser(prog="python -m training.results", description=__doc__)
    parser.add_argument("experiment", nargs="*", choices=["", *_EXPERIMENTS], help="by default all of them")
    for name in parser.parse_args(arguments).experiment or _EXPERIMENTS:
        write(name, _EXPERIMENTS[name](), command=f"python -m training.results {name}")
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8"), RESULTS), "utf-8")


def data_folder(table: str) -> Path:
    """Where a public table lies."""
    return Path(os.environ.get("ROUTER_DATA_DIR") or "../shared/data") / "routing" / table


def write(name: str, results: Any, *, command: str) -> None:
    """Write docs/results/NAME.json, with the command that makes it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command, "results": results}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(_narrow(text) + "\n", "utf-8")


def _narrow(text: str) -> str:
    """Objects of numbers alone on one line."""
    return re.sub(r"\{[^{}\[\]]*\}", lambda found: re.sub(r"\s+", " ", found[0]), text)


def _evaluation(table: str) -> list[Json]:
    return to_json(evaluate(load_table(data_folder(table)), BASELINES, seeds=range(SEEDS), on_step=_say))


def _reference() -> Json:
    """By table and method: each known figure beside the one measured here, and whether it lies in its interval."""
    return {table: _compared(table) for table in KNOWN}


def _compared(table: str) -> Json:
    report = reference(load_table(data_folder(table)))
    measured = {found.router: found.figures for found in (*report.evaluations, *report.references)}
    return {
        method: {figure: _beside(known, measured[method][figure]) for figure, known in figures.items()}
        for method, figures in KNOWN[table].items()
    }


def _beside(known: float, figures: Floats) -> Json:
    found = interval(figures)
    inside = found is not None and found["low"] <= known <= found["high"]
    return {"known": known, "measured": found, "inside": inside}


def _left_out() -> list[Json]:
    table = load_table(data_folder("open9"))
    return [_left_out_json(left_out(table, name, on_step=_say)) for name in BASELINES]


def _left_out_json(report: LeftOutReport) -> Json:
    return {
        "router": report.router,
        "fitted_on_all": {
            "aiq": interval(report.full.figures["aiq"]),
            "quality": interval(report.full.figures["quality"]),
            "brier": interval(np.mean(list(report.full_brier.values()), axis=0)),
        },
        "mean_over_experts": {str(count): _mean_over_experts(report, count) for count in COUNTS},
        "experts": [
            {
                "expert": run.expert,
                "observations": run.count,
                "aiq": interval(run.measured.figures["aiq"]),
                "quality": interval(run.measured.figures["quality"]),
                "brier": interval(run.brier),
                "brier_fitted": interval(report.full_brier[run.expert]),
                "offset": interval(run.offset),
            }
            for run in report.added
        ],
    }


def _mean_over_experts(report: LeftOutReport, count: int) -> Json:
    """The mean over the experts left out; `aiq_lost` is paired with the router fitted on all."""
    runs = [run for run in report.added if run.count == count]
    aiq = np.mean([run.measured.figures["aiq"] for run in runs], axis=0)
    return {
        "aiq": interval(aiq),
        "aiq_lost": interval(report.full.figures["aiq"] - aiq),
        "quality": interval(np.mean([run.measured.figures["quality"] for run in runs], axis=0)),
        "brier": interval(np.mean([run.brier for run in runs], axis=0)),
        "offset_size": interval(np.mean([np.abs(run.offset) for run in runs], axis=0)),
    }


def _say(step: str, done: int, total: int) -> None:
    sys.stderr.write(f"{step} {done}/{total}\n")


_EXPERIMENTS: Mapping[str, Callable[[], Any]] = {
    **{table: partial(_evaluation, table) for table in TABLES},
    "reference": _reference,
    "left-out": _left_out,
}


# The document's tables


def with_tables(document: str, results: Path) -> str:
    """`document` with what stands between `<!-- NAME -->` and `<!-- end -->` made from NAME.json, where it is there."""

    def replaced(found: re.Match[str]) -> str:
        path = results / f"{found['name']}.json"
        if not path.is_file():
            return found[0]
        table = _TABLES.get(found["name"], _evaluation_table)(json.loads(path.read_bytes())["results"])
        return f"<!-- {found['name']} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>[\w-]+) -->\n(?:(?!<!--).)*<!-- end -->", replaced, document, flags=re.DOTALL)


def _evaluation_table(results: list[Json]) -> str:
    rows = [(result["router"], result) for result in results]
    rows += [(name, figures) for name, figures in results[0]["references"].items()]
    used = {key: head for key, head in _FIGURES.items() if any(row[key] for _, row in rows)}
    head = ["router", *used.values(), "ECE", "decision p99"]
    return _markdown(head, [[name, *(_cell(row[key], key) for key in used), *_own(row)] for name, row in rows])


def _own(row: Json) -> list[str]:
    """What references lack."""
    if "calibration" not in row:
        return ["-", "-"]
    return [f"{row['calibration']['ece']['value']:.3f}", f"{row['decision_ms_p99']['value']:.2f} ms"]


def _reference_table(results: Json) -> str:
    rows = [
        [table, method, _FIGURES[figure], _number(found["known"], figure), _cell(found["measured"], figure)]
        for table, methods in results.items()
        for method, figures in methods.items()
        for figure, found in figures.items()
    ]
    return _markdown(["table", "method", "figure", "known", "measured here"], rows)


def _left_out_table(results: list[Json]) -> str:
    keys = ("aiq", "aiq_lost", "quality", "brier", "offset_size")
    rows = [
        [result["router"], count, *(_cell(found[key], key) for key in keys)]
        for result in results
        for count, found in result["mean_over_experts"].items()
    ]
    return _markdown(["router", "observations", "AIQ", "AIQ lost", "quality", "Brier score", "error of its mean"], rows)


_TABLES: Mapping[str, Callable[[Any], str]] = {"reference": _reference_table, "left-out": _left_out_table}


def _cell(found: Json | None, figure: str) -> str:
    if not found:
        return "-"
    value, low, high = (_number(found[part], figure) for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _number(value: float, figure: str) -> str:
    return f"{value:.0%}" if figure in _SHARES else f"{value:.3f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()
