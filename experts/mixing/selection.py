"""From logits [T, E] to a decision. -inf among the logits leaves an adapter out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from experts.mixing.balance import entropy_of, largest_entropy
from kernels import route


class Routing(NamedTuple):
    """A decision for T tokens, k slots each, among E adapters."""

    indices: Tensor  # [T, k] int32, -1 is none
    weights: Tensor  # [T, k] float32
    probabilities: Tensor  # [T, E] float32: what balance losses and reports are made of


def top_k(logits: Tensor, k: int, *, renormalise: bool, floor: float = 0.0) -> Routing:
    """The k largest, by softmax over all; `renormalise` divides by their sum + `floor`."""
    indices, weights = route(logits, k, renormalise=renormalise and not floor)
    if renormalise and floor:
        weights = weights / (weights.sum(1, keepdim=True) + floor)
    return Routing(indices, weights, _softmax(logits))


def everything(logits: Tensor) -> Routing:
    """All adapters, weighted by softmax."""
    p = _softmax(logits)
    indices = torch.arange(p.shape[1], dtype=torch.int32, device=p.device).expand_as(p)
    return Routing(indices.masked_fill(logits == -torch.inf, -1), p, p)


def argmax(logits: Tensor) -> Routing:
    """The largest with weight 1, which passes the gradient of its probability on, so that the loss reaches the gate."""
    indices, p = route(logits, 1, renormalise=False)
    return Routing(indices, p + (1 - p).detach(), _softmax(logits))


def top_p(logits: Tensor, p: float) -> Routing:
    """The largest until their probabilities pass `p`, the one that crosses it included; weights stay as they are."""
    probabilities = _softmax(logits)
    ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
    return _kept(probabilities, ranked, order, ranked.cumsum(1) - ranked < p)


def entropy_hybrid(logits: Tensor, p: float, least: int, entropy: float, q: float) -> Routing:
    """DynMoLE's: those within cumulative probability `p`, at least `least`; all where a token's entropy is high.

    The entropy is Tsallis' with index `q`, relative to its largest value. Weights are not renormalised.
    """
    probabilities = _softmax(logits)
    ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
    keep = ranked.cumsum(1) <= p
    keep[:, :least] = True
    allowed = (logits > -torch.inf).sum(1).clamp(min=2)
    undecided = entropy_of(probabilities.detach(), q) > entropy * largest_entropy(allowed, q)
    return _kept(probabilities, ranked, order, keep | undecided[:, None])


def _kept(probabilities: Tensor, ranked: Tensor, order: Tensor, keep: Tensor) -> Routing:
    keep = keep & (ranked > 0)
    return Routing(order.to(torch.int32).masked_fill(~keep, -1), ranked * keep, probabilities)


def _softmax(logits: Tensor) -> Tensor:
    """0 everywhere where all are left out."""
    none = (logits == -torch.inf).all(1, keepdim=True)
    return logits.masked_fill(none, 0).softmax(1).masked_fill(none, 0)
