"""The hierarchical reward of Router-R1."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.router_r1.rewards import Outcome, Rewards

CHEAP, DEAR = Outcome(1.0, 1.0), Outcome(1.0, 100.0)


def test_a_broken_format_is_minus_one_whatever_else() -> None:
    assert Rewards(0.5)([Outcome(1.0, 0.0, broken="why"), CHEAP])[0] == -1


def test_without_the_format_reward_the_answer_alone_counts() -> None:
    rewards = Rewards(format_reward=False)
    assert rewards([Outcome(1.0, 0.0, broken="why"), Outcome(0.0, 0.0, broken="why")]) == [1, 0]


def test_a_wrong_answer_is_nothing_however_cheap() -> None:
    assert Rewards(0.9)([Outcome(0.0, 0.0), DEAR])[0] == 0


def test_without_a_cost_weight_a_right_answer_is_its_quality() -> None:
    assert Rewards()([DEAR, Outcome(0.4, 1.0)]) == [1, 0.4]


def test_the_cheapest_and_the_dearest_of_the_window_are_its_ends() -> None:
    rewards = Rewards(0.6)
    rewards([Outcome(0, float(n * n)) for n in range(101)])  # square roots 0 to 100: percentiles 5 and 95
    cheap, dear, middle = rewards([Outcome(1, 0.0), Outcome(1, 1e4), Outcome(1, 50.0**2)])
    assert cheap == pytest.approx(1.0)
    assert dear == pytest.approx(0.4)
    assert middle == pytest.approx(0.7, abs=0.01)


def test_the_window_forgets() -> None:
    rewards = Rewards(1.0)
    rewards([Outcome(0, 1e12)] * 1000)
    rewards([Outcome(0, 1.0)] * 500 + [Outcome(0, 4.0)] * 500)
    assert len(rewards.window) == 1000
    assert rewards([Outcome(1, 1.0), Outcome(1, 4.0)]) == [1, 0]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e6)), min_size=1, max_size=30), st.floats(0, 1))
def test_rewards_are_within_bounds_and_cheaper_is_no_worse(rows: list[tuple[float, float]], weight: float) -> None:
    outcomes = [Outcome(1.0, cost) for _, cost in rows]
    found = Rewards(weight)(outcomes)
    assert all(1 - weight - 1e-9 <= reward <= 1 + 1e-9 for reward in found)
    ranked = [reward for _, reward in sorted(zip((o.cost for o in outcomes), found, strict=True))]
    assert all(a >= b - 1e-9 for a, b in pairwise(ranked))
