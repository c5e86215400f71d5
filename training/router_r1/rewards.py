"""What a rollout is worth: the hierarchical reward of Router-R1 (arXiv 2506.09033, section 3.2).

The format comes first: broken, it is -1 and nothing else counts. Then the answer: wrong is 0. Then, for a right one,
``(1 - a) * quality + a * c``, where c, 1 for the cheapest and 0 for the dearest, is one minus the square root of the
calls' cost, clipped to the 5th and 95th percentile of the last thousand rollouts and scaled to 0..1 between them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WINDOW = 1000
_LOW, _HIGH = 5, 95


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rollout ended.

    Attributes:
        quality: Of its answer, 0..1, however broken the rest: 0 where there is none.
        cost: Sum over its calls of output tokens times USD per million output tokens.
        broken: Why its format is broken; None where it is not.
    """

    quality: float
    cost: float
    broken: str | None = None


class Rewards:
    """Rewards, and the window of costs that they are scaled by.

    `cost_weight` is the paper's alpha. Without `format_reward` a broken format is not punished: the answer alone is
    judged.
    """

    def __init__(self, cost_weight: float = 0.0, *, format_reward: bool = True) -> None:
        self._weight = cost_weight
        self._format = format_reward
        self.window: deque[float] = deque(maxlen=_WINDOW)

    def __call__(self, outcomes: Sequence[Outcome]) -> list[float]:
        """The rewards of a batch of rollouts, whose costs are part of the window."""
        self.window.extend(math.sqrt(outcome.cost) for outcome in outcomes)
        low, high = np.percentile(np.asarray(self.window), [_LOW, _HIGH])
        return [self._reward(outcome, float(low), float(high)) for outcome in outcomes]

    def _reward(self, outcome: Outcome, low: float, high: float) -> float:
        if outcome.broken and self._format:
            return -1.0
        if outcome.quality == 0:
            return 0.0
        span = high - low
        dear = min(max((math.sqrt(outcome.cost) - low) / span, 0.0), 1.0) if span > 0 else 0.0
        return (1 - self._weight) * outcome.quality + self._weight * (1 - dear)
