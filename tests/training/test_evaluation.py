"""Evaluation on a planted table: references where they must lie, keys, pairing, policies, the document's tables."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from experts.cards import ExpertCard
from routers.contracts import Observation, Observations
from routers.errors import ObservationError, RouterConfigError
from routers.policy import Constraints, Objective, Policy, Selection
from routers.registry import create_router
from training import report as reports
from training.evaluation import Bench, Report, evaluate
from training.left_out import left_out
from training.observations import ObservedQuery, Table, load_table, write_table
from training.report import to_json, write_plot
from training.results import with_tables

CARDS = [
    ExpertCard(name="words", input_price=1, output_price=1),
    ExpertCard(name="sums", input_price=1, output_price=1),
    ExpertCard(name="dear", input_price=10, output_price=10),
]
RIGHT = {"words": (0.9, 0.1, 0.8), "sums": (0.2, 0.9, 0.8)}
KEYS = {
    "router", "quality", "cost_usd_per_1k", "aiq", "saved", "gain", "gap_closed", "apgr", "cpt50", "cpt80", "rewards",
    "decision_ms_p50", "decision_ms_p99", "saved_at", "frontier", "calibration",
}  # fmt: skip


def planted(cards: list[ExpertCard], queries: int = 400) -> list[ObservedQuery]:
    """Half words, half sums: each cheap expert is right on one of them, the dear one on most of both."""
    random = np.random.default_rng(7)
    rows = []
    for i in range(queries):
        task = ("words", "sums")[i % 2]
        pairs = [
            Observation(
                query_id=str(i),
                expert=card.name,
                quality=float(random.random() < right),
                cost_usd=card.input_price * 1e-4,
                input_tokens=50,
                output_tokens=50,
            )
            for card, right in zip(CARDS, RIGHT[task], strict=True)
            if card in cards
        ]
        rows.append(
            ObservedQuery(id=str(i), task=task, query=f"{task} {i}", split=("train", "test")[i % 4 > 1], experts=pairs)
        )
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    write_table(folder, CARDS, planted(CARDS))
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    return load_table(folder)


@pytest.fixture(scope="module")
def report(table: Table) -> Report:
    return evaluate(table, ["best", "random"], seeds=range(2), resamples=200)


def test_references_lie_where_the_table_was_planted(report: Report) -> None:
    quality = {found.router: found.figures["quality"][0] for found in report.references}
    assert quality["random"] < 0.7 < quality["best_single"] < 0.86 < quality["task_label"] < quality["oracle"]
    saved = {found.router: found.figures["saved"][0] for found in report.references}
    assert saved["task_label"] == pytest.approx(0.9, abs=0.02)
    oracle = report.references[-1]
    assert oracle.figures["gap_closed"][0] == pytest.approx(1)
    assert report.best_single == "dear"


def test_the_best_router_is_the_best_single_expert(report: Report) -> None:
    best, single = report.evaluations[0], report.references[1]
    np.testing.assert_allclose(best.figures["quality"], single.figures["quality"])
    np.testing.assert_allclose(best.figures["gain"], 0)
    assert best.figures["saved"][0] == pytest.approx(0)


def test_json_has_every_key_and_can_be_written(report: Report) -> None:
    found = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert [row["router"] for row in found] == ["best", "random"]
    for row in found:
        assert row.keys() >= KEYS
        assert row["quality"].keys() == {"value", "low", "high"}
        assert row["quality"]["low"] <= row["quality"]["value"] <= row["quality"]["high"]
        assert row["rewards"].keys() == {"performance_first", "balance", "cost_first"}
        assert row["apgr"] is None
        assert row["references"].keys() == {"random", "best_single", "task_label", "oracle"}
    assert found[0]["difference"] is None
    assert found[1]["difference"]["quality"]["high"] < 0


def test_differences_are_paired(report: Report) -> None:
    """The interval of a difference is narrower than two separate intervals would let it be."""
    label, oracle = (reference.figures["quality"] for reference in report.references[2:])
    assert np.std(oracle - label) < 0.8 * np.hypot(np.std(label), np.std(oracle))


def test_the_same_seeds_give_the_same_figures(table: Table, report: Report) -> None:
    again = evaluate(table, ["best", "random"], seeds=range(2), resamples=200)
    for one, two in zip(report.evaluations, again.evaluations, strict=True):
        for name in one.figures:
            np.testing.assert_array_equal(one.figures[name], two.figures[name])


def test_a_policy_chooses_the_point_that_is_measured(table: Table) -> None:
    cheap = Policy(name="cheap", objective=Objective(quality=0, cost=1))
    (found,) = evaluate(table, ["best"], policy=cheap, resamples=10).evaluations
    assert found.figures["cost_usd_per_1k"][0] == pytest.approx(0.1)
    nobody = Policy(name="nobody", constraints=Constraints(allow=Selection(names=frozenset({"someone else"}))))
    (found,) = evaluate(table, ["best"], policy=nobody, resamples=10).evaluations
    assert (found.figures["quality"][0], found.figures["cost_usd_per_1k"][0]) == (0, 0)


def test_two_experts_are_measured_as_in_routellm(tmp_path: Path) -> None:
    pair = CARDS[1:]
    write_table(tmp_path, pair, planted(pair))
    found = evaluate(load_table(tmp_path), ["best", "random"], resamples=50)
    figures = {one.router: one.figures for one in (*found.evaluations, *found.references)}
    assert figures["best"]["apgr"][0] == pytest.approx(0.5)
    assert figures["task_label"]["apgr"][0] > 0.7
    assert figures["task_label"]["cpt50"][0] < 0.4


def test_missing_pairs_are_never_chosen(table: Table) -> None:
    quality, cost = table.test.quality.copy(), table.test.cost_usd.copy()
    quality[::2, 2] = cost[::2, 2] = np.nan
    partial = replace(table, test=replace(table.test, quality=quality, cost_usd=cost))
    (found,) = evaluate(partial, ["best"], resamples=10).evaluations
    assert np.isfinite(found.figures["quality"]).all()
    assert np.isfinite(found.figures["aiq"]).all()


def test_routers_meet_the_best_expert_where_it_was_observed(table: Table) -> None:
    """The dear expert is best on train; on test it was asked only where it is right, the cheap ones everywhere."""
    test = table.test
    where = test.quality[:, 2] == 1
    quality, cost = (np.where(where[:, None] | [True, True, False], v, np.nan) for v in (test.quality, test.cost_usd))
    partial = replace(table, test=replace(test, quality=quality.astype("f4"), cost_usd=cost.astype("f4")))
    found = evaluate(partial, ["best"], resamples=10)
    assert found.compared == where.sum() < found.queries
    (best,) = found.evaluations
    assert best.figures["gain"] == pytest.approx(0)  # nobody does better there than the best itself
    oracle = {one.router: one for one in found.references}["oracle"]
    assert oracle.figures["gain"] == pytest.approx(0)
    assert np.isnan(oracle.figures["gap_closed"]).all()
    json.dumps(to_json(found), allow_nan=False)


def test_the_plot_shows_experts_that_cost_nothing(table: Table, tmp_path: Path) -> None:
    cost = table.test.cost_usd.copy()
    cost[:, 0] = 0
    free = replace(table, test=replace(table.test, cost_usd=cost))
    write_plot(evaluate(free, ["best", "random"], resamples=5), tmp_path / "plot.png", title="free")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused(table: Table) -> None:
    nothing: Observations = table.test.rows(np.zeros(0, np.intp))
    with pytest.raises(ObservationError, match="both splits"):
        evaluate(replace(table, test=nothing), ["best"])
    with pytest.raises(RouterConfigError, match="no router is named 'worst'"):
        evaluate(table, ["worst"])


def test_an_expert_left_out_is_known_better_by_its_observations(table: Table) -> None:
    found = left_out(table, "best", resamples=20)
    assert {(run.expert, run.count) for run in found.added} == {(c.name, n) for c in CARDS for n in (0, 16, 64)}
    offset = {n: np.mean([abs(run.offset[0]) for run in found.added if run.count == n]) for n in (0, 64)}
    assert offset[64] < offset[0]


def test_calibration_is_of_the_estimates(table: Table) -> None:
    found = Bench(table, resamples=10).measure_router(create_router("best").fit(table.train))
    assert found.calibration is not None
    assert found.calibration.error[0] < 0.1
    assert sum(bar.count for bar in found.calibration.bins) == table.test.quality.size
    assert 0 < found.decision_ms["p50"].value <= found.decision_ms["p99"].value


def test_the_report_is_one_file_and_escapes(report: Report, tmp_path: Path) -> None:
    reports.write_html(report, tmp_path / "r.html", title="<script>alert(1)</script>")
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page
    assert html.escape("<script>alert(1)</script>") in page
    assert "http" not in page
    assert "data:image/png;base64," in page
    reports.write_plot(report, tmp_path / "p.png", title="planted")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_a_table_or_json(folder: Path) -> None:
    from router_service.cli import app

    run = CliRunner().invoke(app, ["evaluate", "--observations", str(folder), "--router", "best", "--json"])
    assert run.exit_code == 0, run.output
    assert [row["router"] for row in json.loads(run.stdout)] == ["best"]
    shown = CliRunner().invoke(app, ["evaluate", "--observations", str(folder), "--router", "best"])
    assert "task_label" in shown.stdout


def test_the_documents_tables_are_made_from_the_results(tmp_path: Path, report: Report) -> None:
    (tmp_path / "planted.json").write_text(json.dumps({"results": to_json(report)}))
    document = "before\n<!-- planted -->\nold\n<!-- end -->\n<!-- absent -->\nkept\n<!-- end -->\nafter"
    made = with_tables(document, tmp_path)
    assert "| best | 0." in made
    assert "old" not in made
    assert "kept" in made
    assert with_tables(made, tmp_path) == made


def test_the_documentation_shows_the_results_that_are_kept() -> None:
    document = Path("docs/evaluation.md").read_text("utf-8")
    assert with_tables(document, Path("docs/results")) == document
