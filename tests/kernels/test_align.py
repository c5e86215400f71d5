"""K0: pairs sorted by adapter."""

from __future__ import annotations

import torch

from kernels import align


def test_pairs_are_sorted_by_adapter_then_by_token() -> None:
    order, segments = align(torch.tensor([[2, 0], [-1, 2], [0, -1]]), 4)
    assert order.tolist() == [1, 4, 0, 3, 2, 5]
    assert segments.tolist() == [0, 2, 2, 4, 4]


def test_no_pairs() -> None:
    assert align(torch.empty(0, 2, dtype=torch.long), 3).segments.tolist() == [0, 0, 0, 0]
