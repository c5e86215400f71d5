"""Many LoRA adapters of one linear layer, or of several layers that share a decision, in three tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import MixtureError

Adapter = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterStack:
    """E adapters of S slices, stored row after row of their ranks, which may differ.

    A slice is one output: a plain linear layer has one; q, k and v (or gate and up) that share their input and decision
    are three (or two) with the outputs side by side. Adapter e has rank `ranks[e]` in every slice.
    """

    A: Tensor  # [S, R, d], R = sum(ranks)
    B: Tensor  # [R, sum(widths)]: transposed, so that an adapter's part is contiguous
    scales: Tensor  # [S, E] float32: alpha / rank
    offsets: Tensor  # [E + 1] int32: adapter e has the rows offsets[e] to offsets[e + 1]
    ranks: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(
        cls, A: Tensor, B: Tensor, scales: Tensor, *, ranks: Sequence[int], widths: Sequence[int] | None = None
    ) -> AdapterStack:
        """A stack over tensors that already have this layout. Raises `MixtureError` where they do not fit together."""
        widths = tuple(widths) if widths is not None else (B.shape[-1],)
        ranks = tuple(ranks)
        ends = torch.tensor([0, *ranks], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        scales = scales.detach().to(A.device, torch.float32)
        stack = cls(A, B, scales.expand(len(widths), len(ranks)).contiguous(), ends.to(A.device), ranks, widths)
        stack._check()
        return stack

    @classmethod
    def pack(cls, adapters: Sequence[Adapter], scales: Sequence[Sequence[float]] | Sequence[float]) -> AdapterStack:
        """Copy adapters into a stack.

        `adapters[e][s]` is (A [r, d], B [o, r]) of adapter e in slice s; `scales[e]`, or `scales[e][s]`, its alpha / r.
        Where an adapter's slices have different ranks, the smaller ones are filled up with zeros.
        Raises `MixtureError` where they do not fit together.
        """
        if not adapters or len(scales) != len(adapters):
            raise MixtureError(
                f"{len(adapters)} adapters with {len(scales)} scales: give at least one, and a scale for each"
            )
        slices, first = len(adapters[0]), adapters[0]
        for e, adapter in enumerate(adapters):
            if len(adapter) != slices:
                raise MixtureError(f"adapter {e} has {len(adapter)} slices, adapter 0 has {slices}")
            for s, (A, B) in enumerate(adapter):
                _check_pair(e, s, A, B, d=first[0][0].shape[-1], o=first[s][1].shape[0])
        ranks = [max(A.shape[0] for A, _ in adapter) for adapter in adapters]
        down = [torch.cat([_rows(a[s][0], r) for a, r in zip(adapters, ranks, strict=True)]) for s in range(slices)]
        up = [torch.cat([_rows(a[s][1].T, r) for a, r in zip(adapters, ranks, strict=True)]) for s in range(slices)]
        per_slice = torch.tensor(scales, dtype=torch.float32).reshape(len(adapters), -1).T
        return cls.of(torch.stack(down), torch.cat(up, 1), per_slice, ranks=ranks, widths=[B.shape[1] for B in up])

    @property
    def experts(self) -> int:
        """How many adapters there are."""
        return len(self.ranks)

    @property
    def max_rank(self) -> int:
        return max(self.ranks)

    def adapter(self, e: int) -> list[tuple[Tensor, Tensor]]:
        """(A [r, d], B [o, r]) of adapter e in each slice: views, not copies."""
        rows = slice(sum(self.ranks[:e]), sum(self.ranks[: e + 1]))
        return [(A[rows], B.T) for A, B in zip(self.A, self.B[rows].split(self.widths, 1), strict=True)]

    def _check(self) -> None:
        A, B, rows = self.A, self.B, sum(self.ranks)
        if not self.ranks or min(self.ranks) < 1:
            raise MixtureError(f"every rank must be at least 1, got {self.ranks!r}")
        if A.dim() != 3 or A.shape[:2] != (len(self.widths), rows):
            raise MixtureError(f"A must be [{len(self.widths)} slices, {rows} rows, d], got {list(A.shape)!r}")
        if B.shape != (rows, sum(self.widths)):
            raise MixtureError(f"B must be [{rows} rows, {sum(self.widths)}], got {list(B.shape)!r}")
        if A.dtype != B.dtype or A.device != B.device:
            raise MixtureError(f"A is {A.dtype} on {A.device}, B is {B.dtype} on {B.device}: they must be alike")
        if self.scales.shape != (len(self.widths), len(self.ranks)) or not bool(self.scales.isfinite().all()):
            raise MixtureError(f"scales must be {len(self.ranks)} finite numbers a slice, got {self.scales!r}")


def _check_pair(e: int, s: int, A: Tensor, B: Tensor, *, d: int, o: int) -> None:
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise MixtureError(f"adapter {e}, slice {s}: A [r, d] is {list(A.shape)!r} and B [o, r] is {list(B.shape)!r}")
    if (A.shape[1], B.shape[0]) != (d, o):
        raise MixtureError(
            f"adapter {e}, slice {s} maps {A.shape[1]} to {B.shape[0]} features, adapter 0 maps {d} to {o}"
        )


def _rows(matrix: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))
