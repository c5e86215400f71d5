"""Routers that look at no text: the floor that every other router is measured against."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations


class SimpleRouter(FittedRouter[RouterConfig]):
    """Expects of each expert its mean answer length, whatever the query, and learns nothing else."""

    config_type = RouterConfig
    embeds = False

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        """Nothing beyond the profile."""

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        profile, shape = self.profile, (len(texts), len(self.cards))
        return Prediction(self._quality(texts), np.broadcast_to(profile.output_tokens, shape))

    def _quality(self, texts: Sequence[str]) -> FloatArray:
        raise NotImplementedError

    def _arrays(self) -> Mapping[str, AnyArray]:
        return {}

    def _restore(self, artefact: Artefact) -> None:
        """Nothing beyond the profile."""


class BestRouter(SimpleRouter):
    """Each expert's quality is its mean: a policy that wants quality gets the best single expert."""

    name = "best"

    def _quality(self, texts: Sequence[str]) -> FloatArray:
        return np.broadcast_to(self.profile.quality, (len(texts), len(self.cards)))


class CheapestRouter(SimpleRouter):
    """All experts are alike, at the fleet's mean quality: cost alone decides."""

    name = "cheapest"

    def _quality(self, texts: Sequence[str]) -> FloatArray:
        return np.full((len(texts), len(self.cards)), self.profile.quality.mean(), np.float32)


class RandomRouter(SimpleRouter):
    """Quality drawn evenly from 0..1 by a hash of seed, expert and text: the same query always gets the same draw."""

    name = "random"

    def _quality(self, texts: Sequence[str]) -> FloatArray:
        names = [card.name for card in self.cards]
        draws = [[_draw(f"{self.config.seed}\0{name}\0{text}") for name in names] for text in texts]
        return np.array(draws, np.float32).reshape(len(texts), len(names))


def _draw(text: str) -> float:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
