"""K0: the (token, slot) pairs of a decision, sorted by adapter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """Pairs are numbered token * k + slot. The sort is stable, so the same decision always gives the same alignment."""

    order: Tensor  # [T * k] int64: pairs by adapter; those without one come last
    segments: Tensor  # [E + 1] int32: adapter e has order[segments[e] : segments[e + 1]]


def align(indices: Tensor, experts: int) -> Alignment:
    """Sort the pairs of `indices` [T, k] (-1 is none) by adapter. Nothing is copied to the host."""
    flat = indices.reshape(-1)
    keys = torch.where(flat < 0, experts, flat)
    ordered, order = torch.sort(keys, stable=True)
    bounds = torch.arange(experts + 1, device=flat.device, dtype=ordered.dtype)
    return Alignment(order, torch.searchsorted(ordered, bounds, out_int32=True))
