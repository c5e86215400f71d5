"""K1 on a GPU, in Triton: one launch, one program for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _route(
    logits, bias, indices, weights, scores, experts, k,
    HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK_E: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    expert, slot = tl.arange(0, BLOCK_E), tl.arange(0, SLOTS)
    row = tl.load(logits + t * experts + expert, mask=expert < experts, other=-float("inf"))
    allowed = row > -float("inf")
    top = tl.max(row)
    exponent = tl.where(allowed, row - tl.where(top > -float("inf"), top, 0.0), 0.0)
    powers = tl.where(allowed, tl.exp(exponent), 0.0)
    if SIGMOID:
        score = tl.where(allowed, 1.0 / (1.0 + tl.exp(-row)), 0.0)
    else:
        score = powers / tl.maximum(tl.sum(powers), 1e-37)
    tl.store(scores + t * experts + expert, score, mask=expert < experts)
    key = row
    if HAS_BIAS:
        key = tl.where(allowed, score + tl.load(bias + expert, mask=expert < experts, other=0.0), -float("inf"))
    chosen = tl.full((SLOTS,), -1, tl.int32)
    weight = tl.zeros((SLOTS,), tl.float32)
    for i in range(k):
        best = tl.max(key)
        e = tl.min(tl.where((key == best) & allowed, expert, BLOCK_E))  # BLOCK_E: none is left
        chosen = tl.where((slot == i) & (e < BLOCK_E), e, chosen)
        weight = tl.where(slot == i, tl.sum(tl.where(expert == e, score, 0.0)), weight)
        key = tl.where(expert == e, -float("inf"), key)
        allowed = allowed & (expert != e)
    if RENORMALISE:
        weight = weight / tl.maximum(tl.sum(weight), 1e-37)
    tl.store(indices + t * k + slot, chosen, mask=slot < k)
    tl.store(weights + t * k + slot, weight, mask=slot < k)


def route(logits: Tensor, bias: Tensor | None, k: int, score: str, renormalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.route`."""
    tokens, experts = logits.shape
    indices = logits.new_empty((tokens, k), dtype=torch.int32)
    weights = logits.new_empty((tokens, k))
    logits = logits.contiguous()
    scores = torch.empty_like(logits)
    if tokens == 0:
        return indices, weights, scores
    _route[(tokens,)](
        logits, logits if bias is None else bias.contiguous(), indices, weights, scores, experts, k,
        HAS_BIAS=bias is not None, SIGMOID=score == "sigmoid", RENORMALISE=renormalise,
        BLOCK_E=triton.next_power_of_2(experts), SLOTS=triton.next_power_of_2(k),
    )  # fmt: skip
    return indices, weights, scores
