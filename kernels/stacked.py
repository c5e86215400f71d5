"""Few adapters: all of them at once in two dense products, those that a token does not use masked to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.mixture import Mixture


def forward(m: Mixture, save: bool) -> tuple[Tensor, Tensor]:
    """y of a mixture, and h where `save` asks for it. Nothing is copied to the host, shapes do not depend on values.

    float16 is computed with in float32: what A x has the range for, float16 may not.
    """
    wide = torch.float32 if m.x.dtype == torch.float16 else m.x.dtype
    x, B = m.x.to(wide), m.B.to(wide)
    rows = torch.arange(m.A.shape[1], device=m.x.device, dtype=torch.int32)
    expert_of_row = torch.searchsorted(m.offsets[1:], rows, right=True)
    none = m.indices < 0
    chosen = m.indices.long().clamp(min=0)
    dense = m.weights.new_zeros(m.tokens, m.experts).scatter_add_(1, chosen, m.weights.masked_fill(none, 0))
    hidden = [(x @ A.to(wide).T).to(m.accumulator) for A in m.A]  # [T, R] each
    unused = (dense == 0)[:, expert_of_row]  # zeros by choice, not by product: an adapter nobody asked for may overflow
    masked = [
        (h.masked_fill(unused, 0) * (dense * scales)[:, expert_of_row]).to(wide)
        for h, scales in zip(hidden, m.scales, strict=True)
    ]
    y = torch.cat([h @ B[:, span] for h, span in zip(masked, m.spans, strict=True)], 1)
    y = (y if m.base is None else m.base + y).to(m.x.dtype)
    return y, torch.stack([_of_slots(m, h, chosen, none) for h in hidden]) if save else m.empty_hidden()


def _of_slots(m: Mixture, hidden: Tensor, chosen: Tensor, none: Tensor) -> Tensor:
    """The part of `hidden` [T, R] that belongs to each slot's adapter: [T, k, max_rank]."""
    own = m.offsets[chosen][..., None] + torch.arange(m.max_rank, device=m.x.device)
    absent = none[..., None] | (own >= m.offsets[chosen + 1][..., None])
    rows = own.clamp(max=hidden.shape[1] - 1).flatten(1)
    return hidden.gather(1, rows).view(absent.shape).masked_fill(absent, 0)
