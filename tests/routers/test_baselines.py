"""The baselines that look at text: each finds what was planted, and is itself again when loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routers.artefact import Artefact
from routers.base import FittedRouter
from routers.cluster import ClusterConfig, ClusterRouter
from routers.contracts import FloatArray, Observations, Query
from routers.embedder import Embedder
from routers.errors import RouterConfigError
from routers.linear import LinearRouter
from routers.matrix_factorization import MatrixFactorizationConfig, MatrixFactorizationRouter, _error, _Factors
from routers.ridge import filled, fit_experts, fit_ridge
from routers.text_features import TextFeatures


@pytest.fixture(params=[ClusterRouter, LinearRouter, MatrixFactorizationRouter])
def router(request: pytest.FixtureRequest, fake_embedder: Embedder) -> FittedRouter[Any]:
    found: FittedRouter[Any] = request.param(embedder=fake_embedder)
    return found


def queries(texts: Any) -> list[Query]:
    return [Query(text=text) for text in texts]


def test_specialists_are_found(router: FittedRouter[Any], table: Observations) -> None:
    train, test = table.rows(np.arange(120)), table.rows(np.arange(120, 180))
    found = router.fit(train).estimate(queries(test.texts), test.cards)
    chosen = found.quality[:, :3].argmax(axis=1)
    own = np.array([("dates", "sums", "cities").index(task) for task in test.tasks])
    assert (chosen == own).mean() > 0.8
    assert found.quality[:, 3].mean() == pytest.approx(0.7, abs=0.12)
    np.testing.assert_allclose(found.cost_usd.mean(0), np.nanmean(train.cost_usd, axis=0), rtol=0.2)


def test_a_query_alone_is_estimated_as_in_a_batch(router: FittedRouter[Any], table: Observations) -> None:
    router.fit(table)
    batch = router.estimate(queries(table.texts[:9]), table.cards)
    alone = router.estimate(queries(table.texts[4:5]), table.cards)
    np.testing.assert_allclose(alone.quality[0], batch.quality[4], atol=1e-5)
    np.testing.assert_allclose(alone.cost_usd[0], batch.cost_usd[4], rtol=1e-4)


def test_odd_texts_are_estimated(router: FittedRouter[Any], table: Observations) -> None:
    found = router.fit(table).estimate(queries(["", " ", "\x00\ud800", "é" * 100_000, "9" * 5000]), table.cards)
    assert np.isfinite(found.quality).all()
    assert (found.quality >= 0).all()
    assert (found.quality <= 1).all()
    assert (found.cost_usd > 0).all()


def test_a_loaded_router_is_the_fitted_one(
    router: FittedRouter[Any], table: Observations, fake_embedder: Embedder, tmp_path: Path
) -> None:
    router.fit(table).save(tmp_path)
    loaded = type(router).load(tmp_path, embedder=fake_embedder)
    asked = queries(table.texts)
    np.testing.assert_array_equal(
        loaded.estimate(asked, table.cards).quality, router.estimate(asked, table.cards).quality
    )


def test_the_same_seed_gives_the_same_router(router: FittedRouter[Any], table: Observations) -> None:
    again = type(router)(router.config, embedder=router._embedder).fit(table)
    router.fit(table)
    asked = queries(table.texts)
    np.testing.assert_array_equal(
        again.estimate(asked, table.cards).quality, router.estimate(asked, table.cards).quality
    )


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_small_tables_will_do(router: FittedRouter[Any], table: Observations, rows: int) -> None:
    few = table.rows(np.arange(rows))
    assert np.isfinite(router.fit(few).estimate(queries(["sum of"]), table.cards).quality).all()


def test_a_left_out_expert_is_added_from_few_observations(router: FittedRouter[Any], table: Observations) -> None:
    base = table.cards[4]
    router.fit(table.without("base"))
    router.add_expert(base)
    from_card = router.estimate(queries(table.texts), [base]).quality.mean()
    router.add_expert(base, table.rows(np.arange(64)))
    from_few = router.estimate(queries(table.texts), [base]).quality.mean()
    assert abs(from_few - 0.2) < abs(from_card - 0.2)
    assert from_few == pytest.approx(0.2, abs=0.15)


def test_shrinkage_tames_the_record_of_a_small_cluster(table: Observations, fake_embedder: Embedder) -> None:
    def spread(shrinkage: float) -> float:
        config = ClusterConfig(nearest=1, shrinkage=shrinkage)
        router = ClusterRouter(config, embedder=fake_embedder).fit(table)
        return float(router.estimate(queries(table.texts), table.cards[3:4]).quality.std())

    assert spread(100) < spread(0) / 2


def test_matrix_factorisations_gradients_are_those_of_its_loss() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(6, 4)).astype(np.float32)
    quality = random.integers(0, 2, (6, 3)).astype(np.float32)
    quality[0, 0] = np.nan
    factors = _Factors(4, 3, 2, seed=0)
    factors.values = [value.astype(np.float64) for value in factors.values]

    def loss() -> float:
        logits = features @ factors.logit_weights()
        return float(np.nanmean(np.logaddexp(0, logits) - quality * logits))

    gradients = factors.gradients(features, _error(features @ factors.logit_weights(), quality))
    for value, gradient in zip(factors.values, gradients, strict=True):
        for place in np.ndindex(value.shape):
            value[place] += 1e-5
            above = loss()
            value[place] -= 2e-5
            below = loss()
            value[place] += 1e-5
            assert gradient[place] == pytest.approx((above - below) / 2e-5, abs=2e-5)


def test_matrix_factorisation_stops_before_it_learns_by_heart(table: Observations, fake_embedder: Embedder) -> None:
    """Where nothing can be foretold, it foretells (nearly) the same of every query."""
    noise = replace(table, quality=np.random.default_rng(0).integers(0, 2, table.quality.shape).astype(np.float32))
    config = MatrixFactorizationConfig(learning_rate=0.01)
    router = MatrixFactorizationRouter(config, embedder=fake_embedder).fit(noise)
    assert router.estimate(queries(noise.texts), noise.cards).quality.std(axis=0).max() < 0.2


def test_a_foreign_artefact_is_refused(router: FittedRouter[Any], table: Observations, tmp_path: Path) -> None:
    router.fit(table).save(tmp_path)
    with pytest.raises(RouterConfigError, match="lacks the array"):
        router._restore(Artefact(tmp_path, {}, {}))


# Ridge


def test_ridge_finds_a_line_and_leaves_noise_alone() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(300, 10)).astype(np.float32)
    line = features @ np.arange(10.0) + 3 + 0.01 * random.normal(size=300)
    found = fit_ridge(features, np.stack([line, random.normal(size=300)], axis=1))
    np.testing.assert_allclose(found.weights[:, 0], np.arange(10), atol=0.01)
    assert found.bias[0] == pytest.approx(3, abs=0.01)
    assert np.abs(found.weights[:, 1]).max() < 0.05


def test_left_out_is_what_a_fit_without_the_row_says() -> None:
    random = np.random.default_rng(1)
    features = random.normal(size=(40, 3)).astype(np.float32)
    target = (features @ np.ones(3) + random.normal(size=40))[:, None]
    whole = fit_ridge(features, target)
    without = fit_ridge(np.delete(features, 7, axis=0), np.delete(target, 7, axis=0))
    assert whole.left_out[7, 0] == pytest.approx(features[7] @ without.weights[:, 0] + without.bias[0], abs=0.02)


def test_what_experts_share_is_kept_and_how_they_differ_by_chance_is_not() -> None:
    random = np.random.default_rng(2)
    features = random.normal(size=(400, 20)).astype(np.float32)
    hard = features[:, :1] > 0
    quality = (random.random((400, 6)) < np.where(hard, 0.2, 0.8)).astype(np.float64)
    together, apart = fit_experts(features, quality), fit_ridge(features, quality)
    found, noisy = (fit.weights @ (np.eye(6) - 1 / 6) for fit in (together, apart))
    assert np.linalg.norm(found) < np.linalg.norm(noisy) / 3
    assert together.weights[0].mean() == pytest.approx(apart.weights[0].mean(), rel=0.2)


def test_missing_pairs_are_filled_by_expert_and_query() -> None:
    values: FloatArray = np.array([[1, np.nan], [0, 0.5], [np.nan, np.nan]], np.float32)
    np.testing.assert_allclose(filled(values, np.array([0.5, 0.5], np.float32)), [[1, 1], [0, 0.5], [0.5, 0.5]])


def test_text_features_tell_shapes_and_words_apart() -> None:
    texts = ["def f(x):\n    return x", "What is 12 + 30?", "Name the capital.\nA. Rome\nB. Paris"] * 20
    features = TextFeatures.fit(texts, seed=0)
    found = features([*texts[:3], "What is 15 + 32?"])
    near = found[3] @ found[:3].T
    assert near.argmax() == 1
    assert found.dtype == np.float32


def test_text_features_stand_beside_embeddings_by_their_weight() -> None:
    texts = ["def f(x):\n    return x", "What is 12 + 30?"] * 20
    features = TextFeatures.fit(texts, seed=0)
    embeddings = np.eye(2, 5, dtype=np.float32)
    np.testing.assert_array_equal(features.beside(embeddings, texts[:2], 0)[:, :5], embeddings)
    light, heavy = (features.beside(embeddings, texts[:2], weight) for weight in (0.5, 4.0))
    np.testing.assert_allclose(np.linalg.norm(heavy, axis=1), 1, atol=1e-6)
    assert (heavy[:, :5].max(1) < light[:, :5].max(1)).all()
    assert features.beside(embeddings[:0], [], 1.0).shape == (0, heavy.shape[1])
