"""Shared by the kernels' tests: random mixtures and the float64 loop that all backends are held to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels import AdapterStack, mixed_lora

RANKS = [1, 4, 8, 16, 33, 64, 128]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def random_stack(
    ranks: list[int], d: int, widths: list[int], *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> AdapterStack:
    """Adapters with random weights and scales, a different scale for each slice."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(len(widths), sum(ranks), d, generator=generator, dtype=torch.float64) / d**0.5
    B = torch.randn(sum(ranks), sum(widths), generator=generator, dtype=torch.float64)
    scales = torch.rand(len(widths), len(ranks), generator=generator) + 0.5
    return AdapterStack.of(A.to(dtype), B.to(dtype), scales, ranks=ranks, widths=widths)


def random_choice(tokens: int, slots: int, experts: int, *, seed: int = 0, none: float = 0.2) -> tuple[Tensor, Tensor]:
    """Indices (an adapter may stand twice in a token's slots, some slots hold none) and weights of both signs."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(experts, (tokens, slots), generator=generator)
    indices[torch.rand(tokens, slots, generator=generator) < none] = -1
    return indices, torch.randn(tokens, slots, generator=generator)


def exact(x: Tensor, stack: AdapterStack, indices: Tensor, weights: Tensor, base: Tensor | None = None) -> Tensor:
    """The sum as mixing is defined, pair by pair, in float64: independent of the code under test."""
    y = torch.zeros(len(x), sum(stack.widths), dtype=torch.float64) if base is None else base.double().clone()
    for t, i in (indices >= 0).nonzero().tolist():
        e = int(indices[t, i])
        parts = [
            stack.scales[s, e].double() * (B.double() @ (A.double() @ x[t].double()))
            for s, (A, B) in enumerate(stack.adapter(e))
        ]
        y[t] += weights[t, i].double() * torch.cat(parts)
    return y


def error(result: Tensor, reference: Tensor) -> float:
    """Distance relative to the reference's norm."""
    return float((result.detach().double() - reference.detach()).norm() / reference.detach().norm().clamp(min=1e-30))


def in_float64(stack: AdapterStack) -> AdapterStack:
    return replace(stack, A=stack.A.detach().double(), B=stack.B.detach().double())


def gradients_of(
    x: Tensor, stack: AdapterStack, indices: Tensor, weights: Tensor, dy: Tensor, backend: str
) -> tuple[Tensor, ...]:
    """Gradients of <y, dy> in x, A, B, weights and base."""
    x, A, B, weights = (t.detach().clone().requires_grad_() for t in (x, stack.A, stack.B, weights))
    base = torch.zeros_like(dy, requires_grad=True)
    y = mixed_lora(x, replace(stack, A=A, B=B), indices, weights, base=base, backend=backend)
    return torch.autograd.grad(y, (x, A, B, weights, base), dy)
