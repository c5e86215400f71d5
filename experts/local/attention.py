"""The attention of answers that grow, for models that take it from transformers' table of attention functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kernels import attend_past, can_attend

NAME = "own_past"

_BEYOND = ("softcap", "s_aux", "position_bias", "sliding_window")
"""What `attend_past` does not know."""


def with_lengths(keys: Tensor, lengths: Tensor) -> Tensor:
    """`keys` with a note of how many of each row count. It goes no further than to the attention function."""
    keys.row_lengths = lengths  # type: ignore[attr-defined]
    return keys


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, T, heads, d]: for one new token each, by the rows' lengths where the kernel can; else by PyTorch's."""
    lengths: Tensor | None = getattr(key, "row_lengths", None)
    plain = not any(kwargs.get(name) for name in _BEYOND)
    if lengths is not None and plain and query.shape[2] == 1 and can_attend(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_past(query[:, :, 0], key, value, lengths, scale)[:, None], None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return result


def use_own_attention(network: Any) -> None:
    """Let a model that uses PyTorch's attention take this one."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(NAME)
