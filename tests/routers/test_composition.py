"""`composition`: categories that know what they do not know, tables solved exactly, edited by hand, retrained apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.cards import ExpertCard
from routers.assignment import assign
from routers.composition import CompositionRouter, TableBudget
from routers.contracts import Observations, Query
from routers.embedder import Embedder
from routers.errors import ObservationError, RouterConfigError
from routers.policy import Objective, Policy
from routers.registry import create_router, load_router
from tests.routers.conftest import TOPICS

KNOWN = {"dates": "what day of the week month", "sums": "add the number total sum", "cities": "capital city country"}
STRANGE = "zyx qwv kjh gfd plm"


def fitted(table: Observations, embedder: Embedder, **options: object) -> CompositionRouter:
    router = create_router("composition", options, embedder=embedder).fit(table)
    assert isinstance(router, CompositionRouter)
    return router


@pytest.fixture
def router(table: Observations, fake_embedder: Embedder) -> CompositionRouter:
    return fitted(table, fake_embedder)


def test_a_query_goes_by_its_category(router: CompositionRouter) -> None:
    found = router.categorise(list(KNOWN.values()))
    assert [category for category, _ in found] == list(KNOWN)
    assert all(probability > 0.5 for _, probability in found)
    assert router.table == {**{topic: f"{topic}-expert" for topic in TOPICS}, "general": router.table["general"]}


def test_what_is_out_of_scope_is_general(router: CompositionRouter) -> None:
    assert router.categorise([STRANGE]) == [("general", 1.0)]


def test_quality_alone_does_what_the_table_says(router: CompositionRouter, cards: list[ExpertCard]) -> None:
    router.table = {**dict.fromkeys(TOPICS, "base"), "general": "generalist"}
    policy = Policy(name="p", objective=Objective(quality=1, cost=0))
    queries = [Query(text=text) for text in (*KNOWN.values(), STRANGE)]
    estimates = router.estimate(queries, cards)
    chosen = [policy.choose(estimates, cards, query, row=row).expert for row, query in enumerate(queries)]
    assert chosen == ["base", "base", "base", "generalist"]


def test_a_dear_policy_may_go_below_the_table(router: CompositionRouter, cards: list[ExpertCard]) -> None:
    thrifty = Policy(name="p", objective=Objective(quality=0, cost=1))
    query = Query(text=KNOWN["sums"])
    assert thrifty.choose(router.estimate([query], cards), cards, query).expert == "base"


def test_the_table_is_edited_by_hand(router: CompositionRouter, tmp_path: Path, fake_embedder: Embedder) -> None:
    router.save(tmp_path)
    path = tmp_path / "table.yaml"
    rows = yaml.safe_load(path.read_text())["categories"]
    assert list(rows)[-1] == "general"
    assert rows["sums"]["expert"] == "sums-expert"
    assert 0 < rows["sums"]["share"] < 1
    path.write_text(path.read_text().replace("sums: {expert: sums-expert", "sums: {expert: generalist"))
    edited = load_router(tmp_path, embedder=fake_embedder)
    assert isinstance(edited, CompositionRouter)
    assert edited.table == {**router.table, "sums": "generalist"}


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("expert: sums-expert", "expert: nobody", r"names \['nobody'\]"),
        ("  sums: ", "  additions: ", "must have the categories"),
        ("expert: sums-expert", "answers: sums-expert", "category 'sums' must name its `expert`"),
        ("categories:", "categories: {", "cannot be read"),
        ("categories:", "table:", "must have `categories`"),
    ],
)
def test_a_wrong_table_is_refused(
    router: CompositionRouter, tmp_path: Path, fake_embedder: Embedder, old: str, new: str, wrong: str
) -> None:
    router.save(tmp_path)
    path = tmp_path / "table.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RouterConfigError, match=f"(?s)table.yaml.*{wrong}"):
        load_router(tmp_path, embedder=fake_embedder)


def test_categories_and_table_are_retrained_apart(router: CompositionRouter, table: Observations) -> None:
    before, query = router.table, [Query(text=KNOWN["dates"])]
    quality = router.estimate(query, table.cards).quality
    router.retrain_categories([*table.texts, *[f"{STRANGE} {i}" for i in range(40)]], [*table.tasks, *["dates"] * 40])
    assert router.table == before
    assert router.categorise([STRANGE])[0][0] == "dates"
    with pytest.raises(ObservationError, match="differ in 'rivers'"):
        router.retrain_categories(table.texts, [*table.tasks[:-1], "rivers"])
    swapped = Observations(
        ids=table.ids, texts=table.texts, tasks=[""] * len(table.texts), cards=table.cards, quality=1 - table.quality,
        cost_usd=table.cost_usd, input_tokens=table.input_tokens, output_tokens=table.output_tokens,
        latency_s=table.latency_s,
    )  # fmt: skip
    router.retrain_table(swapped)
    assert all(router.table[topic] != before[topic] for topic in TOPICS)
    assert not np.allclose(router.estimate(query, table.cards).quality, quality)


def test_clusters_where_there_are_no_labels(table: Observations, fake_embedder: Embedder) -> None:
    bare = Observations(
        ids=table.ids, texts=table.texts, tasks=[""] * len(table.texts), cards=table.cards, quality=table.quality,
        cost_usd=table.cost_usd, input_tokens=table.input_tokens, output_tokens=table.output_tokens,
        latency_s=table.latency_s,
    )  # fmt: skip
    router = fitted(bare, fake_embedder, clusters=3, shrinkage=1)
    assert len(router.table) == 4
    assert set(router.table.values()) >= {f"{topic}-expert" for topic in TOPICS}


def test_a_budget_binds_on_the_train_mean(table: Observations, fake_embedder: Embedder) -> None:
    free = fitted(table, fake_embedder)
    spent = _mean_cost(free, table)
    bound = fitted(table, fake_embedder, budget={"mean_cost_usd": spent / 2})
    assert _mean_cost(bound, table) <= spent / 2 * 1.05
    with pytest.raises(RouterConfigError, match="the cheapest table takes"):
        fitted(table, fake_embedder, budget={"mean_cost_usd": spent / 1e6})


def _mean_cost(router: CompositionRouter, table: Observations) -> float:
    places = {card.name: e for e, card in enumerate(table.cards)}
    chosen = [places[router.table[category]] for category, _ in router.categorise(table.texts)]
    return float(np.mean([table.cost_usd[row, e] for row, e in enumerate(chosen)]))


def test_a_budget_that_a_table_was_retrained_for_is_kept(
    table: Observations, fake_embedder: Embedder, tmp_path: Path
) -> None:
    router = fitted(table, fake_embedder)
    half = TableBudget(mean_cost_usd=_mean_cost(router, table) / 2)
    router.retrain_table(table, half)
    bound = router.table
    router.save(tmp_path)
    for again in (router, load_router(tmp_path, embedder=fake_embedder)):
        assert isinstance(again, CompositionRouter)
        assert again.config.budget == half
        again.retrain_table(table)
        assert again.table == bound


def test_a_budget_of_active_parameters(table: Observations, fake_embedder: Embedder) -> None:
    sizes = {"dates-expert": 2.0, "sums-expert": 2.0, "cities-expert": 2.0, "generalist": 8.0, "base": 1.0}
    router = fitted(table, fake_embedder, budget={"mean_active_parameters": 1.5, "active_parameters": sizes})
    shares = [category for category, _ in router.categorise(table.texts)]
    assert np.mean([sizes[router.table[category]] for category in shares]) <= 1.5 * 1.05
    assert "base" in router.table.values()
    with pytest.raises(RouterConfigError, match="lacks base"):
        fitted(table, fake_embedder, budget={"mean_active_parameters": 2, "active_parameters": {"generalist": 8.0}})


@pytest.mark.parametrize(
    "budget",
    [{"mean_cost_usd": 1, "mean_active_parameters": 1}, {"mean_active_parameters": 1}, {"active_parameters": {"a": 1}}],
)
def test_a_budget_is_of_one_thing(budget: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"budget|active_parameters"):
        TableBudget.model_validate(budget)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 4), st.floats(0.2, 0.9))
def test_the_assignment_is_the_best_of_all(seed: int, categories: int, experts: int, tightness: float) -> None:
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.ones(categories))
    value, price = random.random((categories, experts)), random.random((categories, experts)) * 1e-5
    low, high = shares @ price.min(1), shares @ price.max(1)
    budget = float(low + tightness * (high - low))
    chosen = assign(shares, value, price, budget)
    rows = np.arange(categories)
    assert shares @ price[rows, chosen] <= budget * (1 + 1e-6)
    best = max(
        float(shares @ value[rows, list(choice)])
        for choice in itertools.product(range(experts), repeat=categories)
        if shares @ price[rows, list(choice)] <= budget
    )
    assert shares @ value[rows, chosen] == pytest.approx(best, abs=1e-6)


def test_the_assignment_is_exact() -> None:
    """Forty categories with values so close to each other that a solver with a tolerance stops short of the best."""
    random = np.random.default_rng(3)
    categories = 40
    shares = np.full(categories, 1 / categories)
    value = np.stack([np.full(categories, 0.9), 0.9 + 1e-4 * random.random(categories)], axis=1)
    price = np.stack([np.full(categories, 1.0), 1.0 + random.integers(1, 40, categories)], axis=1)
    budget = 1.0 + 10.0
    gain, weight, room = value[:, 1] - value[:, 0], (price[:, 1] - 1).astype(int), categories * 10
    best = np.zeros(room + 1)  # a knapsack: the exact answer by dynamic programming
    for one, heavy in zip(gain, weight, strict=True):
        best[heavy:] = np.maximum(best[heavy:], best[: room + 1 - heavy] + one)
    chosen = assign(shares, value, price, budget)
    assert gain[chosen == 1].sum() == pytest.approx(best[-1], abs=1e-9)
    assert weight[chosen == 1].sum() <= room


def test_a_category_without_queries_has_the_best_expert_that_fits_the_budget_by_itself() -> None:
    shares = np.array([1.0, 0.0, 0.0, 0.0])
    value = np.array([[0.2, 0.5, 0.9], [0.1, 0.6, 0.9], [0.1, 0.9, 0.2], [0.1, 0.9, 0.9]])
    price = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 2.0], [4.0, 5.0, 6.0]])
    assert assign(shares, value, price, 2.5).tolist() == [1, 1, 1, 0]
    assert assign(shares, value[:, ::-1], price[:, ::-1], 2.5).tolist() == [1, 1, 1, 2]


def test_without_a_budget_the_cheapest_of_the_best() -> None:
    value, price = np.array([[0.5, 0.9, 0.9], [0.7, 0.1, 0.2]]), np.array([[1.0, 3.0, 2.0], [1.0, 1.0, 1.0]])
    assert assign(np.array([0.5, 0.5]), value, price, None).tolist() == [2, 0]
