"""Attention of one new token of each row to its own past, on CPUs: rows of any lengths, no mask, no padding."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import cpu
from kernels.errors import MixtureError

_LANES = 16
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTERS = ("q", "keys", "values", "lengths", "out")
_SIZES = ("rows", "heads", "group", "d", "key_row", "key_token", "key_head", "value_row", "value_token", "value_head")


class _Attention(ctypes.Structure):
    """`struct Attention` of cpu_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_SIZES, "dtype", "threads")),
        ("scale", ctypes.c_double),
    )


def can_attend(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend_past` takes these."""
    return (
        q.device.type == "cpu"
        and q.dtype in _DTYPES
        and q.dtype == keys.dtype == values.dtype
        and q.shape[-1] == values.shape[-1]
        and q.shape[-1] % _LANES == 0
        and cpu.library() is not None
    )


def attend_past(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """softmax(scale * q K^T) V of each row over its own tokens.

    Args:
        q: [B, H * G, D], G queries for each of H heads, in float32, bfloat16 or float16 (sums are float32).
        keys: [B, H, L, D] with any strides but the last, which is 1.
        values: Like keys.
        lengths: [B] int64, tokens of each row that count, 1 to L.

    Returns [B, H * G, D]. Raises `MixtureError` for shapes that do not fit together.
    """
    rows, queries, d = q.shape
    heads, longest = keys.shape[1:3]
    if keys.shape != values.shape or keys.shape[0] != rows or queries % heads or keys.shape[3] != d:
        raise MixtureError(f"q {list(q.shape)!r}, keys {list(keys.shape)!r}, values {list(values.shape)!r} do not fit")
    if lengths.shape != (rows,) or lengths.dtype != torch.int64:
        raise MixtureError(f"lengths must be [{rows}] int64, got {list(lengths.shape)!r} {lengths.dtype}")
    if rows and not 1 <= int(lengths.min()) <= int(lengths.max()) <= longest:
        raise MixtureError(f"lengths must be 1 to {longest}, got {int(lengths.min())} to {int(lengths.max())}")
    library = cpu.library()
    if library is None or keys.stride(3) != 1 or values.stride(3) != 1:
        raise MixtureError("attend_past needs the C++ kernel, and keys and values that are contiguous in d")
    q, lengths = q.contiguous(), lengths.contiguous()
    out = torch.empty_like(q)
    if rows:
        strides = [side.stride(axis) for side in (keys, values) for axis in (0, 2, 1)]
        pointers = [tensor.data_ptr() for tensor in (q, keys, values, lengths, out)]
        sizes = (rows, heads, queries // heads, d, *strides, _DTYPES[q.dtype], torch.get_num_threads())
        library.attend_past(ctypes.byref(_Attention(*pointers, *sizes, scale)))
    return out
