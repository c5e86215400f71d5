"""A router that is fitted in many steps, each of which moves its state by a draw of its own: for tests of resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np

from routers.artefact import AnyArray, Artefact
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.contracts import FloatArray, Observations
from routers.search_space import Range


class KilledError(Exception):
    """Stands for a kill in the middle of a fit."""


class StepwiseConfig(RouterConfig):
    """Options of the stepwise router."""

    steps: int = 20
    shift: Annotated[float, Range(0.0, 1.0)] = 0.5


class StepwiseRouter(FittedRouter[StepwiseConfig]):
    """Its state is the mean qualities plus the sum of its steps' draws.

    `taken` counts the steps of all fits; when they are `kill_after`, the next one raises, once.
    """

    name = "stepwise"
    config_type = StepwiseConfig
    embeds = False
    taken: ClassVar[list[int]] = []
    kill_after: ClassVar[int | None] = None

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        start = {"state": np.nanmean(table.quality, axis=0)}
        step, arrays = self.checkpoint.load() or (0, start)
        state = arrays["state"]
        for i in range(step, self.config.steps):
            if len(self.taken) == self.kill_after:
                StepwiseRouter.kill_after = None
                raise KilledError
            self.taken.append(i)
            draws = np.random.default_rng([self.config.seed, i]).normal(size=state.shape)
            state = (state + 0.01 * self.config.shift * draws).astype(np.float32)
            self.checkpoint.step(i + 1, self.config.steps, lambda now=state: {"state": now})
        self._state = state

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        shape = (len(texts), len(self.cards))
        return Prediction(np.broadcast_to(self._state, shape), np.broadcast_to(self.profile.output_tokens, shape))

    def _arrays(self) -> Mapping[str, AnyArray]:
        return {"state": self._state}

    def _restore(self, artefact: Artefact) -> None:
        self._state = artefact.floats("state", len(self.cards))
