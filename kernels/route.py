"""K1: from logits to a decision: score, bias, top-k and normalisation in one operator."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.errors import MixtureError

Score = Literal["softmax", "sigmoid"]
MAX_EXPERTS = 1024


def route(
    logits: Tensor, k: int, *, bias: Tensor | None = None, score: Score = "softmax", renormalise: bool = True
) -> tuple[Tensor, Tensor]:
    """The k adapters of the highest score for each token, the highest first, and their weights.

    Args:
        logits: [T, E], computed with in float32. -inf leaves an adapter out: where fewer than k remain, indices are -1
            and weights 0.
        k: how many adapters a token gets; in [1, E], E is at most 1024.
        bias: [E], added to the scores to select, not to weigh (loss-free load balancing). A bias that weighs as well is
            added to the logits.
        score: of softmax over all E, or of each logit's sigmoid.
        renormalise: whether the chosen weights are divided by their sum; with softmax that is softmax over the chosen.

    Returns indices [T, k] int32 and weights [T, k] float32; differentiable in the logits. Ties go to the lower index.
    Raises `MixtureError`; NaN among the logits is looked for on CPUs only, since a GPU would have to wait for it.
    """
    if logits.dim() != 2 or not 1 <= k <= logits.shape[1] <= MAX_EXPERTS:
        raise MixtureError(
            f"logits must be [T, E] with k <= E <= {MAX_EXPERTS}, got {list(logits.shape)!r} and k = {k}"
        )
    if score not in get_args(Score):
        raise MixtureError(f"unknown score {score!r}: choose one of {', '.join(get_args(Score))}")
    if bias is not None and bias.shape != logits.shape[1:]:
        raise MixtureError(f"bias must be [{logits.shape[1]}], got {list(bias.shape)!r}")
    weights, indices = _route(logits.float(), None if bias is None else bias.detach().float(), k, score, renormalise)
    return indices, weights


@torch.library.custom_op("router_kernels::route", mutates_args=())
def _route(logits: Tensor, bias: Tensor | None, k: int, score: str, renormalise: bool) -> tuple[Tensor, Tensor]:
    if logits.device.type == "cuda" and logits.shape[0] > 0:
        from kernels import gpu_route

        indices, weights = gpu_route.route(logits, bias, k, score, renormalise)
        return weights, indices
    if logits.device.type == "cpu" and bool((logits.isnan() | logits.isposinf()).any()):
        raise MixtureError("logits must not be NaN or infinity (-inf leaves an adapter out)")
    indices, weights = route_reference(logits, bias, k, score, renormalise)
    return weights, indices


def route_reference(
    logits: Tensor, bias: Tensor | None, k: int, score: str, renormalise: bool
) -> tuple[Tensor, Tensor]:
    """`route` in plain tensor operations."""
    allowed = logits > -torch.inf
    scores = logits.softmax(1).masked_fill(~allowed, 0) if score == "softmax" else logits.sigmoid()
    keys = logits if bias is None else (scores + bias).masked_fill(~allowed, -torch.inf)
    chosen = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, chosen)
    if renormalise:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return chosen.to(torch.int32).masked_fill(~allowed.gather(1, chosen), -1), weights


@_route.register_fake
def _(logits: Tensor, bias: Tensor | None, k: int, score: str, renormalise: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, score, renormalise = inputs
    ctx.save_for_backward(logits, *output)
    ctx.rule = (score, renormalise)


def _backward(ctx: Any, dw: Tensor, _: None) -> tuple[Tensor | None, ...]:
    logits, weights, indices = ctx.saved_tensors
    score, renormalise = ctx.rule
    chosen = indices.long().clamp(min=0)
    dw = dw.masked_fill(indices < 0, 0)
    pull = (weights * dw).sum(1, keepdim=True)
    if score == "softmax" and renormalise:
        grad = torch.zeros_like(logits).scatter_add(1, chosen, weights * (dw - pull))
    elif score == "softmax":
        none = (logits > -torch.inf).sum(1, keepdim=True) == 0
        probabilities = logits.masked_fill(none, 0).softmax(1).masked_fill(none, 0)
        grad = probabilities * (torch.zeros_like(logits).scatter_add(1, chosen, dw) - pull)
    else:
        p = logits.gather(1, chosen).sigmoid()
        total = p.masked_fill(indices < 0, 0).sum(1, keepdim=True)
        dp = torch.where(indices < 0, 0, (dw - pull) / total) if renormalise else dw
        grad = torch.zeros_like(logits).scatter_add(1, chosen, dp * p * (1 - p))
    return grad, None, None, None, None


_route.register_autograd(_backward, setup_context=_setup)
