"""Many tokens: pairs sorted by adapter, one `grouped_mm` over all adapters.

Adapters are padded to one rank that is a multiple of 16 bytes, as `grouped_mm` wants its strides; stacks of equal,
fitting ranks are viewed and not copied. Pairs are taken in bounded chunks, so that memory does not grow with k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from kernels.align import Alignment, align
from kernels.mixture import Gradients, Mixture, Wanted

_STRIDE_BYTES = 16
_CHUNK = 2048  # pairs


def supports(m: Mixture) -> bool:
    """Whether the widths fit `grouped_mm`'s strides and its dtypes."""
    lanes = _STRIDE_BYTES // m.x.element_size()
    return m.x.dtype != torch.float64 and all(width % lanes == 0 for width in (m.A.shape[2], *m.widths))


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    pairs: Tensor  # [n], ascending by adapter
    tokens: Tensor  # [n]
    ends: Tensor  # [E] int32: where each adapter's pairs end within the chunk


class _Padded:
    """A mixture whose adapters all have `rank` rows, those beyond an adapter's own being zero."""

    def __init__(self, m: Mixture) -> None:
        lanes = _STRIDE_BYTES // m.x.element_size()
        self.rank = -(-m.max_rank // lanes) * lanes
        self._uniform = m.A.shape[1] == m.experts * self.rank
        row = torch.arange(self.rank, device=m.x.device)
        offsets = m.offsets.long()
        self.own = row < (offsets[1:] - offsets[:-1])[:, None]  # [E, rank]
        self._rows = torch.where(self.own, offsets[:-1, None] + row, 0)

    def __call__(self, matrix: Tensor) -> Tensor:
        """[R, n] to [E, rank, n]."""
        if self._uniform:
            return matrix.view(*self.own.shape, -1)
        return torch.where(self.own[..., None], matrix[self._rows], 0)

    def unpad(self, grads: Tensor) -> Tensor:
        """[E, rank, n] to [R, n]."""
        return grads.flatten(0, 1) if self._uniform else grads[self.own]


def forward(m: Mixture, save: bool) -> tuple[Tensor, Tensor]:
    """y of a mixture, and h where `save` asks for it."""
    padded, h = _Padded(m), m.empty_hidden().zero_()
    y = (
        m.x.new_zeros(m.tokens, m.B.shape[1], dtype=m.accumulator)
        if m.base is None
        else m.base.to(m.accumulator, copy=True)
    )
    for s, span in enumerate(m.spans):
        down, up = padded(m.A[s]).transpose(1, 2), padded(m.B)[..., span]
        factors = _factors(m, s)
        for chunk in _chunks(m, align(m.indices, m.experts)):
            hidden = grouped_mm(m.x[chunk.tokens], down, offs=chunk.ends)
            _put(h[s], chunk, hidden)
            weighted = (hidden.to(m.accumulator) * factors[chunk.pairs, None]).to(m.x.dtype)
            y[:, span].index_add_(0, chunk.tokens, grouped_mm(weighted, up, offs=chunk.ends).to(m.accumulator))
    return y.to(m.x.dtype), h


def backward(m: Mixture, dy: Tensor, h: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of a mixture, from that of y and the forward pass's h."""
    padded, g = _Padded(m), torch.zeros_like(h)
    dx = torch.zeros_like(m.x, dtype=m.accumulator)
    dA, dB = torch.zeros_like(m.A), torch.zeros_like(m.B)
    for s, span in enumerate(m.spans):
        down, up = padded(m.A[s]), padded(m.B)[..., span].transpose(1, 2)
        grad_down, grad_up = (torch.zeros_like(t, dtype=m.accumulator) for t in (down, up.transpose(1, 2)))
        factors = _factors(m, s)
        for chunk in _chunks(m, align(m.indices, m.experts)):
            grad = dy[chunk.tokens, span].contiguous()
            hidden = grouped_mm(grad, up, offs=chunk.ends)
            _put(g[s], chunk, hidden)
            weighted = (hidden.to(m.accumulator) * factors[chunk.pairs, None]).to(m.x.dtype)
            weighted_h = (_take(h[s], chunk, padded.rank) * factors[chunk.pairs, None]).to(m.x.dtype)
            if wanted.x:
                dx.index_add_(0, chunk.tokens, grouped_mm(weighted, down, offs=chunk.ends).to(m.accumulator))
            if wanted.A:
                grad_down += _outer(weighted, m.x[chunk.tokens], chunk.ends)
            if wanted.B:
                grad_up += _outer(weighted_h, grad, chunk.ends)
        dA[s] = padded.unpad(grad_down)
        dB[:, span] = padded.unpad(grad_up)
    dw = _weight_gradient(m, h, g) if wanted.weights else None
    return Gradients(dx.to(m.x.dtype) if wanted.x else None, dA if wanted.A else None, dB if wanted.B else None, dw)


def _weight_gradient(m: Mixture, h: Tensor, g: Tensor) -> Tensor:
    scales = torch.where(m.indices < 0, 0, m.scales[:, m.indices.clamp(min=0)])
    return (scales * (h * g).sum(-1)).sum(0)


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return grouped_mm(left.T, right, offs=ends)


def _factors(m: Mixture, s: int) -> Tensor:
    """weight * scale of each pair."""
    return (m.weights * m.scales[s][m.indices.clamp(min=0)]).flatten()


def _put(h: Tensor, chunk: _Chunk, hidden: Tensor) -> None:
    h.flatten(0, 1)[chunk.pairs] = hidden[:, : h.shape[-1]].to(h.dtype)


def _take(h: Tensor, chunk: _Chunk, rank: int) -> Tensor:
    taken = h.flatten(0, 1)[chunk.pairs]
    return torch.nn.functional.pad(taken, (0, rank - taken.shape[1]))


def _chunks(m: Mixture, alignment: Alignment) -> Iterator[_Chunk]:
    ends = alignment.segments[1:]
    count = int(ends[-1])
    for start in range(0, count, _CHUNK):
        pairs = alignment.order[start : min(start + _CHUNK, count)]
        yield _Chunk(pairs, pairs // m.slots, (ends - start).clamp(0, len(pairs)))
