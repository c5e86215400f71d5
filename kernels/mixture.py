"""One call of the kernel: all its tensors under the names that every backend uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.errors import MixtureError


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """y[t] = base[t] + sum over i of weights[t, i] * scales[s, e] * B_se A_se x[t] in slice s, with e = indices[t, i].

    T tokens, k slots, E adapters, S slices (outputs that share the decision, such as q, k, v), R rows (the sum of the
    adapters' ranks).
    """

    x: Tensor  # [T, d]
    A: Tensor  # [S, R, d], dtype of x, or bfloat16 under float32 in the forward pass of the C++ kernel
    B: Tensor  # [R, O], dtype of A; O = sum(widths)
    offsets: Tensor  # [E + 1] int32: adapter e has the rows offsets[e] to offsets[e + 1] of A and B
    scales: Tensor  # [S, E], float32
    indices: Tensor  # [T, k], int32 or int64; -1 is none
    weights: Tensor  # [T, k], `accumulator` dtype
    base: Tensor | None  # [T, O], dtype of x
    widths: tuple[int, ...]  # columns of B (and of y) that belong to each slice
    max_rank: int

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def slots(self) -> int:
        return self.indices.shape[1]

    @property
    def experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def slices(self) -> int:
        return self.A.shape[0]

    @property
    def accumulator(self) -> torch.dtype:
        return accumulator(self.x.dtype)

    @property
    def spans(self) -> list[slice]:
        """The columns of each slice in y and B."""
        return spans(self.widths)

    def empty_hidden(self) -> Tensor:
        """Room for h[s, t, i, j] = <A_s[row of adapter + j], x[t]>: [S, T, k, max_rank]."""
        shape = (self.slices, self.tokens, self.slots, self.max_rank)
        return self.x.new_empty(shape, dtype=self.accumulator)


class Gradients(NamedTuple):
    """Of the arguments of the same names; one that was not wanted is None."""

    x: Tensor | None
    A: Tensor | None
    B: Tensor | None
    weights: Tensor | None


class Wanted(NamedTuple):
    """Which gradients a backward pass is to compute."""

    x: bool
    A: bool
    B: bool
    weights: bool


def check_mixture(indices: Tensor, weights: Tensor, experts: int) -> None:
    """Raise `MixtureError` unless all indices are in [-1, experts) and all weights finite. Waits for a GPU."""
    if indices.numel() == 0:
        return
    low, high = torch.aminmax(indices)
    if low < -1 or high >= experts:
        raise MixtureError(f"indices must be in [-1, {experts}), got {int(low)} to {int(high)}")
    if not torch.isfinite(weights).all():
        raise MixtureError("weights must be finite, got NaN or infinity")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums are float32, in float64 float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spans(widths: tuple[int, ...]) -> list[slice]:
    """Consecutive slices of these widths."""
    starts = [sum(widths[:s]) for s in range(len(widths))]
    return [slice(start, start + width) for start, width in zip(starts, widths, strict=True)]
