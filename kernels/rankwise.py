"""K4: the ranks of one adapter as experts of their own, chosen anew for every token.

All ranks are projected (there are few), those not chosen are zeroed, and a product with B follows: two dense products,
which need no kernel of their own, differentiate and compile by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import MixtureError
from kernels.mixture import accumulator


def project_ranks(x: Tensor, A: Tensor) -> Tensor:
    """h = A x of every rank: [T, R], float32 (float64 for float64).

    `A` is [R, d]. float16 is computed with in float32, which has the range that a product may need.
    """
    if A.dim() != 2 or x.dim() != 2 or x.shape[1] != A.shape[1]:
        raise MixtureError(f"x must be [T, d] and A [R, d], got {list(x.shape)!r} and {list(A.shape)!r}")
    wide = _wide(x.dtype)
    return (x.to(wide) @ A.to(wide).T).to(accumulator(x.dtype))


def expand_ranks(h: Tensor, B: Tensor, indices: Tensor, weights: Tensor, *, base: Tensor | None = None) -> Tensor:
    """y[t] = base[t] + sum over i of weights[t, i] * h[t, indices[t, i]] * B[indices[t, i]].

    Args:
        h: [T, R] of `project_ranks`.
        B: [R, o]; y has its dtype.
        indices, weights: [T, k], as `mixed_lora` takes them; -1 is none.
        base: [T, o], added.
    """
    if h.dim() != 2 or B.dim() != 2 or h.shape[1] != B.shape[0]:
        raise MixtureError(f"h must be [T, R] and B [R, o], got {list(h.shape)!r} and {list(B.shape)!r}")
    if indices.shape != weights.shape or indices.dim() != 2 or indices.shape[0] != h.shape[0]:
        raise MixtureError(
            f"indices and weights must be [{h.shape[0]}, k], got {list(indices.shape)!r} and {list(weights.shape)!r}"
        )
    kept = weights.to(h.dtype).masked_fill(indices < 0, 0)
    dense = torch.zeros_like(h).scatter_add(1, indices.long().clamp(min=0), kept)
    ranks, wide = h.shape[1], _wide(B.dtype)
    places = torch.where(indices < 0, ranks, indices).long()  # the last of one more than there are is no rank
    used = h.new_zeros(len(h), ranks + 1, dtype=torch.bool).scatter(1, places, True)[:, :ranks]
    y = (h.masked_fill(~used, 0) * dense).to(wide) @ B.to(wide)
    return (y if base is None else base + y).to(B.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype
