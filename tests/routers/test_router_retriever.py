"""RouterRetriever: pilots, their aggregations, and what adding and removing a domain does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experts.cards import ExpertCard
from routers.contracts import FloatArray, Observations, Query
from routers.embedder import Embedder
from routers.registry import create_router, load_router
from routers.router_retriever import RouterRetriever

TEXTS = [
    "shock waves on a supersonic wing",
    "flow past a flat plate",
    "heat transfer in a boundary layer",
    "blood cells of the lung",
    "treatment of a bacterial infection",
    "growth hormone in rats",
]
TASKS = ["air"] * 3 + ["med"] * 3
NAN = np.nan


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


def table(quality: list[list[float]], names: list[str], rows: int = 6) -> Observations:
    measured = np.array(quality, np.float32)
    unknown = np.full_like(measured, np.nan)
    return Observations(
        ids=[str(i) for i in range(rows)],
        texts=TEXTS[:rows],
        tasks=TASKS[:rows],
        cards=[ExpertCard(name=name, kind="embedding") for name in names],
        quality=measured,
        cost_usd=np.zeros_like(measured),
        input_tokens=unknown,
        output_tokens=unknown,
        latency_s=unknown,
    )


BOTH = table([[0.9, 0.1], [0.9, 0.2], [0.3, 0.8], [0.1, 0.7], [0.2, 0.7], [0.5, 0.5]], ["air", "med"])


def fitted(embedder: Embedder, observations: Observations, **options: object) -> RouterRetriever:
    router = create_router("router_retriever", options, embedder=embedder).fit(observations)
    assert isinstance(router, RouterRetriever)
    return router


def unit(rows: FloatArray) -> FloatArray:
    mean = rows.mean(0)
    return mean / np.linalg.norm(mean)


def test_pilots_are_the_centroids_of_each_domains_groups_by_best_expert(embedder: Embedder) -> None:
    vectors = embedder.embed(TEXTS)
    expected = [
        ("air", unit(vectors[:2])),
        ("med", unit(vectors[2:3])),  # one query of the domain `air` that the expert `med` served better
        ("med", unit(vectors[3:])),  # the tie in the last row goes to the domain's better expert
    ]
    pilots = fitted(embedder, BOTH).pilots
    assert [name for name, _ in pilots] == [name for name, _ in expected]
    for (_, pilot), (_, wanted) in zip(pilots, expected, strict=True):
        np.testing.assert_allclose(pilot, wanted, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["mean", "max", "softmax"])
def test_quality_is_the_aggregated_cosine(embedder: Embedder, aggregation: str) -> None:
    router = fitted(embedder, BOTH, aggregation=aggregation, temperature=0.1)
    query = "a wing in supersonic flow"
    (vector,) = embedder.embed([query])
    cosines = {name: [float(vector @ p) for owner, p in router.pilots if owner == name] for name in ("air", "med")}
    everything = np.exp(np.concatenate(list(cosines.values())) / 0.1).sum()
    expected = []
    for own in cosines.values():
        weights = np.exp(np.array(own) / 0.1) / everything
        expected.append(
            {"mean": np.mean(own), "max": max(own), "softmax": (weights * own).sum() / weights.sum()}[aggregation]
        )
    estimates = router.estimate([Query(text=query)], router.cards)
    np.testing.assert_allclose(estimates.quality[0], (1 + np.array(expected)) / 2, atol=1e-5)
    assert estimates.quality[0].argmax() == 0


def test_a_query_is_estimated_the_same_alone_and_in_a_batch_and_after_loading(
    embedder: Embedder, tmp_path: Path
) -> None:
    router = fitted(embedder, BOTH, aggregation="softmax")
    queries = [Query(text=text) for text in ["lung cancer", "wing", "the rat's hormones"]]
    together = router.estimate(queries, router.cards).quality
    alone = np.concatenate([router.estimate([query], router.cards).quality for query in queries])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    router.save(tmp_path)
    loaded = load_router(tmp_path, embedder=embedder)
    assert loaded.estimate(queries, loaded.cards).quality.tobytes() == together.tobytes()


def test_a_domain_that_was_added_later_leaves_the_others_pilots_as_they_are(embedder: Embedder, tmp_path: Path) -> None:
    before = fitted(embedder, table([[0.9], [0.8], [0.7]], ["air"], rows=3))
    added = fitted(
        embedder, table([[0.9, NAN], [0.8, NAN], [0.7, NAN], [0.1, 0.7], [0.2, 0.7], [0.5, 0.4]], ["air", "med"])
    )
    assert added.pilots[0][1].tobytes() == before.pilots[0][1].tobytes()
    assert sorted(name for name, _ in added.pilots) == ["air", "air", "med"]
    again = fitted(embedder, table([[0.9], [0.8], [0.7]], ["air"], rows=3))
    before.save(tmp_path / "before")
    again.save(tmp_path / "again")
    for name in ("router.json", "router.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_expert_that_was_best_nowhere_is_never_chosen(embedder: Embedder) -> None:
    router = fitted(embedder, table([[0.9, 0.1]] * 6, ["good", "poor"]))
    quality = router.estimate([Query(text="anything")], router.cards).quality
    assert quality[0, 1] == 0 < quality[0, 0]
