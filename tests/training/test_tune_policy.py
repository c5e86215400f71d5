"""`policies tune`: the acceptance score is calibrated, and the cheapest way to the target is found and written."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from experts.cards import ExpertCard
from router_service.cli import app
from router_service.cli.console import CommandError
from router_service.core.calls import Caller, Lane
from router_service.core.trace import Trace
from router_service.metrics import Metrics
from routers.contracts import Estimates, Observations
from routers.errors import ObservationError
from routers.policy import Ceilings, Policy, StrategyChoice, Target, load_policy
from routers.registry import AnyRouter, create_router
from routers.strategies import create_strategy, strategy_names
from routers.strategies.cascade import CascadeStrategy
from tests.router_service.fakes import FakeExpert
from training import tune_policy as tune_policy_module
from training.acceptance import fit_acceptance
from training.observations import ObservedQuery, Table, load_table, write_table
from training.tune_policy import STRATEGIES, acceptance_error, chat_request, decide, play, tune_policy

CARDS = [
    ExpertCard(name="small", description="cheap", input_price=0.1, output_price=0.4),
    ExpertCard(name="large", description="dear", input_price=1.0, output_price=4.0),
]
BEST = Policy.model_validate({"name": "p", "objective": {"quality": 1, "cost": 0}, "router": {"name": "best"}})


def observed(count: int, seed: int, *, told: bool = True) -> Observations:
    """`large` is right on four of five; `small` on half, and its confidence says almost always which."""
    random = np.random.default_rng(seed)
    small, large = random.random(count) < 0.5, random.random(count) < 0.8
    sure = np.where(random.random(count) < 0.9, small, ~small)
    confidence = np.stack([np.where(sure, 0.95, 0.4), np.full(count, 0.9)], axis=1) + 0.04 * random.random((count, 2))
    ones = np.ones((count, 2), np.float32)
    return Observations(
        ids=[f"q{seed}-{i}" for i in range(count)],
        texts=[f"question {i}" for i in range(count)],
        tasks=[""] * count,
        cards=CARDS,
        quality=np.stack([small, large], axis=1).astype(np.float32),
        cost_usd=ones * np.array([1e-4, 1e-3], np.float32),
        input_tokens=ones,
        output_tokens=ones,
        latency_s=ones,
        confidence=confidence.astype(np.float32) if told else None,
    )


@pytest.fixture
def table() -> Table:
    return Table(cards=CARDS, train=observed(240, 1), test=observed(120, 2))


def test_the_score_is_a_probability() -> None:
    estimated = np.tile(np.array([0.5, 0.8], np.float32), (2000, 1))
    acceptance = fit_acceptance(observed(2000, 3), estimated)
    fresh = observed(2000, 4)
    assert fresh.confidence is not None
    for expert, quality in ((0, 0.5), (1, 0.8)):
        told = fresh.confidence[:, expert]
        scores = np.array([acceptance.score(quality, float(value)) for value in told])
        for here in (scores < 0.5, scores >= 0.5):
            if here.sum() > 50:
                assert scores[here].mean() == pytest.approx(fresh.quality[here, expert].mean(), abs=0.1)
    assert acceptance.score(0.5, 0.97) > 0.8 > 0.3 > acceptance.score(0.5, 0.42)
    assert acceptance.score(0.8, None) == pytest.approx(0.8, abs=0.05)


def test_playing_is_what_the_strategy_does(table: Table) -> None:
    flat = np.tile(np.array([0.5, 0.8], np.float32), (120, 1))
    estimates = Estimates(quality=flat, cost_usd=table.test.cost_usd, latency_s=flat)
    decisions = decide(BEST, estimates, table.test)
    single = play(BEST, decisions, table.test)
    np.testing.assert_array_equal(single.quality, table.test.quality[:, 1])
    assert set(single.calls) == {1}
    rule = {"told": {"quality": 0, "confidence": 1}}
    options = {"steps": 2, "threshold": 0.7, "acceptance": rule}
    stepped = BEST.model_copy(update={"strategy": StrategyChoice(name="cascade", options=options)})
    cascade = play(stepped, decisions, table.test)
    assert table.test.confidence is not None
    accepted = table.test.confidence[:, 0] >= 0.7
    np.testing.assert_array_equal(cascade.quality, np.where(accepted, *table.test.quality.T))
    np.testing.assert_allclose(cascade.cost_usd, np.where(accepted, 1e-4, 1.1e-3), rtol=1e-5)

    once = play(stepped.model_copy(update={"ceilings": Ceilings(calls=1)}), decisions, table.test)
    np.testing.assert_array_equal(once.quality, table.test.quality[:, 0])  # the one that may be asked
    assert set(once.calls) == {1}
    poor = play(stepped.model_copy(update={"ceilings": Ceilings(cost_usd=3.5e-4)}), decisions, table.test)
    np.testing.assert_array_equal(poor.quality, table.test.quality[:, 0])  # `large` reads too dearly for that
    assert poor.cost_usd.max() <= 3.5e-4
    frugal = BEST.model_copy(update={"ceilings": Ceilings(cost_usd=3.5e-4)})
    np.testing.assert_array_equal(play(frugal, decisions, table.test).quality, table.test.quality[:, 0])  # falls back


@pytest.mark.parametrize("steps", [None, ["large", "small"], ["large"]])
async def test_the_service_keeps_the_ceilings_as_they_were_played(table: Table, steps: list[str] | None) -> None:
    """A call that the one ceiling refuses is none of those that the other counts."""
    choice = StrategyChoice(name="cascade", options={"experts": steps}) if steps else StrategyChoice()
    limits = Ceilings(calls=1, cost_usd=3.5e-4)
    served = BEST.model_copy(update={"ceilings": limits, "strategy": choice})
    first = table.test.rows(np.arange(1))
    flat = np.array([[0.5, 0.8]], np.float32)
    (made,) = decide(served, Estimates(quality=flat, cost_usd=first.cost_usd, latency_s=flat), first)
    assert made is not None
    assert [candidate.expert for candidate in made.ranking] == ["large", "small"]
    played = play(served, [made], first)
    assert (played.calls.tolist(), played.quality.tolist()) == ([1], [first.quality[0, 0]])

    lanes = {one.name: Lane(one, FakeExpert(one.name), limit=5) for one in CARDS}
    trace = Trace(id="1", request_id="1", at=0.0, key="k", endpoint="chat/completions", model="p", stream=False)
    metrics = Metrics()
    caller = Caller(lanes, trace, metrics, deadline=time.monotonic() + 60, ceilings=limits)
    parts = create_strategy(served).run(made, chat_request(first.texts[0]), caller)
    assert [part async for part in parts]
    assert [(call.expert, call.outcome) for call in trace.calls] == [("large", "not_sent"), ("small", "ok")]
    assert b'expert="large"' not in metrics.render()


def test_an_answer_that_a_ceiling_cuts_short_is_not_the_one_observed(table: Table) -> None:
    long = replace(table.test, output_tokens=np.full((120, 2), 400, np.float32))
    estimates = Estimates(quality=long.quality * 0 + 0.5, cost_usd=long.cost_usd, latency_s=long.cost_usd)
    free = play(BEST, decide(BEST, estimates, long), long)
    assert free.quality.mean() > 0.4
    bound = BEST.model_copy(update={"ceilings": Ceilings(cost_usd=0.0005)})
    cut = play(bound, decide(bound, estimates, long), long)
    assert not cut.quality.any()
    assert cut.cost_usd.max() <= 0.0005


def test_what_was_not_observed_is_left_out(table: Table) -> None:
    quality = table.test.quality.copy()
    quality[:30, 1] = np.nan
    some = replace(table.test, quality=quality)
    estimates = Estimates(
        quality=np.tile(np.array([0.5, 0.8], np.float32), (120, 1)), cost_usd=some.cost_usd, latency_s=some.cost_usd
    )
    found = play(BEST, decide(BEST, estimates, some), some)
    assert np.isnan(found.quality[:30]).all()
    np.testing.assert_array_equal(found.quality[30:], quality[30:, 1])


def test_a_cascade_is_found_where_confidence_tells(table: Table) -> None:
    tuned = tune_policy(BEST, table, Target(within=0.0))
    assert tuned.kept
    assert tuned.policy.strategy.name == "cascade"
    assert tuned.against == "large"
    assert tuned.train_target <= tuned.train_low < tuned.train_quality
    assert tuned.share_of_cost < 0.75
    assert tuned.difference.high > 0
    assert isinstance(create_strategy(tuned.policy), CascadeStrategy)


def test_the_scores_calibration_is_measured_on_test(table: Table) -> None:
    error = tune_policy(BEST, table, Target(within=0.0), strategies=("cascade",)).acceptance_error
    assert error is not None
    assert 0 < error.low <= error.value <= error.high < 0.2
    assert tune_policy(BEST, table, Target(within=0.0), strategies=("single",)).acceptance_error is None

    estimates = Estimates(
        quality=np.tile(np.array([0.5, 0.8], np.float32), (120, 1)),
        cost_usd=table.test.cost_usd,
        latency_s=table.test.cost_usd,
    )
    options = {"experts": ["small", "large"], "acceptance": {"told": {"bias": 9, "quality": 0, "confidence": 0}}}
    vain = BEST.model_copy(update={"strategy": StrategyChoice(name="cascade", options=options)})
    found = acceptance_error(vain, decide(vain, estimates, table.test), table.test)
    assert found is not None
    assert found.value == pytest.approx(1 - table.test.quality[:, 0].mean(), abs=1e-3)  # it is sure of every answer


def test_a_confidence_that_will_not_be_asked_for_is_not_played(table: Table) -> None:
    silent = StrategyChoice(name="cascade", options={"logprobs": False})
    started = BEST.model_copy(update={"strategy": silent})
    tuned = tune_policy(started, table, Target(within=0.0), strategies=("cascade",))
    assert tuned.policy.strategy.options["logprobs"] is False
    assert tuned.share_of_cost >= 1  # nothing tells which of the small one's answers are wrong


def test_a_target_is_kept_with_confidence_not_by_luck(table: Table) -> None:
    """What keeps it on the mean alone is not enough, and the margin grows as the queries get fewer."""
    mean = float(table.train.quality[:, 0].mean())
    tuned = tune_policy(BEST, table, Target(quality=mean))  # which `small` alone has
    assert tuned.kept
    assert tuned.cost_usd_per_1k.value > 1000 * 1.05e-4
    assert tuned.train_quality > tuned.train_low >= mean
    few, many = table.train.rows(np.arange(60)), observed(1500, 1)
    found = [tune_policy(BEST, Table(cards=CARDS, train=t, test=table.test), Target(quality=0.6)) for t in (few, many)]
    margins = [each.train_quality - each.train_low for each in found]
    assert margins[0] > 2 * margins[1] > 0


def test_ceilings_bound_what_is_tuned(table: Table) -> None:
    assert tune_policy(BEST, table, Target(within=0.0)).calls > 1
    once = BEST.model_copy(update={"ceilings": Ceilings(calls=1)})
    tuned = tune_policy(once, table, Target(within=0.0))
    assert tuned.calls == 1
    assert tuned.share_of_cost == pytest.approx(1.0)


def test_a_target_may_be_about_one_expert_and_what_is_denied_is_not_tried(table: Table) -> None:
    tuned = tune_policy(BEST, table, Target(within=0.0, expert="small"))
    assert (tuned.against, tuned.kept) == ("small", True)
    assert tuned.share_of_cost == pytest.approx(1.0)
    with pytest.raises(ObservationError, match="'huge' is not in the table"):
        tune_policy(BEST, table, Target(within=0.0, expert="huge"))
    small = Policy.model_validate({**BEST.model_dump(), "constraints": {"deny": {"names": ["large"]}}})
    denied = tune_policy(small, table, Target(within=0.0))
    assert denied.against == "small"
    assert denied.quality == denied.against_quality


def test_every_strategy_is_tried_or_said_why_not(table: Table) -> None:
    tuned = tune_policy(BEST, table, Target(within=0.5))
    assert {*tuned.not_tried, *STRATEGIES} == {*strategy_names()}
    assert "wrong answers agree" in tuned.not_tried["vote"]


def test_an_artefacts_router_is_tuned_as_it_was_fitted(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_router("best", {"seed": 7}).fit(table.train).save(tmp_path)
    fitted: list[object] = []

    def create(name: str, options: dict[str, object]) -> AnyRouter:
        fitted.append(options["seed"])
        return create_router(name, options)

    monkeypatch.setattr(tune_policy_module, "create_router", create)
    shipped = Policy.model_validate({**BEST.model_dump(), "router": {"name": "best", "artefact": tmp_path}})
    tune_policy(shipped, table, Target(within=0.0))
    assert set(fitted) == {7}


def test_without_evidence_the_best_expert_stays(table: Table) -> None:
    blind = Table(cards=CARDS, train=observed(240, 1, told=False), test=observed(120, 2, told=False))
    tuned = tune_policy(BEST, blind, Target(within=0.0))
    assert tuned.kept
    assert tuned.share_of_cost == pytest.approx(1.0)


def test_a_target_out_of_reach_is_said_to_be(table: Table) -> None:
    tuned = tune_policy(BEST, table, Target(quality=0.99))
    assert not tuned.kept
    assert tuned.train_low < tuned.train_target
    assert tuned.quality.value > tuned.against_quality.value


def test_a_table_without_a_test_split_is_refused(table: Table) -> None:
    with pytest.raises(ObservationError, match="both splits"):
        tune_policy(BEST, Table(cards=CARDS, train=table.train, test=table.test.rows(np.arange(0))), Target(within=0))


def test_the_command_writes_a_policy_that_loads(table: Table, tmp_path: Path) -> None:
    def rows(split: str, part: Observations) -> list[ObservedQuery]:
        from routers.contracts import Observation

        assert part.confidence is not None
        return [
            ObservedQuery(
                id=part.ids[i],
                query=part.texts[i],
                split="train" if split == "train" else "test",
                experts=[
                    Observation(
                        query_id=part.ids[i],
                        expert=card.name,
                        quality=float(part.quality[i, e]),
                        cost_usd=float(part.cost_usd[i, e]),
                        confidence=round(float(part.confidence[i, e]), 4),
                    )
                    for e, card in enumerate(CARDS)
                ],
            )
            for i in range(len(part))
        ]

    write_table(tmp_path / "table", CARDS, [*rows("train", table.train), *rows("test", table.test)])
    kept = load_table(tmp_path / "table").train.confidence
    assert kept is not None
    assert kept[3, 0] == pytest.approx(
        table.train.confidence[3, 0] if table.train.confidence is not None else 0, abs=1e-3
    )
    (tmp_path / "auto.yaml").write_text("name: auto\nobjective: {quality: 1, cost: 0}\nrouter: {name: best}\n")
    written = tmp_path / "thrifty.yaml"
    command = ["policies", "tune", str(tmp_path / "auto.yaml"), "--observations", str(tmp_path / "table")]
    done = CliRunner().invoke(app, [*command, "--within", "0.02", "--out", str(written), "--json"])
    assert done.exit_code == 0, done.output
    policy = load_policy(written)
    assert policy.strategy.name == "cascade"
    assert policy.target == Target(within=0.02)
    assert written.read_text().startswith("# Target ")
    shown = CliRunner().invoke(app, [*command, "--within", "0.02", "--against", "large"])
    assert "Not tried: vote, for a table says" in shown.output
    refused = CliRunner().invoke(app, [*command, "--strategy", "self_moa"])
    assert refused.exit_code != 0
    lost = tmp_path / "My.yaml"
    for options, why in (
        (["--quality", "0"], "--quality must be above 0"),
        (["--quality", ".5", "--within", ".1"], "two targets"),
        (["--within", ".1", "--out", str(lost)], "--out names the policy by its file"),
    ):
        wrong = CliRunner().invoke(app, [*command, *options]).exception
        assert isinstance(wrong, CommandError)
        assert (wrong.status, why in str(wrong)) == (2, True), wrong
    assert not lost.exists()
