"""A small world to route in: three topics, one specialist each, a dear generalist, a cheap base."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from experts.cards import ExpertCard
from routers.contracts import FloatArray, Observations
from routers.embedder import Embedder

TOPICS = ("dates", "sums", "cities")
_WORDS = {
    "dates": ["day", "month", "year", "calendar", "week", "before", "after", "monday", "leap", "date"],
    "sums": ["add", "subtract", "number", "total", "plus", "minus", "digits", "product", "sum", "of"],
    "cities": ["capital", "country", "city", "river", "population", "europe", "asia", "map", "where", "in"],
}


class FakeEmbedder(Embedder):
    """Stands for the language model where its meaning does not matter: a bag of hashed words, as a unit vector."""

    def embed(self, texts: Sequence[str]) -> FloatArray:
        vectors = np.full((len(texts), self.dimensions), 0.01, np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[
                    row, int.from_bytes(hashlib.md5(word.encode("utf-8", "replace")).digest()[:2]) % self.dimensions
                ] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    @property
    def dimensions(self) -> int:
        return 64

    @property
    def weights_sha256(self) -> str:
        return "fake"


@pytest.fixture
def fake_embedder() -> FakeEmbedder:
    return FakeEmbedder()


@pytest.fixture
def cards() -> list[ExpertCard]:
    specialists = [
        ExpertCard(name=f"{topic}-expert", description=" ".join(_WORDS[topic][:4]), input_price=1, output_price=4)
        for topic in TOPICS
    ]
    general = ExpertCard(name="generalist", description="knows of everything", input_price=10, output_price=40)
    base = ExpertCard(name="base", description="small and cheap", input_price=0.1, output_price=0.4)
    return [*specialists, general, base]


@pytest.fixture
def table(cards: list[ExpertCard]) -> Observations:
    """180 queries by 5 experts: specialists right on their topic, the generalist on seven of ten, the base on two."""
    random = np.random.default_rng(0)
    tasks = [TOPICS[i % 3] for i in range(180)]
    texts = [" ".join([*random.choice(_WORDS[task], 8), f"q{i}"]) for i, task in enumerate(tasks)]
    right = np.array([[0.95 if topic == task else 0.1 for topic in TOPICS] + [0.7, 0.2] for task in tasks])
    quality = (random.random(right.shape) < right).astype(np.float32)
    quality[random.random(right.shape) < 0.2] = np.nan
    output = np.broadcast_to(np.array([20, 20, 20, 60, 10], np.float32), right.shape).copy()
    chars = np.array([len(text) for text in texts], np.float32)[:, None]
    tokens_in = chars * np.array([0.25, 0.25, 0.25, 0.5, 0.25], np.float32)
    prices = np.array([[card.input_price, card.output_price] for card in cards], np.float32) * 1e-6
    return Observations(
        ids=[str(i) for i in range(180)],
        texts=texts,
        tasks=tasks,
        cards=cards,
        quality=quality,
        cost_usd=tokens_in * prices[:, 0] + output * prices[:, 1],
        input_tokens=tokens_in.astype(np.float32),
        output_tokens=output,
        latency_s=output * np.float32(0.01),
    )


@pytest.fixture(params=["best", "cheapest", "random", "knn", "composition", "glider"])
def router_name(request: pytest.FixtureRequest) -> Any:
    return request.param
