"""GPU backend in Triton: one launch for A x, one for the weighted sum of B (A x), neither of which needs sorted pairs.

A program owns a tile of tokens and goes through the adapters that occur in it, in ascending order, multiplying the
whole tile with each on the tensor cores and keeping what belongs to it. Sums have a fixed order: no atomics, the same
result every run. Grids depend on shapes alone, so a captured CUDA graph replays with other decisions. Gradients use the
same two kernels and `_outer` for A and B.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.align import align
from kernels.mixture import Gradients, Mixture, Wanted

_MAX_RANK_BLOCK = 64
_COLUMNS = 128
_WAVES = 2  # programs for each multiprocessor that split sums aim at


@triton.jit
def _shrink(
    x, matrix, spans, offsets, indices, hidden,
    tokens, slots, experts, max_rank, split_columns, x_stride, slice_stride, row_stride, split_stride, slice_hidden,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SLOTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """hidden[split, s, t, i, j] = <matrix_s[row_e + j, columns of split], x[t, the same]>, e = indices[t, i]."""
    split, s = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.arange(0, SLOTS)
    pair_mask = (t < tokens)[:, None] & (slot < slots)[None, :]
    chosen = tl.load(indices + t[:, None] * slots + slot[None, :], mask=pair_mask, other=-1).to(tl.int32)
    begin = tl.load(spans + 2 * s) + split * split_columns
    end = tl.minimum(begin + split_columns, tl.load(spans + 2 * s + 1))
    e = tl.min(tl.where(chosen >= 0, chosen, experts))
    while e < experts:
        row = tl.load(offsets + e)
        rank = tl.load(offsets + e + 1) - row
        for j in range(0, rank, BLOCK_R):
            r = j + tl.arange(0, BLOCK_R)
            acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for c in range(begin, end, BLOCK_K):
                column = c + tl.arange(0, BLOCK_K)
                left = tl.load(
                    x + t[:, None].to(tl.int64) * x_stride + column[None, :],
                    mask=(t < tokens)[:, None] & (column < end)[None, :], other=0.0,
                )  # fmt: skip
                right = tl.load(
                    matrix + s * slice_stride + (row + r)[None, :].to(tl.int64) * row_stride + column[:, None],
                    mask=(r < rank)[None, :] & (column < end)[:, None], other=0.0,
                )  # fmt: skip
                # 16-bit numbers fit tf32 without loss
                acc = tl.dot(
                    left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee" if EXACT else "tf32"
                )
            for i in range(slots):
                own = tl.load(indices + t * slots + i, mask=t < tokens, other=-1).to(tl.int32) == e
                to = hidden + split * split_stride + s * slice_hidden + (t * slots + i)[:, None].to(tl.int64) * max_rank
                tl.store(to + r[None, :], acc, mask=own[:, None] & (r < rank)[None, :])
        e = tl.min(tl.where(chosen > e, chosen, experts))


@triton.jit
def _expand(
    hidden, matrix, spans, offsets, scales, indices, weights, base, y,
    tokens, slots, experts, max_rank, slice_stride, row_stride, y_stride, splits, split_stride, slice_hidden,
    SUM: tl.constexpr, HAS_BASE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, SLOTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y[t] = base[t] + sum over i, j of weights[t, i] * scales[s, e] * hidden[s, t, i, j] * matrix_s[row_e + j].

    A program writes columns of slice program_id(2), or sums SUM slices into the same columns.
    """
    first = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.arange(0, SLOTS)
    pair_mask = (t < tokens)[:, None] & (slot < slots)[None, :]
    chosen = tl.load(indices + t[:, None] * slots + slot[None, :], mask=pair_mask, other=-1).to(tl.int32)
    end = tl.load(spans + 2 * first + 1)
    column = tl.load(spans + 2 * first) + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    cells = t[:, None].to(tl.int64) * y_stride + column[None, :]
    inside = (t < tokens)[:, None] & (column < end)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if HAS_BASE:
        acc += tl.load(base + cells, mask=inside, other=0.0).to(tl.float32)
    e = tl.min(tl.where(chosen >= 0, chosen, experts))
    while e < experts:
        row = tl.load(offsets + e)
        rank = tl.load(offsets + e + 1) - row
        for n in range(SUM):
            s = first + n
            scale = tl.load(scales + s * experts + e)
            for j in range(0, rank, BLOCK_R):
                r = j + tl.arange(0, BLOCK_R)
                factor = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
                for i in range(slots):
                    own = tl.load(indices + t * slots + i, mask=t < tokens, other=-1).to(tl.int32) == e
                    weight = tl.load(weights + t * slots + i, mask=own, other=0.0) * scale
                    part = hidden + s * slice_hidden + (t * slots + i)[:, None].to(tl.int64) * max_rank + r[None, :]
                    for split in range(splits):
                        value = tl.load(part + split * split_stride, mask=own[:, None] & (r < rank)[None, :], other=0.0)
                        factor += weight[:, None] * value
                rows = tl.load(
                    matrix + s * slice_stride + (row + r)[:, None].to(tl.int64) * row_stride + column[None, :],
                    mask=(r < rank)[:, None] & (column < end)[None, :], other=0.0,
                )  # fmt: skip
                # 16-bit rows fit tf32 without loss, and `factor` keeps its range
                acc = tl.dot(factor, rows.to(tl.float32), acc, input_precision="ieee" if EXACT else "tf32")
        e = tl.min(tl.where(chosen > e, chosen, experts))
    tl.store(y + cells, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _outer(
    hidden, x, spans, offsets, scales, order, segments, weights, grad,
    slots, experts, max_rank, x_stride, slice_stride, row_stride, slice_hidden,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """grad_s[row_e + j] = sum over pairs (t, i) of e of weights[t, i] * scales[s, e] * hidden[s, t, i, j] * x[t]."""
    e, s = tl.program_id(0), tl.program_id(2).to(tl.int64)
    end = tl.load(spans + 2 * s + 1)
    column = tl.load(spans + 2 * s) + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(offsets + e)
    rank = tl.load(offsets + e + 1) - row
    scale = tl.load(scales + s * experts + e)
    first, last = tl.load(segments + e), tl.load(segments + e + 1)
    for j in range(0, rank, BLOCK_R):
        r = j + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for p in range(first, last, BLOCK_P):
            place = p + tl.arange(0, BLOCK_P)
            pair = tl.load(order + place, mask=place < last, other=0)
            weight = tl.load(weights + pair, mask=place < last, other=0.0) * scale
            part = hidden + s * slice_hidden + pair[None, :] * max_rank + r[:, None]
            left = tl.load(part, mask=(r < rank)[:, None] & (place < last)[None, :], other=0.0) * weight[None, :]
            right = tl.load(
                x + (pair // slots)[:, None] * x_stride + column[None, :],
                mask=(place < last)[:, None] & (column < end)[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(left, right.to(tl.float32), acc, input_precision="ieee" if EXACT else "tf32")
        to = grad + s * slice_stride + (row + r)[:, None].to(tl.int64) * row_stride + column[None, :]
        tl.store(to, acc.to(grad.dtype.element_ty), mask=(r < rank)[:, None] & (column < end)[None, :])


def forward(m: Mixture, save: bool) -> tuple[Tensor, Tensor]:
    """y of a mixture, and h where `save` asks for it."""
    x = m.x.contiguous()
    down, up = _down_spans(m), _up_spans(m)
    parts = _run_shrink(m, x, m.A.contiguous(), down, m.x.shape[1], _strides(m.A), zeroed=save)
    y = x.new_empty(m.tokens, m.B.shape[1])
    base = None if m.base is None else m.base.contiguous()
    _run_expand(m, parts, m.B.contiguous(), up, max(m.widths), (0, m.B.shape[1]), y, base, sum_slices=False)
    return y, parts.sum(0) if save else parts[0]


def backward(m: Mixture, dy: Tensor, h: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of a mixture, from that of y and the forward pass's h."""
    dy, x, A, B = dy.contiguous(), m.x.contiguous(), m.A.contiguous(), m.B.contiguous()
    down, up, up_strides = _down_spans(m), _up_spans(m), (0, m.B.shape[1])
    dx = dA = dB = dw = None
    if wanted.x or wanted.A or wanted.weights:
        g = _run_shrink(m, dy, B, up, max(m.widths), up_strides, zeroed=True).sum(0, keepdim=True)
    if wanted.weights:
        absent = (m.indices < 0) | (m.indices >= m.experts)
        scales = m.scales[:, m.indices.clamp(0, m.experts - 1)].masked_fill(absent, 0)
        dw = (scales * (h * g[0]).sum(-1)).sum(0)
    if wanted.x:
        dx = torch.empty_like(x)
        _run_expand(m, g, A, down, x.shape[1], _strides(A), dx, None, sum_slices=True)
    if wanted.A:
        dA = torch.empty_like(A)
        _run_outer(m, g[0], x, dA, down, x.shape[1], _strides(A))
    if wanted.B:
        dB = torch.empty_like(B)
        _run_outer(m, h, dy, dB, up, max(m.widths), up_strides)
    return Gradients(dx, dA, dB, dw)


def _run_shrink(
    m: Mixture, x: Tensor, matrix: Tensor, spans: Tensor, width: int, strides: tuple[int, int], *, zeroed: bool
) -> Tensor:
    """Partial sums [splits, S, T, k, max_rank]; `zeroed` where what no adapter writes must be 0."""
    block_t, block_k = _token_block(m.tokens), 64
    tiles = triton.cdiv(m.tokens, block_t)
    splits = _splits(tiles * m.slices, width, x.device)
    columns = triton.cdiv(triton.cdiv(width, splits), block_k) * block_k
    shape = (splits, m.slices, m.tokens, m.slots, m.max_rank)
    parts = (x.new_zeros if zeroed else x.new_empty)(shape, dtype=torch.float32)
    _shrink[(tiles, splits, m.slices)](
        x, matrix, spans, m.offsets, m.narrow_indices, parts,
        m.tokens, m.slots, m.experts, m.max_rank, columns, x.shape[1], *strides, parts.stride(0), parts.stride(1),
        BLOCK_T=block_t, BLOCK_K=block_k, **_blocks(m),
    )  # fmt: skip
    return parts


def _run_expand(
    m: Mixture,
    parts: Tensor,
    matrix: Tensor,
    spans: Tensor,
    width: int,
    strides: tuple[int, int],
    y: Tensor,
    base: Tensor | None,
    *,
    sum_slices: bool,
) -> None:
    block_t = _token_block(m.tokens)
    grid = (triton.cdiv(m.tokens, block_t), triton.cdiv(width, _COLUMNS), 1 if sum_slices else m.slices)
    _expand[grid](
        parts, matrix, spans, m.offsets, m.scales, m.narrow_indices, m.weights.contiguous(),
        y if base is None else base, y,
        m.tokens, m.slots, m.experts, m.max_rank, *strides, y.shape[1],
        parts.shape[0], parts.stride(0), parts.stride(1),
        SUM=m.slices if sum_slices else 1, HAS_BASE=base is not None,
        BLOCK_T=block_t, BLOCK_C=_COLUMNS, **_blocks(m),
    )  # fmt: skip


def _run_outer(
    m: Mixture, hidden: Tensor, x: Tensor, grad: Tensor, spans: Tensor, width: int, strides: tuple[int, int]
) -> None:
    pairs, blocks = align(torch.where(m.indices < m.experts, m.indices, -1), m.experts), _blocks(m)
    hidden = hidden.contiguous()
    _outer[(m.experts, triton.cdiv(width, _COLUMNS), m.slices)](
        hidden, x, spans, m.offsets, m.scales, pairs.order, pairs.segments, m.weights.contiguous(), grad,
        m.slots, m.experts, m.max_rank, x.shape[1], *strides, hidden.stride(0),
        BLOCK_P=16, BLOCK_C=_COLUMNS, BLOCK_R=blocks["BLOCK_R"], EXACT=blocks["EXACT"],
    )  # fmt: skip


def _blocks(m: Mixture) -> dict[str, Any]:
    return {
        "BLOCK_R": min(max(triton.next_power_of_2(m.max_rank), 16), _MAX_RANK_BLOCK),
        "SLOTS": triton.next_power_of_2(m.slots),
        "EXACT": m.x.dtype == torch.float32,
    }


def _token_block(tokens: int) -> int:
    return 16 if tokens <= 64 else 64


def _splits(programs: int, width: int, device: torch.device) -> int:
    """Into how many parts to cut a sum over `width` so that all multiprocessors have work; none is shorter than 256."""
    return max(1, min(_WAVES * _multiprocessors(device) // programs, width // 256))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _strides(A: Tensor) -> tuple[int, int]:
    return A.shape[1] * A.shape[2], A.shape[2]


def _down_spans(m: Mixture) -> Tensor:
    return _device_spans(((0, m.x.shape[1]),) * m.slices, m.x.device)


def _up_spans(m: Mixture) -> Tensor:
    return _device_spans(tuple((span.start, span.stop) for span in m.spans), m.x.device)


@functools.lru_cache(maxsize=1024)
def _device_spans(spans: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """[S, 2] int32. Kept, since a copy to the device cannot be part of a CUDA graph."""
    return torch.tensor(spans, dtype=torch.int32, device=device)
