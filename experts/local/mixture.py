"""What a request is answered with: the base alone, an adapter, a static mixture of adapters, or a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from experts.local.pool import Adapter, AdapterPool
from experts.local.sites import Plan, plan_of
from experts.mixing.install import Mixture as GateMixture
from experts.mixing.load import GateLoad
from experts.mixing.state import RequestMixture


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """One request's mixture. `label` tells it apart from others, for scheduling.

    `weights` are adapters with their weights; `gate` decides for each token among adapters of its own, to whose scores
    `bias` (adapter -> number) is added; `load`, if there is one, is told what it decides for the request's tokens.
    """

    label: str = ""
    weights: Sequence[tuple[Adapter, float]] = ()
    gate: GateMixture | None = None
    bias: Mapping[str, float] = field(default_factory=dict)
    load: GateLoad | None = None

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters that the pool has to hold for it."""
        return [adapter for adapter, _ in self.weights]


BASE = Mixture()


def plan_for(
    rows: Sequence[Mixture],
    tokens: int,
    pool: AdapterPool,
    device: torch.device,
    own: Sequence[int] | None = None,
) -> Plan:
    """The plan of a batch with a mixture for each row, of `tokens` tokens each; the adapters have been acquired.

    `own` is how many of each row's tokens, the last ones, are no padding; None is all.
    """
    tables = [[(pool.slot(adapter), weight) for adapter, weight in row.weights] for row in rows]
    gates: dict[GateMixture, dict[int, RequestMixture]] = {}
    for i, row in enumerate(rows):
        if row.gate is not None:
            gates.setdefault(row.gate, {})[i] = RequestMixture(
                bias=row.bias, load=row.load, own=own[i] if own else None
            )
    return plan_of(tables, tokens, device, list(gates.items()))
