"""K4: ranks as experts."""

from __future__ import annotations

import pytest
import torch
from mixtures import error, exact, random_choice, random_stack

from kernels import MixtureError, expand_ranks, project_ranks


def test_ranks_as_experts_equal_a_mixture_of_rank_one_adapters() -> None:
    stack = random_stack([1] * 12, 20, [24])
    stack.scales.fill_(1.0)
    indices, weights = random_choice(9, 4, 12)
    x, base = torch.randn(9, 20), torch.randn(9, 24)
    y = expand_ranks(project_ranks(x, stack.A[0]), stack.B, indices, weights, base=base)
    assert error(y, exact(x, stack, indices, weights, base)) < 1e-5


def test_a_rank_that_overflows_in_float16_is_no_matter_of_others() -> None:
    """The first rank's activation is 80000, which float16 cannot hold."""
    A = torch.full((2, 8), 100.0)
    A[1] = 0.01
    x, B = torch.full((3, 8), 100.0).half(), torch.full((2, 4), 0.5).half()
    h = project_ranks(x, A.half())
    weights = torch.ones(3, 1)
    y = expand_ranks(h, B, torch.ones(3, 1, dtype=torch.long), weights)
    torch.testing.assert_close(y, torch.full((3, 4), 4.0).half(), rtol=1e-2, atol=0)
    none = expand_ranks(h.masked_fill(h > 100, torch.inf), B, torch.full((3, 1), -1), weights)
    assert torch.equal(none, torch.zeros(3, 4).half())
    large = expand_ranks(h, B, torch.zeros(3, 1, dtype=torch.long), weights / 100)
    torch.testing.assert_close(large, torch.full((3, 4), 400.0).half(), rtol=1e-2, atol=0)


def test_bad_input_is_a_clear_error() -> None:
    with pytest.raises(MixtureError, match="x must be"):
        project_ranks(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(MixtureError, match="h must be"):
        expand_ranks(torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, 1).long(), torch.zeros(2, 1))
