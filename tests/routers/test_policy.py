"""Choosing: the utility, every constraint, ties, reasons, and policies that contradict themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from experts.cards import ExpertCard
from routers.contracts import Decision, Estimates, Query
from routers.errors import NoExpertError, RouterConfigError
from routers.policy import Policy, check_able, load_policies, load_policy
from routers.strategies import create_strategy

QUERY = Query(text="x", input_tokens=100)
POLICIES = Path(__file__).parents[2] / "deploy" / "policies"


def card(name: str, **fields: Any) -> ExpertCard:
    return ExpertCard(name=name, **fields)


def estimates(quality: list[float], cost: list[float], latency: list[float] | None = None) -> Estimates:
    seconds = latency or [1.0] * len(quality)
    return Estimates(
        quality=np.array([quality], np.float32),
        cost_usd=np.array([cost], np.float32),
        latency_s=np.array([seconds], np.float32),
    )


CARDS = [card("small", tags={"cheap"}), card("middle"), card("large", tags={"dear"})]
NUMBERS = estimates([0.5, 0.8, 0.9], [0.00001, 0.0001, 0.01], [1, 2, 10])


def choose(query: Query = QUERY, numbers: Estimates = NUMBERS, **fields: Any) -> Decision:
    return Policy.model_validate({"name": "test", **fields}).choose(numbers, CARDS, query)


@pytest.mark.parametrize(
    ("objective", "expert"),
    [
        ({"quality": 1, "cost": 0}, "large"),
        ({"quality": 0, "cost": 1}, "small"),
        ({"quality": 0.01, "cost": 1}, "middle"),  # large is .1 better for .0099 USD: worth .001
        ({"quality": 1, "cost": 11}, "middle"),
        ({"quality": 0.2, "cost": 1}, "large"),
        ({"quality": 0, "cost": 0, "latency": 1}, "small"),
        ({"quality": 0.2, "cost": 1, "latency": 0.01}, "middle"),
    ],
)
def test_objective_is_usd_for_quality(objective: dict[str, float], expert: str) -> None:
    decision = choose(objective=objective)
    assert decision.expert == expert
    tenfold = {name: 10 * weight for name, weight in objective.items()}
    assert [c.expert for c in choose(objective=tenfold).ranking] == [c.expert for c in decision.ranking]


def test_every_candidate_carries_its_numbers() -> None:
    first = choose(objective={"quality": 0.01}).ranking[0]
    assert (first.expert, first.quality, first.latency_s) == ("middle", 0.8, 2)
    assert first.cost_usd == pytest.approx(0.0001)
    assert first.score == pytest.approx(0.8 * 0.01 - 0.0001)


def test_reason_is_one_sentence_with_the_numbers() -> None:
    assert choose(objective={"quality": 0.01}).reason == (
        "middle: estimated quality 0.80 at $0.0001, best utility of 3; next small: estimated quality 0.50 at $0.00001"
    )


@pytest.mark.parametrize(
    ("constraints", "removed"),
    [
        ({"max_cost_usd": 0.001}, {"large": "its estimated cost of $0.01 is above $0.001"}),
        ({"max_latency_s": 5}, {"large": "its estimated latency of 10 s is above 5 s"}),
        ({"min_quality": 0.6}, {"small": "its estimated quality of 0.50 is below 0.6"}),
        ({"deny": {"names": ["middle"]}}, {"middle": "it is denied"}),
        ({"deny": {"tags": ["dear"]}}, {"large": "it is denied"}),
        ({"allow": {"names": ["middle"], "tags": ["cheap"]}}, {"large": "it is not among the experts allowed"}),
    ],
)
def test_constraints_say_whom_they_remove(constraints: dict[str, Any], removed: dict[str, str]) -> None:
    decision = choose(constraints=constraints)
    assert decision.removed == removed
    assert {c.expert for c in decision.ranking} == {c.name for c in CARDS} - removed.keys()
    assert f"{len(removed)} removed" in decision.reason


def test_floor_gives_way_to_the_best_and_says_so() -> None:
    decision = choose(constraints={"min_quality": 0.95, "max_cost_usd": 0.001}, objective={"quality": 0, "cost": 1})
    assert decision.expert == "middle"  # the best of those that are possible, though the objective is cost
    assert decision.removed.keys() == {"large"}
    assert "none reaches the quality floor of 0.95" in decision.reason


def test_strict_floor_refuses() -> None:
    with pytest.raises(NoExpertError) as caught:
        choose(constraints={"min_quality": 0.95, "floor": "strict"})
    assert caught.value.removed.keys() == {"small", "middle", "large"}
    assert "large: its estimated quality of 0.90 is below 0.95" in str(caught.value)


@pytest.mark.parametrize(
    ("query", "able", "word"),
    [
        (Query(text="", needs_features=frozenset({"tools", "json"})), "tools", "json or tools"),
        (Query(text="", needs_modalities=frozenset({"text", "image"})), "sees", "image"),
        (Query(text="", input_tokens=5000), "long", "4096"),
        (Query(text="", input_tokens=4000, max_output_tokens=200), "long", "about 4200"),
        (Query(text="", endpoint="embeddings"), "embeds", "embeddings"),
    ],
)
def test_what_the_request_needs(query: Query, able: str, word: str) -> None:
    cards = [
        card("plain"),
        card("tools", features={"tools", "json"}),
        card("sees", modalities={"text", "image"}),
        card("long", context_length=100_000),
        card("embeds", kind="embedding"),
    ]
    decision = Policy(name="p").choose(estimates([0.9, 0.1, 0.1, 0.1, 0.1], [0.0] * 5), cards, query)
    assert [candidate.expert for candidate in decision.ranking] == [able]
    assert word in decision.removed["plain"]
    with pytest.raises(NoExpertError, match=word):
        check_able(cards[0], query)
    check_able(next(c for c in cards if c.name == able), query)


def test_ties_go_to_quality_then_cost_then_name() -> None:
    def first(qualities: list[float], costs: list[float], **objective: float) -> str:
        return choose(numbers=estimates(qualities, costs), objective=objective).expert

    assert first([0.5, 0.5, 0.5], [1, 1, 1], quality=1, cost=1) == "large"
    assert first([0.5, 0.5, 0.5], [2, 1, 2], quality=1, cost=0) == "middle"
    assert first([0.1, 0.2, 0.3], [1, 1, 1], quality=0, cost=1) == "large"
    assert first([0.5, 0.5000001, 0.5], [1, 2, 3], quality=1, cost=0) == "small"  # rounding decides nothing


def test_named_fallbacks_follow_the_best() -> None:
    decision = choose(objective={"quality": 0.01}, fallbacks={"experts": ["large"]})
    assert [c.expert for c in decision.ranking] == ["middle", "large", "small"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": {"quality": 0, "cost": 0}}, "at least one weight"),
        ({"objective": {"quality": -1}}, "greater than or equal to 0"),
        ({"objective": {"cost": float("inf")}}, "finite"),
        ({"constraints": {"allow": {"names": ["a"]}, "deny": {"names": ["a"]}}}, "both allowed and denied"),
        ({"constraints": {"allow": {"tags": ["a"]}, "deny": {"tags": ["a"]}}}, "both allowed and denied"),
        ({"constraints": {"min_quality": 1.5}}, "less than or equal to 1"),
        ({"constraints": {"max_cost_usd": 0}}, "greater than 0"),
        ({"constraints": {"deny": {"names": ["a"]}}, "fallbacks": {"experts": ["a"]}}, "denied by the constraints"),
        ({"constraints": {"allow": {"names": ["a"]}}, "fallbacks": {"experts": ["b"]}}, "not among the experts"),
        ({"fallbacks": {"max_attempts": 1, "experts": ["a"]}}, "leaves no attempt"),
        ({"fallbacks": {"experts": ["a", "a"]}}, "named twice"),
        ({"router": {"name": "knn", "options": {"k": 3}, "artefact": "x"}}, "give `options` or `artefact`"),
        ({"name": "Not a name"}, "pattern"),
        ({"objectives": {}}, "Extra inputs"),
    ],
)
def test_contradictions_fail(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Policy.model_validate({"name": "test", **fields})


def test_policy_must_fit_the_fleet() -> None:
    policy = Policy.model_validate(
        {
            "name": "p",
            "constraints": {"deny": {"names": ["ghost"], "tags": ["none"]}},
            "fallbacks": {"experts": ["lost"]},
        }
    )
    with pytest.raises(RouterConfigError, match="policy 'p' speaks of 'ghost', 'lost', tag 'none'"):
        policy.check_fleet(CARDS)
    Policy.model_validate({"name": "p", "constraints": {"deny": {"tags": ["dear"]}}}).check_fleet(CARDS)


def test_shipped_policies() -> None:
    policies = load_policies(POLICIES)
    assert set(policies) == {"auto", "cheap", "best", "cascade", "vote", "mixture_of_agents", "self_moa", "router_r1"}
    assert all(create_strategy(policy).name == policy.strategy.name for policy in policies.values())
    numbers = estimates([0.5, 0.97, 0.98], [0.000002, 0.000012, 0.00004])
    single = {name: policy for name, policy in policies.items() if policy.strategy.name == "single"}
    assert {name: policy.choose(numbers, CARDS, QUERY).expert for name, policy in single.items()} == {
        "auto": "middle",
        "cheap": "middle",
        "best": "large",
    }
    assert policies["auto"].router.artefact == POLICIES.parent / "routers" / "pocket-knn"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: other", "holds the policy 'other'"),
        ("name: [", "mine.yaml"),
        ("- name", "valid dictionary"),
        ("", "valid dictionary"),
        ("name: mine\nmystery: 1", "mystery"),
    ],
)
def test_broken_files_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "mine", text)
    with pytest.raises(RouterConfigError, match=message) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RouterConfigError, match="has no policy"):
        load_policies(tmp_path)


unit = st.floats(0, 1, width=32)
weights = st.fixed_dictionaries({"quality": unit, "cost": st.just(1.0), "latency": unit})
constraint_fields = st.fixed_dictionaries(
    {},
    optional={
        "max_cost_usd": st.floats(0.001, 1),
        "max_latency_s": st.floats(0.001, 1),
        "min_quality": st.floats(0.01, 1),
        "floor": st.sampled_from(["relax", "strict"]),
        "deny": st.fixed_dictionaries({"names": st.sets(st.sampled_from(["e0", "e1", "e2"]))}),
        "allow": st.fixed_dictionaries({"tags": st.sets(st.sampled_from(["even", "odd"]))}),
    },
)


def attempt(policy: Policy, numbers: Estimates, cards: list[ExpertCard], query: Query) -> Decision | NoExpertError:
    try:
        return policy.choose(numbers, cards, query)
    except NoExpertError as error:
        return error


@given(
    numbers=st.lists(st.tuples(unit, unit, unit), min_size=1, max_size=6),
    objective=weights,
    constraints=constraint_fields,
    tokens=st.integers(0, 8000),
)
def test_ranking_and_removed_part_the_fleet(
    numbers: list[tuple[float, float, float]], objective: dict[str, float], constraints: dict[str, Any], tokens: int
) -> None:
    cards = [card(f"e{i}", tags={"odd" if i % 2 else "even"}) for i in range(len(numbers))]
    quality, cost, latency = (list(column) for column in zip(*numbers, strict=True))
    policy = Policy.model_validate({"name": "p", "objective": objective, "constraints": constraints})
    table, query = estimates(quality, cost, latency), Query(text="", input_tokens=tokens)
    decision = attempt(policy, table, cards, query)
    if isinstance(decision, NoExpertError):
        assert decision.removed.keys() == {c.name for c in cards}
        return
    ranked = [candidate.expert for candidate in decision.ranking]
    assert ranked
    assert sorted([*ranked, *decision.removed]) == sorted(c.name for c in cards)
    assert not {c for c in ranked if c in constraints.get("deny", {}).get("names", ())}
    assert all(c.cost_usd <= constraints.get("max_cost_usd", np.inf) for c in decision.ranking)
    if "quality floor" not in decision.reason:
        scores = [candidate.score for candidate in decision.ranking]
        assert scores == sorted(scores, reverse=True)
        assert all(c.quality >= constraints.get("min_quality", 0) for c in decision.ranking)
    shuffled = policy.choose(estimates(quality[::-1], cost[::-1], latency[::-1]), cards[::-1], query)
    assert [candidate.expert for candidate in shuffled.ranking] == ranked
