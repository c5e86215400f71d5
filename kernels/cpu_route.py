"""K1 on a CPU: `cpu_route.cpp`, compiled together with the mixture's kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import cpu
from kernels.errors import MixtureError

_TENSORS = ("logits", "bias", "indices", "weights", "scores", "dweights", "dscores", "dlogits")
_SIZES = ("tokens", "experts", "slots", "sigmoid", "renormalise")


class _Route(ctypes.Structure):
    """`struct Route` of cpu_route.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _TENSORS) + tuple((name, ctypes.c_int64) for name in _SIZES)


def route(logits: Tensor, bias: Tensor | None, k: int, score: str, renormalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.route`."""
    tokens, experts = logits.shape
    logits = logits.contiguous()
    indices, weights = logits.new_empty((tokens, k), dtype=torch.int32), logits.new_empty((tokens, k))
    scores = torch.empty_like(logits)
    bias = None if bias is None else bias.contiguous()
    tensors = (logits, bias, indices, weights, scores, None, None, None)
    if _call("route_forward", tensors, (tokens, experts, k, score == "sigmoid", renormalise)):
        raise MixtureError("logits must not be NaN or infinity (-inf leaves an adapter out)")
    return indices, weights, scores


def backward(
    dweights: Tensor | None,
    dscores: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    scores: Tensor,
    score: str,
    renormalise: bool,
) -> Tensor:
    """The gradient in the logits."""
    dlogits = torch.empty_like(scores)
    dweights, dscores = (None if d is None else d.contiguous() for d in (dweights, dscores))
    tensors = (None, None, indices, weights, scores, dweights, dscores, dlogits)
    _call("route_backward", tensors, (*scores.shape, indices.shape[1], score == "sigmoid", renormalise))
    return dlogits


def _call(function: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> int:
    native = cpu.library()
    if native is None:
        raise RuntimeError("the C++ kernel is not available; choose the backend by kernels.dispatch")
    call = _Route(*(None if t is None else t.data_ptr() for t in tensors), *sizes)
    return int(getattr(native, function)(ctypes.byref(call)))
