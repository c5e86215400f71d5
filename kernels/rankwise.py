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

    `A` [R, d] is dense, or sparse in CSR layout where it is frozen (as FlyLoRA's).
    """
    if A.dim() != 2 or x.dim() != 2 or x.shape[1] != A.shape[1]:
        raise MixtureError(f"x must be [T, d] and A [R, d], got {list(x.shape)!r} and {list(A.shape)!r}")
    product = torch.sparse.mm(A, x.T).T if A.layout == torch.sparse_csr else x @ A.T
    return product.to(accumulator(x.dtype))


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
    y = (h * dense).to(B.dtype) @ B
    return y if base is None else base + y
