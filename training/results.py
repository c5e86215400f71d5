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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from routers.embedder import shared_embedder
from routers.registry import create_router, router_class
from training.compositions import against_cluster, against_linear, read_intents
from training.doc_tables import fill_tables, markdown
from training.evaluation import Bench, evaluate
from training.left_out import COUNTS, LeftOutReport, left_out
from training.metrics import Floats
from training.observations import Table, load_table
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
    """Without the times of single decisions, which want a quiet machine: see `speed`."""
    found = to_json(evaluate(load_table(data_folder(table)), BASELINES, seeds=range(SEEDS), on_step=_say))
    return [{key: value for key, value in each.items() if not key.startswith("decision_ms")} for each in found]


def _validation() -> list[Json]:
    """What text features bring, on a third of the train rows, fitted on the others."""
    return [
        _text_features(table, name)
        for table in ("frontier15", "open9", "pair-gsm8k")
        for name in BASELINES
        if "text_weight" in router_class(name).config_type.model_fields
    ]


def _text_features(table: str, name: str) -> Json:
    _say(f"validation: {table}, {name}", 0, 1)
    train = load_table(data_folder(table)).train
    held_out = np.random.default_rng(0).random(len(train)) < 1 / 3
    rest = train.rows(np.flatnonzero(~held_out))
    bench = Bench(Table(cards=train.cards, train=rest, test=train.rows(np.flatnonzero(held_out))))
    figure = "apgr" if len(train.cards) == 2 else "aiq"
    without, with_them = (
        bench.measure_router(create_router(name, options).fit(rest)).figures[figure]
        for options in ({"text_weight": 0.0}, {})
    )
    figures = {"without": without, "with": with_them, "difference": with_them - without}
    return {
        "table": table,
        "router": name,
        "figure": figure,
        **{key: interval(value) for key, value in figures.items()},
    }


def _speed() -> list[Json]:
    """Deciding for one query among frontier15's experts; fitting and measuring on open9, embeddings being cached."""
    table, whole = load_table(data_folder("frontier15")), load_table(data_folder("open9"))
    embedder = shared_embedder()
    for texts in (table.test.texts, whole.train.texts, whole.test.texts):
        embedder.embed(texts)
    bench = Bench(table, resamples=1)
    return [_speed_of(name, bench, table, whole) for name in BASELINES]


def _speed_of(name: str, bench: Bench, table: Table, whole: Table) -> Json:
    times = bench.decision_ms(create_router(name).fit(table.train))
    started = time.perf_counter()
    evaluate(whole, [name])
    seconds = round(time.perf_counter() - started, 1)
    return {
        "router": name,
        "experts": len(table.cards),
        "evaluate_s": seconds,
        **{
            f"decision_ms_{part}": {key: round(ms, 3) for key, ms in asdict(found).items()}
            for part, found in times.items()
        },
    }


def _reference() -> Json:
    """By table and method: each known figure beside the one measured here, and whether it lies in its interval."""
    return {table: _compared(table) for table in KNOWN}


def _compared(table: str) -> Json:
    report = reference(load_table(data_folder(table)))
    measured = {found.router: found.figures for found in (*report.evaluations, *report.references)}
    return {
        method: {figure: _beside(figure, known, measured[method][figure]) for figure, known in figures.items()}
        for method, figures in KNOWN[table].items()
    }


def _beside(figure: str, known: float, figures: Floats) -> Json:
    """Known figures are rounded, to a hundredth where they are shares, so that much they may lie outside."""
    found, rounding = interval(figures), 0.005 if figure in _SHARES else 0.0005
    inside = found is not None and found["low"] - rounding <= known <= found["high"] + rounding
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


def _composition() -> Json:
    return {table: against_cluster(load_table(data_folder(table))) for table in ("open9", "frontier15")}


def _intents() -> Json:
    return against_linear(read_intents(data_folder("").parents[0] / "intents"))


def _say(step: str, done: int, total: int) -> None:
    sys.stderr.write(f"{step} {done}/{total}\n")


_EXPERIMENTS: Mapping[str, Callable[[], Any]] = {
    **{table: partial(_evaluation, table) for table in TABLES},
    "validation": _validation,
    "speed": _speed,
    "reference": _reference,
    "left-out": _left_out,
    "composition": _composition,
    "intents": _intents,
}


# The document's tables


def with_tables(document: str, results: Path) -> str:
    """`document` with what stands between `<!-- NAME -->` and `<!-- end -->` made from NAME.json, where it is there."""

    def table_of(name: str) -> str | None:
        path = results / f"{name}.json"
        if not path.is_file():
            return None
        return _TABLES.get(name, _evaluation_table)(json.loads(path.read_bytes())["results"])

    return fill_tables(document, table_of)


def _evaluation_table(results: list[Json]) -> str:
    rows = [(result["router"], result) for result in results]
    rows += [(name, figures) for name, figures in results[0]["references"].items()]
    used = {key: head for key, head in _FIGURES.items() if any(row[key] for _, row in rows)}
    head = ["router", *used.values(), "ECE"]
    return markdown(head, [[name, *(_cell(row[key], key) for key in used), _error(row)] for name, row in rows])


def _error(row: Json) -> str:
    """The expected calibration error, which references lack."""
    return f"{row['calibration']['ece']['value']:.3f}" if "calibration" in row else "-"


def _validation_table(results: list[Json]) -> str:
    rows = [
        [
            found["table"],
            found["router"],
            *(_cell(found[key], found["figure"]) for key in ("without", "with", "difference")),
        ]
        for found in results
    ]
    return markdown(["table", "router", "embeddings alone", "with text features", "difference"], rows)


def _speed_table(results: list[Json]) -> str:
    rows = [
        [
            found["router"],
            *(_milliseconds(found[f"decision_ms_{part}"]) for part in ("p50", "p99")),
            f"{found['evaluate_s']:.0f} s",
        ]
        for found in results
    ]
    return markdown(["router", "decision p50", "decision p99", "evaluating on open9"], rows)


def _milliseconds(found: Json) -> str:
    return f"{found['value']:.2f} ms ({found['low']:.2f} to {found['high']:.2f})"


def _reference_table(results: Json) -> str:
    rows = [
        [table, method, _FIGURES[figure], _number(found["known"], figure), _cell(found["measured"], figure)]
        for table, methods in results.items()
        for method, figures in methods.items()
        for figure, found in figures.items()
    ]
    return markdown(["table", "method", "figure", "known", "measured here"], rows)


def _left_out_table(results: list[Json]) -> str:
    keys = ("aiq", "aiq_lost", "quality", "brier", "offset_size")
    rows = [
        [result["router"], count, *(_cell(found[key], key) for key in keys)]
        for result in results
        for count, found in result["mean_over_experts"].items()
    ]
    return markdown(["router", "observations", "AIQ", "AIQ lost", "quality", "Brier score", "error of its mean"], rows)


def _composition_table(results: Json) -> str:
    head = ["table", "router", "quality", "AIQ", "USD/1k"]
    rows = [
        [table, name, *(_cell(figures[key], key) for key in ("quality", "aiq", "cost_usd_per_1k"))]
        for table, found in results.items()
        for name, figures in found["routers"].items()
    ]
    for table, found in results.items():
        rows.append(
            [table, "composition less cluster", *(_cell(found["difference"][k], k) for k in ("quality", "aiq")), ""]
        )
        half = found["half_cost"]
        rows.append([
            table, f"within {half['budget_usd_per_1k']:.3f} USD/1k", _cell(half["quality"], "quality"), "",
            f"{_cell(half['cost_usd_per_1k'], 'cost_usd_per_1k')}, {half['of_budget']:.1%} of the budget",
        ])  # fmt: skip
    return markdown(head, rows)


def _intents_table(results: Json) -> str:
    figures = {
        "accuracy": "accuracy",
        "out_of_scope_recall": "out-of-scope recall",
        "in_scope_kept": "in scope, not sent to general",
        "decided_accuracy": "in scope, sent to the right category",
        "confidence_less_accuracy": "confidence less accuracy",
    }
    named = {**results["classifiers"], "difference": results["difference"]}
    rows = [[name, *(_cell(found[figure], figure) for figure in figures)] for name, found in named.items()]
    return markdown(["classifier", *figures.values()], rows)


def _strategies_table(results: Json) -> str:
    head = ["asked", "right", "one skill", "two skills", "USD/1k", "cost, generalist = 1", "calls", "p50, p95 in ms"]
    rows = [
        [
            f"`{name}`", _cell(found["right"], "quality"), f"{found['right_one_skill']:.3f}",
            f"{found['right_two_skills']:.3f}", f"{found['cost_usd_per_1k']:.4f}", f"{found['share_of_cost']:.2f}",
            f"{found['calls']:.2f}", f"{1000 * found['latency_s_p50']:.0f}, {1000 * found['latency_s_p95']:.0f}",
        ]
        for name, found in results["models"].items()
    ]  # fmt: skip
    return markdown(head, rows)


_TABLES: Mapping[str, Callable[[Any], str]] = {
    "validation": _validation_table,
    "speed": _speed_table,
    "reference": _reference_table,
    "left-out": _left_out_table,
    "composition": _composition_table,
    "intents": _intents_table,
    "strategies": _strategies_table,
}


def _cell(found: Json | None, figure: str) -> str:
    if not found:
        return "-"
    value, low, high = (_number(found[part], figure) for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _number(value: float, figure: str) -> str:
    return f"{value:.0%}" if figure in _SHARES else f"{value:.3f}"


if __name__ == "__main__":
    main()
