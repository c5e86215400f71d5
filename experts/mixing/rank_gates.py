"""Gates whose experts are the ranks of one adapter. They also say what a rank's activation h = A x is worth."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from experts.mixing.gate import Gate, GateOptions, Learns, Site
from experts.mixing.selection import Routing
from kernels import route


class RankOptions(GateOptions):
    k: int = Field(default=8, ge=1, description="ranks for each token")
    bias_rate: float = Field(default=1e-5, ge=0, description="step of the balancing bias")


class RankGate(Gate):
    """A balancing bias over R ranks that selects and does not weigh; it moves after each training step.

    A rank that was chosen more often than the mean gets a smaller bias, a neglected one a larger.
    """

    options_type = RankOptions
    fresh = ((1,), 64)
    bias: Tensor

    def __init__(self, site: Site, options: RankOptions) -> None:
        super().__init__(site, options)
        self.k, self.ranks, self.rate = min(options.k, site.stack.max_rank), site.stack.max_rank, options.bias_rate
        self.register_buffer("bias", torch.zeros(self.ranks, device=site.stack.A.device))

    def choose(self, x: Tensor, h: Tensor) -> Routing:
        """Which ranks, and with which weights beside the adapter's scale, for x [T, d] with h = A x [T, R]."""
        raise NotImplementedError

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        self.bias += self.rate * torch.sign(load.mean() - load)


class SmoraGate(RankGate):
    """SMoRA, arXiv 2501.15103: sigmoid(R x), with the bias to select and without to weigh; the weights sum to k."""

    method = "smora"
    alpha = 0.25  # alpha / k is 2 with 8 of 64 ranks

    def __init__(self, site: Site, options: RankOptions) -> None:
        super().__init__(site, options)
        self.weight = nn.Parameter(torch.randn(self.ranks, site.features, device=site.stack.A.device) * 0.02)

    def choose(self, x: Tensor, h: Tensor) -> Routing:
        logits = x.float() @ self.weight.float().T
        indices, weights, scores = route(logits, self.k, bias=self.bias, score="sigmoid")
        # The stack's scale is alpha / R: times R / k, and the weights' own k.
        return Routing(indices, weights * self.ranks, scores / scores.sum(1, keepdim=True))


class FlyLoraOptions(RankOptions):
    bias_rate: float = Field(default=1e-3, ge=0, description="step of the balancing bias")
    density: float = Field(default=0.25, gt=0, le=1, description="share of the entries of A that are not zero")


class FlyLoraGate(RankGate):
    """FlyLoRA, arXiv 2510.08396: A is sparse, random and frozen; the ranks of the largest A x + bias count with A x."""

    method = "flylora"
    options_type = FlyLoraOptions
    learns: ClassVar[Learns] = "adapters' B"
    fresh = ((1,), 32)

    def choose(self, x: Tensor, h: Tensor) -> Routing:
        keys = h.detach().float() + self.bias
        indices = keys.topk(self.k, dim=1).indices
        return Routing(indices.to(torch.int32), torch.ones_like(indices, dtype=torch.float32), keys.softmax(1))


def sparse_projection(ranks: int, features: int, generator: torch.Generator, *, density: float) -> Tensor:
    """A [R, d] with the same number of entries in each row, normal with deviation 1 / R, the rest zero."""
    entries = max(1, round(density * features))
    places = torch.rand(ranks, features, generator=generator).topk(entries, dim=1).indices
    values = torch.randn(ranks, entries, generator=generator) / ranks
    return torch.zeros(ranks, features).scatter(1, places, values)
