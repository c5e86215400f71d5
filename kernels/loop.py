"""The reference: one adapter after another, in plain tensor operations, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.mixture import Gradients, Mixture, Wanted


def forward(m: Mixture, save: bool) -> tuple[Tensor, Tensor]:
    """y of a mixture, and h where `save` asks for it."""
    h = m.empty_hidden().zero_()
    y = (
        m.x.new_zeros(m.tokens, m.B.shape[1], dtype=m.accumulator)
        if m.base is None
        else m.base.to(m.accumulator, copy=True)
    )
    for s, e, rows, token, slot in _uses(m):
        hidden = m.x[token].to(m.accumulator) @ m.A[s, rows].to(m.accumulator).T
        h[s, token, slot, : hidden.shape[1]] = hidden
        factor = m.weights[token, slot, None] * m.scales[s, e]
        y[:, m.spans[s]].index_add_(0, token, (factor * hidden) @ m.B[rows, m.spans[s]].to(m.accumulator))
    return y.to(m.x.dtype), h


def backward(m: Mixture, dy: Tensor, h: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of a mixture, from that of y and the forward pass's h."""
    dx, dA, dB, dw = (torch.zeros_like(t, dtype=m.accumulator) for t in (m.x, m.A, m.B, m.weights))
    for s, e, rows, token, slot in _uses(m):
        grad = dy[token, m.spans[s]].to(m.accumulator)
        hidden = h[s, token, slot, : rows.stop - rows.start]
        g = grad @ m.B[rows, m.spans[s]].to(m.accumulator).T
        factor = m.weights[token, slot, None] * m.scales[s, e]
        dw[token, slot] += m.scales[s, e] * (hidden * g).sum(1)
        dB[rows, m.spans[s]] += (factor * hidden).T @ grad
        dA[s, rows] += (factor * g).T @ m.x[token].to(m.accumulator)
        dx.index_add_(0, token, (factor * g) @ m.A[s, rows].to(m.accumulator))
    return Gradients(
        dx.to(m.x.dtype) if wanted.x else None,
        dA.to(m.A.dtype) if wanted.A else None,
        dB.to(m.B.dtype) if wanted.B else None,
        dw if wanted.weights else None,
    )


def _uses(m: Mixture) -> Iterator[tuple[int, int, slice, Tensor, Tensor]]:
    """Slice, adapter, the adapter's rows, and the (token, slot) pairs that use it."""
    offsets = m.offsets.tolist()
    for e in m.indices.unique().tolist():
        if e < 0:
            continue
        token, slot = (m.indices == e).nonzero(as_tuple=True)
        for s in range(m.slices):
            yield s, e, slice(offsets[e], offsets[e + 1]), token, slot
