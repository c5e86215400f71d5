"""What every router promises, on the small world of conftest: batch invariance, new experts, save and load, limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.cards import ExpertCard
from routers.contracts import Observations, Query
from routers.embedder import Embedder, EmbedderConfig
from routers.errors import ObservationError, RouterConfigError, RouterNotFittedError
from routers.knn import KnnConfig, KnnRouter
from routers.registry import AnyRouter, create_router, load_router, router_class, router_names

TEXTS = ["what day of the week", "the sum of two digits", "capital of the country", "something else entirely"]
same_fixture = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def router(router_name: str, table: Observations, fake_embedder: Embedder) -> AnyRouter:
    return create_router(router_name, embedder=fake_embedder).fit(table)


def queries(*texts: str) -> list[Query]:
    return [Query(text=text) for text in texts]


def test_estimates_are_finite_and_in_range(router: AnyRouter, cards: list[ExpertCard]) -> None:
    estimates = router.estimate(queries(*TEXTS), cards)
    for array in (estimates.quality, estimates.cost_usd, estimates.latency_s):
        assert array.shape == (len(TEXTS), len(cards))
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
        assert (array >= 0).all()
    assert (estimates.quality <= 1).all()


@same_fixture
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=12), pick=st.integers(min_value=0))
def test_a_query_alone_and_in_a_batch(router: AnyRouter, cards: list[ExpertCard], texts: list[str], pick: int) -> None:
    together = router.estimate(queries(*texts), cards)
    row = pick % len(texts)
    alone = router.estimate(queries(texts[row]), cards)
    np.testing.assert_allclose(alone.quality[0], together.quality[row], atol=2e-6)
    np.testing.assert_allclose(alone.cost_usd[0], together.cost_usd[row], rtol=1e-5, atol=1e-12)


def test_no_queries(router: AnyRouter, cards: list[ExpertCard]) -> None:
    assert router.estimate([], cards).quality.shape == (0, len(cards))


def test_same_seed_same_router(router: AnyRouter, table: Observations, fake_embedder: Embedder) -> None:
    again = create_router(router.name, embedder=fake_embedder).fit(table)
    one, two = (r.estimate(queries(*TEXTS), table.cards) for r in (router, again))
    np.testing.assert_array_equal(one.quality, two.quality)


def test_columns_follow_the_cards(router: AnyRouter, cards: list[ExpertCard]) -> None:
    some = [cards[3], cards[0]]
    whole, part = router.estimate(queries(*TEXTS), cards), router.estimate(queries(*TEXTS), some)
    np.testing.assert_array_equal(part.quality, whole.quality[:, [3, 0]])
    np.testing.assert_array_equal(part.cost_usd, whole.cost_usd[:, [3, 0]])


def test_cost_is_tokens_at_the_prices_of_the_card_given(router: AnyRouter, cards: list[ExpertCard]) -> None:
    general = next(card for card in cards if card.name == "generalist")
    dearer = general.model_copy(update={"output_price": 80.0})
    query = Query(text=TEXTS[0], input_tokens=1000)
    now, then = router.estimate([query], [general]), router.estimate([query], [dearer])
    # observed: half a token a character, so twice the tokens counted at four characters each; 60 tokens out
    assert now.cost_usd[0, 0] == pytest.approx(1e-6 * (2000 * 10 + 60 * 40), rel=1e-4)
    assert then.cost_usd[0, 0] == pytest.approx(1e-6 * (2000 * 10 + 60 * 80), rel=1e-4)
    assert now.latency_s[0, 0] == pytest.approx(60 * 0.01, rel=1e-4)


def test_the_caller_s_limit_bounds_output(router: AnyRouter, cards: list[ExpertCard]) -> None:
    free = [card.model_copy(update={"input_price": 0.0}) for card in cards]
    estimates = router.estimate([Query(text="x", max_output_tokens=5)], free)
    np.testing.assert_allclose(estimates.cost_usd[0], [card.output_price * 5e-6 for card in free], rtol=1e-5)


def test_save_and_load(router: AnyRouter, table: Observations, fake_embedder: Embedder, tmp_path: Path) -> None:
    new = ExpertCard(name="new", description="rivers and cities", input_price=2, output_price=8)
    router.add_expert(new, only(table, "cities-expert", new))
    router.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"table.yaml"} == {"router.json", "router.safetensors"}
    loaded = load_router(tmp_path, embedder=fake_embedder)
    assert type(loaded) is type(router)
    assert loaded.config == router.config
    one, two = (r.estimate(queries(*TEXTS), [*table.cards, new]) for r in (router, loaded))
    np.testing.assert_array_equal(one.quality, two.quality)
    np.testing.assert_array_equal(one.cost_usd, two.cost_usd)
    np.testing.assert_array_equal(one.latency_s, two.latency_s)


def only(table: Observations, expert: str, card: ExpertCard) -> Observations:
    """The observations of `expert` as those of `card`."""
    column = [c.name for c in table.cards].index(expert)
    return Observations(
        ids=table.ids,
        texts=table.texts,
        tasks=table.tasks,
        cards=[card],
        quality=table.quality[:, [column]],
        cost_usd=table.cost_usd[:, [column]],
        input_tokens=table.input_tokens[:, [column]],
        output_tokens=table.output_tokens[:, [column]],
        latency_s=table.latency_s[:, [column]],
    )


@pytest.mark.parametrize("count", [1, 16, 64])
def test_a_few_observations_beat_the_card(
    table: Observations, cards: list[ExpertCard], fake_embedder: Embedder, count: int
) -> None:
    router = create_router("knn", {"k": 20}, embedder=fake_embedder).fit(table.without("generalist"))
    general = next(card for card in cards if card.name == "generalist")
    new = general.model_copy(update={"description": "small and cheap", "input_price": 0.1, "output_price": 0.4})
    asked = queries(*table.texts[100:160])
    promised = router.estimate(asked, [new])
    few = only(table.rows(np.arange(count)), "generalist", new)
    router.add_expert(new, few)
    learnt = router.estimate(asked, [new])
    wrong = [abs(numbers.quality.mean() - 0.7) for numbers in (promised, learnt)]  # its card looks like the base's
    if count >= 16:
        assert wrong[1] < wrong[0] * {16: 0.8, 64: 0.5}[count]
        assert learnt.cost_usd.mean() > 2 * promised.cost_usd.mean()
    assert 0 <= learnt.quality.min() <= learnt.quality.max() <= 1
    assert learnt.uncertainty is not None
    assert promised.uncertainty is not None
    assert learnt.uncertainty.mean() < promised.uncertainty.mean()


def test_a_card_alone_says_what_an_expert_is_for(
    table: Observations, cards: list[ExpertCard], fake_embedder: Embedder
) -> None:
    router = create_router("knn", {"k": 20}, embedder=fake_embedder).fit(table.without("dates-expert"))
    date, total = (router.estimate(queries(text), cards[:1]).quality[0, 0] for text in (
        "day month year calendar week", "add subtract number total plus"
    ))  # fmt: skip
    assert date > total + 0.1


def test_an_expert_fitted_on_is_not_added(router: AnyRouter, cards: list[ExpertCard]) -> None:
    with pytest.raises(RouterConfigError, match="fitted on 'base' already"):
        router.add_expert(cards[-1])


def test_observations_of_others_do_not_add(router: AnyRouter, table: Observations) -> None:
    with pytest.raises(ObservationError, match="no expert 'new'"):
        router.add_expert(ExpertCard(name="new"), table)


def test_expert_never_observed_is_left_to_its_card(
    router_name: str, table: Observations, fake_embedder: Embedder, cards: list[ExpertCard]
) -> None:
    quality = table.quality.copy()
    quality[:, 1] = np.nan
    router = create_router(router_name, embedder=fake_embedder).fit(replace(table, quality=quality))
    assert [card.name for card in router.cards] == [card.name for card in cards if card is not cards[1]]
    assert np.isfinite(router.estimate(queries(*TEXTS), cards).quality).all()


def test_tokens_are_implied_by_cost(table: Observations, fake_embedder: Embedder, cards: list[ExpertCard]) -> None:
    blank = np.full_like(table.output_tokens, np.nan)
    router = create_router("best", embedder=fake_embedder).fit(replace(table, output_tokens=blank))
    np.testing.assert_allclose(router.profile.output_tokens, [20, 20, 20, 60, 10], rtol=1e-3)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_quality_out_of_range_is_refused(router_name: str, table: Observations, value: float) -> None:
    quality = table.quality.copy()
    quality[3, 2] = value
    with pytest.raises(ObservationError, match=r"quality lies in 0\.\.1"):
        create_router(router_name).fit(replace(table, quality=quality))


def test_nothing_observed_is_refused(table: Observations) -> None:
    with pytest.raises(ObservationError, match="no observed quality"):
        create_router("best").fit(replace(table, quality=np.full_like(table.quality, np.nan)))


def test_unfitted_router_says_so(router_name: str, cards: list[ExpertCard]) -> None:
    with pytest.raises(RouterNotFittedError, match=repr(router_name)):
        create_router(router_name).estimate(queries("x"), cards)


# Registry and artefacts


def test_unknown_router_lists_the_known() -> None:
    with pytest.raises(RouterConfigError, match=r"no router is named 'magic'; known are .*knn"):
        router_class("magic")
    assert {"best", "cheapest", "knn", "random"} <= set(router_names())


def test_unknown_option_is_refused() -> None:
    with pytest.raises(RouterConfigError, match=r"(?s)router 'knn'.*neighbours"):
        create_router("knn", {"neighbours": 3})


def test_search_space_names_options_of_the_config() -> None:
    found = router_class("knn")
    assert (
        set(found.search_space())
        == {"k", "temperature", "shrinkage", "text_weight"}
        <= set(found.config_type.model_fields)
    )


def test_other_embedder_than_configured_is_refused(fake_embedder: Embedder) -> None:
    with pytest.raises(RouterConfigError, match="max_tokens=16"):
        create_router("knn", {"embedder": EmbedderConfig(max_tokens=16)}, embedder=fake_embedder)


def _header(folder: Path, **changes: Any) -> None:
    path = folder / "router.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 0}, "has format 0"),
        ({"router": "best"}, "malformed"),
        ({"router": 3}, "does not name a router"),
        ({"sha256": "0"}, "is not the file"),
        ({"arrays": {}}, "describes other arrays"),
        ({"cards": [{"name": "?"}]}, "is malformed"),
        ({"cards": []}, "shape"),
        ({"config": {"k": -1}}, "is malformed"),
        ({"embedding_weights_sha256": "x"}, "other weights"),
    ],
)
def test_artefact_that_was_tampered_with_is_refused(
    table: Observations, fake_embedder: Embedder, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    create_router("knn", embedder=fake_embedder).fit(table).save(tmp_path)
    _header(tmp_path, **changes)
    with pytest.raises(RouterConfigError, match=message):
        load_router(tmp_path, embedder=fake_embedder)


def test_folder_without_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RouterConfigError, match=r"router\.json cannot be read"):
        load_router(tmp_path)


# One router each


def test_best_and_cheapest(table: Observations, cards: list[ExpertCard]) -> None:
    best = create_router("best").fit(table).estimate(queries(*TEXTS), cards)
    assert {cards[i].name for i in best.quality.argmax(1)} == {"generalist"}
    np.testing.assert_allclose(best.quality[0], np.nanmean(table.quality, 0), atol=1e-6)
    cheapest = create_router("cheapest").fit(table).estimate(queries(*TEXTS), cards)
    assert np.unique(cheapest.quality).size == 1
    assert {cards[i].name for i in cheapest.cost_usd.argmin(1)} == {"base"}


def test_random_is_even_and_seeded(table: Observations, cards: list[ExpertCard]) -> None:
    asked = queries(*(f"query {i}" for i in range(2000)))
    one, two = (create_router("random", {"seed": seed}).fit(table).estimate(asked, cards).quality for seed in (0, 1))
    counts = np.bincount(one.argmax(1), minlength=len(cards))
    assert (abs(counts - 400) < 80).all()
    assert (one.argmax(1) != two.argmax(1)).mean() > 0.7


def test_knn_finds_the_specialist(table: Observations, cards: list[ExpertCard], fake_embedder: Embedder) -> None:
    options = {"k": 20, "temperature": 0.1, "text_weight": 1.0}
    router = create_router("knn", options, embedder=fake_embedder).fit(table.rows(np.arange(120)))
    asked = table.rows(np.arange(120, 180))
    chosen = router.estimate(queries(*asked.texts), cards).quality.argmax(1)
    assert np.mean([cards[e].name == f"{task}-expert" for e, task in zip(chosen, asked.tasks, strict=True)]) > 0.75


def test_knn_is_the_weighted_mean_of_its_neighbours(
    table: Observations, cards: list[ExpertCard], fake_embedder: Embedder
) -> None:
    k, temperature, shrinkage = 15, 0.3, 2.0
    config = KnnConfig(k=k, temperature=temperature, shrinkage=shrinkage, text_weight=0.0)
    router = KnnRouter(config, embedder=fake_embedder).fit(table)
    found = router.estimate(queries(TEXTS[0]), cards).quality[0]
    embedding = fake_embedder.embed(TEXTS[:1])[0]
    arrays = router._arrays()
    # The same arithmetic, since many neighbours tie; its cosines are the embeddings' own.
    cosines = arrays["knn.places"].astype(np.float32) @ (arrays["knn.directions"][:, : embedding.size] @ embedding)
    np.testing.assert_allclose(cosines, fake_embedder.embed(table.texts) @ embedding, atol=2e-3)
    nearest = np.argsort(-cosines)[:k]
    weights = np.exp((cosines[nearest] - cosines.max()) / temperature)
    for e in range(len(cards)):
        seen = np.isfinite(table.quality[nearest, e])
        mean = np.nanmean(table.quality[:, e])
        total = (weights[seen] * table.quality[nearest[seen], e]).sum() + shrinkage * mean
        assert found[e] == pytest.approx(total / (weights[seen].sum() + shrinkage), abs=1e-4)


def test_knn_uncertainty_falls_with_agreement(
    table: Observations, cards: list[ExpertCard], fake_embedder: Embedder
) -> None:
    sure = replace(table, quality=np.where(np.isfinite(table.quality), np.float32(1), np.nan))
    ones, mixed = (
        create_router("knn", embedder=fake_embedder).fit(t).estimate(queries(TEXTS[0]), cards).uncertainty
        for t in (sure, table)
    )
    assert ones is not None
    assert mixed is not None
    assert (ones < mixed).all()
    assert (mixed < 0.5).all()
