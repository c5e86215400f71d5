"""What a forward pass says of its gates, and the losses made of it.

A `Record` holds sums over tokens, so that records of micro-batches and of processes add up: the losses are those of the
global batch when `load` and `tokens` are (arXiv 2501.11873 shows why that matters).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What one gate decided in one pass. E adapters; sums are over the counted tokens."""

    site: str  # the layer, or the block, that the gate decides for
    load: Tensor  # [E] float32: how many tokens chose each adapter
    importance: Tensor  # [E] float32: sum of the gate's probabilities; has a gradient
    entropy: Tensor  # [] float32: sum of the tokens' entropies (of the rule's kind); has a gradient
    tokens: Tensor  # [] float32
    adapters: tuple[int, ...]  # which of the model's adapters those are

    def detach(self) -> Record:
        load, importance, entropy, tokens = (
            t.detach() for t in (self.load, self.importance, self.entropy, self.tokens)
        )
        return Record(self.site, load, importance, entropy, tokens, self.adapters)


@dataclass(frozen=True, slots=True)
class BalanceRule:
    """The auxiliary loss of a method.

    Attributes:
        kind: `switch` is E * sum of f_i P_i, f the share of tokens that chose i (arXiv 2101.03961); `product` is
            -log of the product of mean gate values (MoLE).
        weight: Its factor.
        pooled: Whether the layers' loads and probabilities are averaged before the product (MixLoRA), or after it.
            Where layers have different adapters, an adapter's load is averaged over the layers that have it, each
            relative to the layer's even share.
        entropy: Factor of the mean entropy.
        tsallis: q of Tsallis' entropy instead of Shannon's.
    """

    kind: Literal["switch", "product", "none"] = "none"
    weight: float = 0.0
    pooled: bool = False
    entropy: float = 0.0
    tsallis: float | None = None


def entropy_of(p: Tensor, q: float | None = None) -> Tensor:
    """Shannon's entropy in nats, or Tsallis' (1 - sum p^q) / (q - 1), over the last dimension."""
    if q is None:
        shannon: Tensor = torch.special.entr(p.clamp(min=torch.finfo(p.dtype).tiny)).sum(
            -1
        )  # at 0 its slope is not finite
        return shannon
    tsallis: Tensor = (1 - p.pow(q).sum(-1)) / (q - 1)
    return tsallis


def largest_entropy(experts: Tensor | int, q: float | None = None) -> Tensor:
    """That of equal probabilities over so many experts."""
    n = torch.as_tensor(experts, dtype=torch.float32)
    return n.log() if q is None else (1 - n.pow(1 - q)) / (q - 1)


def record_of(
    site: str,
    indices: Tensor,
    probabilities: Tensor,
    counted: Tensor | None,
    adapters: tuple[int, ...],
    tsallis: float | None = None,
) -> Record:
    """The record of a decision: indices [T, k], probabilities [T, E]; `counted` [T] bool leaves padding out."""
    chosen = probabilities.new_zeros(probabilities.shape)
    chosen = chosen.scatter_add(1, indices.long().clamp(min=0), (indices >= 0).to(chosen.dtype)).clamp(max=1)
    weight = probabilities.new_ones(len(indices)) if counted is None else counted.to(probabilities.dtype)
    entropy = entropy_of(probabilities, tsallis)
    return Record(site, weight @ chosen, weight @ probabilities, weight @ entropy, weight.sum(), adapters)


def auxiliary_loss(
    records: Sequence[Record], rule: BalanceRule, totals: Sequence[Record] | None = None
) -> Tensor | None:
    """The loss of one pass; None where the rule has none.

    `totals` are the records' sums over the global batch as far as it is known: their `load` and `tokens` stand for the
    records' own. Gradients flow through the records' probabilities alone, since counts have none.
    """
    if not records or (rule.kind == "none" and not rule.entropy):
        return None
    totals = totals or [record.detach() for record in records]
    shares = [total.load / total.tokens.clamp(min=1) for total in totals]
    means = [record.importance / record.tokens.clamp(min=1) for record in records]
    loss = means[0].new_zeros(())
    if rule.kind == "switch":
        switch = _pooled(records, shares, means) if rule.pooled else _switch(shares, means)
        loss = loss + rule.weight * switch
    elif rule.kind == "product":
        loss = loss - rule.weight * torch.stack([mean.clamp(min=1e-9).log().sum() for mean in means]).mean()
    if rule.entropy:
        entropies = [record.entropy / record.tokens.clamp(min=1) for record in records]
        loss = loss + rule.entropy * torch.stack(entropies).mean()
    return loss


def _switch(shares: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    return torch.stack([len(f) * (f * p).sum() for f, p in zip(shares, means, strict=True)]).mean()


def _pooled(records: Sequence[Record], shares: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    numbers = [torch.tensor(record.adapters, device=mean.device) for record, mean in zip(records, means, strict=True)]
    places, loads = torch.cat(numbers), torch.cat([len(share) * share for share in shares])
    pooled = loads.new_zeros(int(places.max()) + 1).index_add(0, places, loads) / places.bincount().clamp(min=1)
    return torch.stack([pooled[own] @ mean for own, mean in zip(numbers, means, strict=True)]).mean()


def add_records(left: Sequence[Record], right: Sequence[Record]) -> list[Record]:
    """Sums of records of the same gates."""
    return [
        replace(
            a,
            load=a.load + b.load,
            importance=a.importance + b.importance,
            entropy=a.entropy + b.entropy,
            tokens=a.tokens + b.tokens,
        )
        for a, b in zip(left, right, strict=True)
    ]


def report(records: Sequence[Record], tsallis: float | None = None) -> dict[str, dict[str, object]]:
    """For each gate: the share of tokens that each adapter was chosen for, and two entropies in 0..1.

    `token_entropy` is how undecided the gate is on a token, `load_entropy` how evenly it uses its adapters.
    """
    lines: dict[str, dict[str, object]] = {}
    for record in records:
        n, experts = float(record.tokens), len(record.load)
        load = record.load / record.load.sum().clamp(min=1)
        lines[record.site] = {
            "load": [round(float(share), 4) for share in record.load / max(n, 1)],
            "token_entropy": _relative(float(record.entropy) / max(n, 1), experts, tsallis),
            "load_entropy": _relative(float(entropy_of(load)), experts),
        }
    return lines


def _relative(entropy: float, experts: int, tsallis: float | None = None) -> float:
    top = float(largest_entropy(experts, tsallis)) if experts > 1 else math.inf
    return round(entropy / top, 4)
