"""Metrics against figures worked out by hand, and the bootstrap against what statistics says of it."""

from __future__ import annotations

import numpy as np
import pytest

from routers.contracts import Estimates, FloatArray
from training import metrics
from training.metrics import CostScale, Frontier, Interval

ONCE = np.ones((1, 2), np.float32)


def floats(*rows: object) -> FloatArray:
    return np.array(rows, np.float32)


def estimates(quality: FloatArray, cost: FloatArray) -> Estimates:
    return Estimates(quality=quality, cost_usd=cost, latency_s=np.zeros_like(cost))


def front(cost: list[float], quality: list[float]) -> Frontier:
    return Frontier(np.array([cost]), np.array([quality]))


def test_the_hull_is_convex_and_never_falls() -> None:
    cost, quality = metrics.upper_hull(np.array([1, 2, 3, 4, 2, 1.0]), np.array([0.2, 0.3, 0.8, 0.7, 0.1, 0.1]))
    assert cost.tolist() == [1, 3]
    assert quality.tolist() == [0.2, 0.8]


def test_aiq_counts_nothing_left_of_the_cheapest_and_flat_right_of_the_dearest() -> None:
    found = metrics.aiq(front([1, 2], [0.4, 0.8]), np.array([[0.5, 4.0]]))
    assert found == pytest.approx((0.6 * 1 + 0.8 * 2) / 4)


def test_routerbenchs_aiq_is_over_the_range_of_the_experts_costs() -> None:
    found = metrics.aiq_routerbench(front([1, 2], [0.4, 0.8]), np.array([[1.5, 4.0]]))
    assert found == pytest.approx((0.7 * 0.5 + 0.8 * 2) / 2.5)
    assert np.isnan(metrics.aiq_routerbench(front([1], [0.5]), np.array([[2.0, 2.0]]))).all()


def test_saved_is_read_off_the_hull_at_the_best_experts_quality() -> None:
    assert metrics.saved(front([1, 3], [0.4, 0.8]), np.array([4.0]), np.array([0.6])) == pytest.approx(0.5)
    assert np.isnan(metrics.saved(front([1, 3], [0.4, 0.8]), np.array([4.0]), np.array([0.9]))).all()


def test_the_sweep_goes_from_the_best_to_the_cheapest() -> None:
    quality, cost = floats([0.2, 0.9], [0.8, 0.8]), floats([0.001, 0.01], [0.001, 0.01])
    outcomes = metrics.sweep(estimates(quality, cost), quality, cost)
    assert outcomes.quality[:, 0].tolist() == pytest.approx([0.9, 0.8])
    assert outcomes.cost_usd[:, 0].tolist() == pytest.approx([0.01, 0.001])  # of equals the cheaper
    assert outcomes.quality[:, -1].tolist() == pytest.approx([0.2, 0.8])


def test_the_sweep_never_chooses_what_was_not_observed() -> None:
    quality, cost = floats([0.2, np.nan], [np.nan, 0.4]), floats([0.1, np.nan], [np.nan, 0.2])
    outcomes = metrics.sweep(estimates(floats([0, 1], [1, 0]), floats([1, 0], [0, 1])), quality, cost)
    assert not np.isnan(outcomes.quality).any()


def test_pgr_runs_from_the_weak_to_the_strong_expert() -> None:
    weak, strong = floats(0, 0, 1, 1), floats(1, 1, 1, 1)
    draws = np.ones((1, 4), np.float32)
    right = metrics.pair_curve(floats(4, 3, 2, 1), weak, strong, draws)
    assert right.apgr() == pytest.approx(0.75)
    assert (right.cpt(0.5), right.cpt(0.8)) == (pytest.approx(0.25), pytest.approx(0.4))
    wrong = metrics.pair_curve(floats(1, 2, 3, 4), weak, strong, draws)
    assert wrong.apgr() == pytest.approx(0.25)
    alike = metrics.pair_curve(floats(1, 1, 1, 1), weak, strong, draws)
    assert alike.apgr() == pytest.approx(0.5)
    assert alike.cpt(0.8) == pytest.approx(0.8)
    no_gap = metrics.pair_curve(floats(4, 3, 2, 1), strong, weak, draws)
    assert np.isnan(no_gap.cpt(0.5)).all()


def test_rewards_scale_costs_over_train_and_choose_by_estimate() -> None:
    scale = CostScale.over(floats([0.0, 2.0], [np.nan, 1.0]))
    quality, cost = floats([0.5, 1.0]), floats([0.0, 2.0])
    found = {
        setting: metrics.reward(estimates(quality, cost), quality, cost, scale, setting).item()
        for setting in metrics.REWARD_SETTINGS
    }
    assert found == pytest.approx({"performance_first": 1.0, "balance": 0.25, "cost_first": 0.1})


def test_calibration_is_the_mean_distance_of_the_bins() -> None:
    found = metrics.calibration(floats([0.85, 0.15], [0.85, 0.15]), floats([1, 0], [0, np.nan]), ONCE)
    assert found.error == pytest.approx((2 * 0.35 + 0.15) / 3)
    assert [(bar.count, round(bar.observed, 2)) for bar in found.bins] == [(1, 0.0), (2, 0.5)]


def test_the_bootstraps_interval_is_as_wide_as_statistics_says() -> None:
    values = (np.arange(400) % 2).astype(np.float64)
    interval = Interval.of(metrics.weighted_mean(values, metrics.bootstrap(400, resamples=4000)))
    assert interval is not None
    assert interval.value == 0.5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_means_pass_over_what_is_unknown() -> None:
    assert metrics.weighted_mean(floats([1, np.nan], [3, 5]), ONCE).tolist() == [[2, 5]]


def test_a_figure_that_does_not_exist_has_no_interval() -> None:
    assert Interval.of(np.array([-np.inf, 1.0, 2.0])) is None
    assert Interval.of(np.array([1.0, -np.inf, 1.0])) == Interval(1.0, 1.0, 1.0)
    assert Interval.of(np.array([np.nan, 1.0])) is None
    assert Interval.of(np.array([2.0, np.nan])) == Interval(2.0, 2.0, 2.0)
    assert metrics.bootstrap(5, seed=1).tolist() == metrics.bootstrap(5, seed=1).tolist()
