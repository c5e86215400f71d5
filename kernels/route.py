"""K1: from logits to a decision: score, bias, top-k and normalisation in one operator."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.errors import MixtureError

Score = Literal["softmax", "sigmoid"]
MAX_EXPERTS = 1024


def route(
    logits: Tensor, k: int, *, bias: Tensor | None = None, score: Score = "softmax", renormalise: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The k adapters of the highest score for each token, the highest first, and their weights.

    Args:
        logits: [T, E], computed with in float32. -inf leaves an adapter out: where fewer than k remain, indices are -1
            and weights 0.
        k: how many adapters a token gets; in [1, E], E is at most 1024.
        bias: [E], added to the scores to select, not to weigh (loss-free load balancing). A bias that weighs as well is
            added to the logits.
        score: of softmax over all E, or of each logit's sigmoid.
        renormalise: whether the chosen weights are divided by their sum; with softmax that is softmax over the chosen.

    Returns indices [T, k] int32, weights [T, k] float32 and all scores [T, E] float32, the last two differentiable in
    the logits. Ties go to the lower index. `ROUTER_KERNELS_BACKEND=loop` forces plain tensor operations.
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
    run: Any = _route
    if dispatch.is_plain(logits):
        run = _Route.apply if logits.requires_grad and torch.is_grad_enabled() else _forward
    weights, indices, scores = run(
        logits.float(), None if bias is None else bias.detach().float(), k, score, renormalise
    )
    return indices, weights, scores


def _forward(
    logits: Tensor, bias: Tensor | None, k: int, score: str, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backend = dispatch.choose_route(logits)
    if backend == "triton":
        from kernels import gpu_route

        indices, weights, scores = gpu_route.route(logits, bias, k, score, renormalise)
    elif backend == "cpp":
        from kernels import cpu_route

        indices, weights, scores = cpu_route.route(logits, bias, k, score, renormalise)
    else:
        if logits.device.type == "cpu" and bool((logits.isnan() | logits.isposinf()).any()):
            raise MixtureError("logits must not be NaN or infinity (-inf leaves an adapter out)")
        indices, weights, scores = route_reference(logits, bias, k, score, renormalise)
    return weights, indices, scores


_route = torch.library.custom_op("router_kernels::route", _forward, mutates_args=())


def route_reference(
    logits: Tensor, bias: Tensor | None, k: int, score: str, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`route` in plain tensor operations."""
    allowed = logits > -torch.inf
    none = ~allowed.any(1, keepdim=True)
    scores = logits.masked_fill(none, 0).softmax(1).masked_fill(none, 0) if score == "softmax" else logits.sigmoid()
    keys = logits if bias is None else (scores + bias).masked_fill(~allowed, -torch.inf)
    chosen = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, chosen)
    if renormalise:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return chosen.to(torch.int32).masked_fill(~allowed.gather(1, chosen), -1), weights, scores


@_route.register_fake
def _(logits: Tensor, bias: Tensor | None, k: int, score: str, renormalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32), logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _logits, _bias, _k, score, renormalise = inputs
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])
    ctx.rule = (score, renormalise)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dw: Tensor | None, _: None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
    if dw is None and ds is None:
        return (None,) * 5
    weights, indices, scores = ctx.saved_tensors
    run = _gradient if dispatch.is_plain(scores) else _route_backward
    return run(dw, ds, indices, weights, scores, *ctx.rule), None, None, None, None


def _gradient(
    dw: Tensor | None,
    ds: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    scores: Tensor,
    score: str,
    renormalise: bool,
) -> Tensor:
    if dispatch.choose_route(scores) == "cpp":
        from kernels import cpu_route

        return cpu_route.backward(dw, ds, indices, weights, scores, score, renormalise)
    return backward_reference(dw, ds, indices, weights, scores, score, renormalise)


_route_backward = torch.library.custom_op("router_kernels::route_backward", _gradient, mutates_args=())


@_route_backward.register_fake
def _(
    dw: Tensor | None,
    ds: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    scores: Tensor,
    score: str,
    renormalise: bool,
) -> Tensor:
    return torch.empty_like(scores)


def backward_reference(
    dw: Tensor | None,
    ds: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    scores: Tensor,
    score: str,
    renormalise: bool,
) -> Tensor:
    """The gradient in the logits from those of the weights and the scores, in plain tensor operations."""
    ds = torch.zeros_like(scores) if ds is None else ds
    dw = torch.zeros_like(weights) if dw is None else dw.masked_fill(indices < 0, 0)
    chosen = indices.long().clamp(min=0)
    pull = (weights * dw).sum(1, keepdim=True)
    if score == "softmax" and renormalise:
        grad = scores * (ds - (scores * ds).sum(1, keepdim=True))
        return grad.scatter_add(1, chosen, weights * (dw - pull))
    if renormalise:
        total = scores.gather(1, chosen).masked_fill(indices < 0, 0).sum(1, keepdim=True)
        dw = ((dw - pull) / total.clamp(min=torch.finfo(total.dtype).tiny)).masked_fill(indices < 0, 0)
    ds = ds.scatter_add(1, chosen, dw)
    return scores * (1 - scores) * ds if score == "sigmoid" else scores * (ds - (scores * ds).sum(1, keepdim=True))


_route.register_autograd(_backward, setup_context=_setup)


class _Route(torch.autograd.Function):
    """The operator without its way through torch's dispatcher, which costs more than a small decision."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward: Any = staticmethod(once_differentiable(_backward))
