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
    indices, weights, p = route(logits, k, renormalise=renormalise and not floor)
    if renormalise and floor:
        weights = weights / (weights.sum(1, keepdim=True) + floor)
    return Routing(indices, weights, p)


def everything(logits: Tensor) -> Routing:
    """All adapters, weighted by softmax."""
    return Routing(*route(logits, logits.shape[1], renormalise=False))


def argmax(logits: Tensor) -> Routing:
    """The largest with weight 1, which passes the gradient of its probability on, so that the loss reaches the gate."""
    indices, best, p = route(logits, 1, renormalise=False)
    return Routing(indices, best + (1 - best).detach(), p)


def top_p(logits: Tensor, p: float) -> Routing:
    """The largest until their probabilities pass `p`, the one that crosses it included; weights stay as they are."""
    order, ranked, probabilities = route(logits, logits.shape[1], renormalise=False)
    return _kept(probabilities, ranked, order, ranked.cumsum(1) - ranked < p)


def entropy_hybrid(logits: Tensor, p: float, least: int, entropy: float, q: float) -> Routing:
    """DynMoLE's: those within cumulative probability `p`, at least `least`; all where a token's entropy is high.

    The entropy is Tsallis' with index `q`, relative to its largest value. Weights are not renormalised.
    """
    order, ranked, probabilities = route(logits, logits.shape[1], renormalise=False)
    keep = ranked.cumsum(1) <= p
    keep[:, :least] = True
    allowed = (logits > -torch.inf).sum(1).clamp(min=2)
    undecided = entropy_of(probabilities.detach(), q) > entropy * largest_entropy(allowed, q)
    return _kept(probabilities, ranked, order, keep | undecided[:, None])


def _kept(probabilities: Tensor, ranked: Tensor, order: Tensor, keep: Tensor) -> Routing:
    keep = keep & (ranked > 0)
    return Routing(order.masked_fill(~keep, -1), ranked * keep, probabilities)
