"""`mixed_lora`: a different weighted mixture of LoRA adapters for every token, in one pass."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.errors import MixtureError
from kernels.mixture import Mixture, Wanted, accumulator, check_mixture
from kernels.stack import AdapterStack

_MODULES = {"loop": "loop", "cpp": "cpu", "grouped": "grouped", "stacked": "stacked", "triton": "gpu"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NARROW = (torch.float32, torch.bfloat16)  # of x and of adapters that are stored in half the memory


def mixed_lora(
    x: Tensor,
    stack: AdapterStack,
    indices: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[t] = base[t] + sum over i of weights[t, i] * scale_e * B_e A_e x[t], where e = indices[t, i].

    Args:
        x: [T, d] in float32, bfloat16, float16 (sums are float32) or float64 (reference only).
        stack: the adapters, of x's dtype and device; where x is float32 and no gradients are wanted also bfloat16,
            which the C++ kernel reads as it is.
        indices: [T, k] int32 or int64; -1 is none. An adapter that stands twice adds twice.
        weights: [T, k], any float dtype.
        base: [T, o] in x's dtype, added in the same pass; usually the frozen layer's output.
        backend: `loop`, `cpp`, `grouped`, `stacked` or `triton`; default: `ROUTER_KERNELS_BACKEND`, or else by shape.

    Returns [T, o] in x's dtype. Differentiable in x, A, B, weights and base; traced by `torch.compile` as one operator.
    Raises `MixtureError` for what does not fit together, `BackendError` for a backend that cannot run here. The values
    of `indices` and `weights` are checked on CPUs; a GPU would have to wait for that, so there an index out of range
    counts as none, unless `ROUTER_KERNELS_CHECK=1` is set: call `check_mixture` where they come from outside.
    """
    _check_shapes(x, stack, indices, weights, base)
    tensors = (x, stack.A, stack.B, weights)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if save and stack.A.dtype != x.dtype:
        raise MixtureError(f"gradients need adapters of x's dtype, got {stack.A.dtype} and {x.dtype}")
    run: Any = _mixed_lora
    if dispatch.is_plain(x):
        run = _MixedLora.apply if save or _wants_gradient(base) else _forward
    y, _ = run(
        x,
        stack.A,
        stack.B,
        stack.offsets,
        stack.scales,
        indices,
        weights.to(accumulator(x.dtype)),
        base,
        list(stack.widths),
        stack.max_rank,
        backend or "",
        save,
    )
    return y


def _wants_gradient(base: Tensor | None) -> bool:
    return base is not None and base.requires_grad and torch.is_grad_enabled()


def _check_shapes(x: Tensor, stack: AdapterStack, indices: Tensor, weights: Tensor, base: Tensor | None) -> None:
    if x.dim() != 2 or x.shape[1] != stack.A.shape[2]:
        raise MixtureError(f"x must be [tokens, {stack.A.shape[2]}] for these adapters, got {list(x.shape)!r}")
    if indices.dim() != 2 or indices.shape[0] != x.shape[0] or weights.shape != indices.shape:
        wanted = f"[{x.shape[0]}, k]"
        raise MixtureError(
            f"indices and weights must be {wanted}, got {list(indices.shape)!r} and {list(weights.shape)!r}"
        )
    if indices.dtype not in (torch.int32, torch.int64) or not weights.is_floating_point():
        raise MixtureError(
            f"indices must be int32 or int64 and weights floats, got {indices.dtype} and {weights.dtype}"
        )
    if x.dtype not in _FLOATS or (stack.A.dtype != x.dtype and (x.dtype, stack.A.dtype) != _NARROW):
        raise MixtureError(f"x is {x.dtype}, the adapters are {stack.A.dtype}: both must be one of {_FLOATS!r}")
    if base is not None and (base.shape != (x.shape[0], stack.B.shape[1]) or base.dtype != x.dtype):
        raise MixtureError(
            f"base must be [{x.shape[0]}, {stack.B.shape[1]}] {x.dtype}, got {list(base.shape)!r} {base.dtype}"
        )
    others = (stack.A, indices, weights) if base is None else (stack.A, indices, weights, base)
    if any(t.device != x.device for t in others):
        raise MixtureError(f"all tensors must be on {x.device}, got {[str(t.device) for t in others]!r}")


def _forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scales: Tensor,
    indices: Tensor,
    weights: Tensor,
    base: Tensor | None,
    widths: list[int],
    max_rank: int,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    m = Mixture(x, A, B, offsets, scales, indices, weights, base, tuple(widths), max_rank)
    if m.tokens == 0 or m.slots == 0:
        y = x.new_zeros(m.tokens, B.shape[1]) if base is None else base.clone()
        return y, m.empty_hidden() if save else x.new_empty(0)
    chosen = dispatch.choose(m, dispatch.forced(backend), gradients=False)
    if chosen != "cpp" and A.dtype != x.dtype:
        m = replace(m, A=A.to(x.dtype), B=B.to(x.dtype))
    if chosen != "cpp" and (x.device.type == "cpu" or os.environ.get("ROUTER_KERNELS_CHECK") == "1"):
        check_mixture(indices, weights, m.experts)  # the C++ kernel does that itself
    y, h = _backend(chosen).forward(m, save)
    return y, h if save else x.new_empty(0)


_mixed_lora = torch.library.custom_op("router_kernels::mixed_lora", _forward, mutates_args=())


@_mixed_lora.register_fake
def _(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scales: Tensor,
    indices: Tensor,
    weights: Tensor,
    base: Tensor | None,
    widths: list[int],
    max_rank: int,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    m = Mixture(x, A, B, offsets, scales, indices, weights, base, tuple(widths), max_rank)
    return x.new_empty(x.shape[0], B.shape[1]), m.empty_hidden() if save else x.new_empty(0)


def _gradients(
    dy: Tensor,
    h: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scales: Tensor,
    indices: Tensor,
    weights: Tensor,
    widths: list[int],
    max_rank: int,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = Mixture(x, A, B, offsets, scales, indices, weights, None, tuple(widths), max_rank)
    if m.tokens == 0 or m.slots == 0:
        grads: tuple[Tensor | None, ...] = tuple(map(torch.zeros_like, (x, A, B, weights)))
    else:
        chosen = dispatch.choose(m, dispatch.forced(backend), gradients=True)
        grads = _backend(chosen).backward(m, dy, h, Wanted(*wanted))
    dx, dA, dB, dw = (x.new_empty(0) if g is None or not w else g for g, w in zip(grads, wanted, strict=True))
    return dx, dA, dB, dw


_mixed_lora_backward = torch.library.custom_op("router_kernels::mixed_lora_backward", _gradients, mutates_args=())


@_mixed_lora_backward.register_fake
def _(
    dy: Tensor,
    h: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scales: Tensor,
    indices: Tensor,
    weights: Tensor,
    widths: list[int],
    max_rank: int,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = zip((x, A, B, weights), wanted, strict=True)
    dx, dA, dB, dw = (t.new_empty(t.shape) if w else x.new_empty(0) for t, w in shapes)
    return dx, dA, dB, dw


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, offsets, scales, indices, weights, _base, widths, max_rank, backend, _save = inputs
    ctx.save_for_backward(output[1], x, A, B, offsets, scales, indices, weights)
    ctx.shape = (widths, max_rank, backend)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    """dh carries no gradient: h is the backward pass's own memory, never given to a caller."""
    if dy is None:
        return (None,) * 12
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[6]]
    dx = dA = dB = dw = None
    if any(wanted):
        run: Any = _gradients if dispatch.is_plain(dy) else _mixed_lora_backward
        grads = run(dy, *ctx.saved_tensors, *ctx.shape, wanted)
        dx, dA, dB, dw = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return dx, dA, dB, None, None, None, dw, dy if needs[7] else None, None, None, None, None


_mixed_lora.register_autograd(_backward, setup_context=_setup)


class _MixedLora(torch.autograd.Function):
    """The operator without its way through torch's dispatcher, which costs more than a small mixture."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward: Any = staticmethod(once_differentiable(_backward))


def _backend(name: str) -> Any:
    return importlib.import_module(f"kernels.{_MODULES[name]}")
