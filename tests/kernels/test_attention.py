"""Attention to each row's own past, beside PyTorch's with a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import MixtureError, attend_past, can_attend

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def slots(rows: int, capacity: int, heads: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[rows, heads, capacity, d], laid out as the engine's cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, capacity, heads, d, generator=generator).to(dtype).transpose(1, 2)


def reference(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // keys.shape[1]
    wide = [side.float().repeat_interleave(group, 1) for side in (keys, values)]
    mask = torch.arange(keys.shape[2]) < lengths[:, None, None, None]
    return scaled_dot_product_attention(q.float()[:, :, None], *wide, attn_mask=mask, scale=scale)[:, :, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "group", "d"), [(6, 1, 32), (2, 4, 64), (1, 3, 16)])
def test_it_is_attention_with_a_mask(dtype: torch.dtype, heads: int, group: int, d: int) -> None:
    lengths = torch.tensor([1, 7, 16, 17, 40])
    q = slots(5, 1, heads * group, d, dtype, 0)[:, :, 0] * 3
    keys, values = slots(5, 40, heads, d, dtype, 1), slots(5, 40, heads, d, dtype, 2)
    assert can_attend(q, keys, values)
    out = attend_past(q, keys, values, lengths, 0.2)
    expected = reference(q, keys, values, lengths, 0.2)
    assert out.dtype == dtype
    assert float((out.float() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


def test_rows_do_not_depend_on_each_other_nor_on_what_lies_beyond_them() -> None:
    q, keys, values = (
        slots(3, 1, 4, 32, torch.float32, 0)[:, :, 0],
        *(slots(3, 24, 4, 32, torch.float32, i) for i in (1, 2)),
    )
    lengths = torch.tensor([5, 24, 11])
    whole = attend_past(q, keys, values, lengths, 0.3)
    for i in range(3):
        alone = attend_past(q[i : i + 1], keys[i : i + 1], values[i : i + 1], lengths[i : i + 1], 0.3)
        assert torch.equal(alone[0], whole[i])
    keys[0, :, 5:], values[0] = torch.nan, torch.nan
    again = attend_past(q, keys, values, lengths, 0.3)
    assert torch.equal(again[1:], whole[1:])


def test_large_scores_do_not_overflow() -> None:
    q, keys, values = (
        slots(1, 1, 1, 16, torch.float32, 0)[:, :, 0] * 100,
        *(slots(1, 30, 1, 16, torch.float32, i) for i in (1, 2)),
    )
    lengths = torch.tensor([30])
    torch.testing.assert_close(attend_past(q, keys, values, lengths, 10.0), reference(q, keys, values, lengths, 10.0))


def test_what_does_not_fit_is_refused() -> None:
    q, keys = torch.zeros(2, 4, 16), torch.zeros(2, 2, 8, 16)
    for lengths in (torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([1, 9]), torch.tensor([1.0, 1.0])):
        with pytest.raises(MixtureError, match="lengths"):
            attend_past(q, keys, keys, lengths, 1.0)
    with pytest.raises(MixtureError, match="do not fit"):
        attend_past(q[:, :3], keys, keys, torch.tensor([1, 1]), 1.0)
    assert not can_attend(torch.zeros(1, 1, 20), torch.zeros(1, 1, 1, 20), torch.zeros(1, 1, 1, 20))
