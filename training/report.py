"""An evaluation for programs (JSON), for people (a plot of the frontiers) and for the browser (one HTML file)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation import Evaluation, Report
from training.metrics import COST_WEIGHTS, REWARD_SETTINGS, Floats, Interval

Json = dict[str, Any]

_COMPARED = ("quality", "cost_usd_per_1k", "aiq", "saved")
_REFERENCE_STYLE = {"random": "x", "best_single": "*", "task_label": "--", "oracle": ":"}


def to_json(report: Report) -> list[Json]:
    """One object per router. Figures are `{"value", "low", "high"}` (95% bootstrap), null where they do not exist."""
    references = {reference.router: _figures(reference) for reference in report.references}
    return [_object(report, evaluation, references) for evaluation in report.evaluations]


def _object(report: Report, evaluation: Evaluation, references: Json) -> Json:
    calibration = evaluation.calibration
    return {
        "router": evaluation.router,
        "seeds": list(evaluation.seeds),
        "test_queries": report.queries,
        "compared_queries": report.compared,
        "experts": list(report.cards),
        **_figures(evaluation),
        "decision_ms_p50": _bounds(evaluation.decision_ms.get("p50")),
        "decision_ms_p99": _bounds(evaluation.decision_ms.get("p99")),
        "saved_at": _saved_at(report),
        "frontier": _points(evaluation),
        "calibration": calibration
        and {"ece": interval(calibration.error), "bins": [asdict(bar) for bar in calibration.bins]},
        "difference": _difference(evaluation, report.evaluations[0]),
        "references": references,
    }


def _figures(evaluation: Evaluation) -> Json:
    figures = {name: interval(values) for name, values in evaluation.figures.items()}
    return {**figures, "rewards": {name: interval(values) for name, values in evaluation.rewards.items()}}


def _saved_at(report: Report) -> Json:
    """The point at which `saved` is measured: the best single expert, chosen on train."""
    return {
        "expert": report.best_single,
        "quality": interval(report.best_quality),
        "cost_usd_per_1k": interval(1000 * report.best_cost),
    }


def _points(evaluation: Evaluation) -> list[Json]:
    """The swept operating points, those that follow each other at the same place once."""
    cost, quality = 1000 * evaluation.frontier.cost_usd[0], evaluation.frontier.quality[0]
    moved = np.append(True, (np.diff(cost) != 0) | (np.diff(quality) != 0))
    columns = ("cost_weight", COST_WEIGHTS), ("cost_usd_per_1k", cost), ("quality", quality)
    return [{name: _short(values[place]) for name, values in columns} for place in np.flatnonzero(moved)]


def _difference(evaluation: Evaluation, first: Evaluation) -> Json | None:
    """Paired bootstrap of this router less the first one over the same test queries; null for the first itself."""
    if evaluation is first:
        return None
    differences = {name: interval(evaluation.figures[name] - first.figures[name]) for name in _COMPARED}
    return {"from": first.router, **differences}


def interval(figures: Floats) -> Json | None:
    """For JSON, of figures per draw: `{"value", "low", "high"}`, or null where they do not exist."""
    return _bounds(Interval.of(figures))


def _bounds(found: Interval | None) -> Json | None:
    return {name: _short(value) for name, value in asdict(found).items()} if found else None


def _short(value: float) -> float:
    """To the six digits that such figures can bear."""
    return float(f"{value:.6g}")


def figure_png(report: Report, *, title: str) -> bytes:
    """The quality and cost frontier of every router and reference, with the experts' operating points, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    frontiers = [one.frontier for one in (*report.evaluations, *report.references)]
    axes = figure.add_subplot()
    for evaluation in report.evaluations:
        cost, quality = evaluation.frontier.hulls[0]
        (line,) = axes.plot(1000 * cost, quality, marker="o", markersize=3, label=evaluation.router)
        axes.fill_between(*_band(evaluation), color=line.get_color(), alpha=0.12, linewidth=0)
    for reference in report.references:
        cost, quality = reference.frontier.hulls[0]
        axes.plot(1000 * cost, quality, _REFERENCE_STYLE[reference.router], color="0.4", label=reference.router)
    is_free = any(frontier.hulls[0][0][0] <= 0 for frontier in frontiers)  # which a logarithm cannot show
    axes.set(xscale="linear" if is_free else "log", xlabel="USD per 1000 queries", ylabel="mean quality", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _band(evaluation: Evaluation) -> tuple[Floats, Floats, Floats]:
    """Cost per 1000 and the 95% interval of the hull's quality there."""
    costs = evaluation.frontier.hulls[0][0]
    grid = (np.geomspace if costs[0] > 0 else np.linspace)(costs[0], costs[-1], 60)
    heights = np.array([np.interp(grid, *hull) for hull in evaluation.frontier.hulls])
    low, high = np.percentile(heights, [2.5, 97.5], axis=0)
    return 1000 * grid, low, high


def write_plot(report: Report, path: Path, *, title: str) -> None:
    """Write `figure_png` to `path`."""
    path.write_bytes(figure_png(report, title=title))


def write_html(report: Report, path: Path, *, title: str) -> None:
    """Write one self-contained HTML file: the plot, the figures, calibration. Everything from the data is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("training"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    image = base64.b64encode(figure_png(report, title=title)).decode("ascii")
    page = environment.get_template("report.html.jinja").render(
        title=title,
        image=image,
        report=report,
        columns=COLUMNS,
        rows=table_rows(report),
        reward_columns=("router", *REWARD_SETTINGS),
        reward_rows=reward_rows((*report.evaluations, *report.references)),
    )
    path.write_text(page, encoding="utf-8")


COLUMNS = (
    "router", "quality", "USD/1k", "AIQ", "saved", "gain", "gap closed", "APGR", "CPT 50%", "CPT 80%", "ECE",
    "p50 ms", "p99 ms",
)  # fmt: skip
_SHARES = ("saved", "gap_closed", "cpt50", "cpt80")


def table_rows(report: Report) -> list[list[str]]:
    """One row per router and reference, under `COLUMNS`: each figure with its interval."""
    return [_row(evaluation) for evaluation in (*report.evaluations, *report.references)]


def _row(evaluation: Evaluation) -> list[str]:
    names = ("quality", "cost_usd_per_1k", "aiq", "saved", "gain", "gap_closed", "apgr", "cpt50", "cpt80")
    figures = [_text(Interval.of(evaluation.figures[name]), share=name in _SHARES) for name in names]
    error = Interval.of(evaluation.calibration.error) if evaluation.calibration else None
    times = [_text(evaluation.decision_ms.get(percentile)) for percentile in ("p50", "p99")]
    return [evaluation.router, *figures, _text(error), *times]


def _text(found: Interval | None, *, share: bool = False) -> str:
    if found is None:
        return "-"
    if share:
        return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def reward_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Router and its rewards at GraphRouter's settings."""
    return [[e.router, *(_text(Interval.of(values)) for values in e.rewards.values())] for e in evaluations]
