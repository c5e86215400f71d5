"""How much of each adapter the tokens of one request got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experts.mixing.selection import Routing


class GateLoad:
    """What gates decided for the tokens of one request, summed over passes, by site: the layer, or block, of a gate."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[tuple[str, ...], Tensor, int]] = {}

    @property
    def tokens(self) -> int:
        """How many tokens were decided for."""
        return max((tokens for _, _, tokens in self._sums.values()), default=0)

    def add(self, site: str, adapters: tuple[str, ...], weights: Tensor) -> None:
        """Count the decision of a site with these adapters: their weights [T, E] for T more tokens."""
        _, before, tokens = self._sums.get(site, (adapters, 0.0, 0))
        self._sums[site] = adapters, before + weights.sum(0), tokens + weights.shape[0]

    def shares(self) -> dict[str, dict[str, float]]:
        """Site -> adapter -> its mean weight, of those that got any: together 1 where a gate's weights are."""
        return {site: _nonzero(adapters, sums / tokens) for site, (adapters, sums, tokens) in self._sums.items()}


def _nonzero(adapters: Sequence[str], shares: Tensor) -> dict[str, float]:
    return {name: share for name, share in zip(adapters, shares.tolist(), strict=True) if share}


def weights_of(routing: Routing, adapters: int) -> Tensor:
    """A decision's weights [T, k] as those of all adapters [T, E]."""
    chosen = routing.indices >= 0
    weights = (routing.weights.detach() * chosen).float()
    spread = torch.zeros(len(weights), adapters, device=weights.device)
    return spread.scatter_add_(1, routing.indices.clamp(min=0).long(), weights)
