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


def test_sparse_projection_equals_dense_and_differentiates() -> None:
    A = torch.randn(8, 20) * (torch.rand(8, 20) < 0.25)
    x, same = (torch.randn(5, 20, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2))
    sparse, dense = project_ranks(x, A.to_sparse_csr()), project_ranks(same, A)
    assert torch.allclose(sparse, dense, atol=1e-6)
    sparse.square().sum().backward()
    dense.square().sum().backward()
    assert x.grad is not None
    assert same.grad is not None
    assert torch.allclose(x.grad, same.grad, atol=1e-5)


def test_bad_input_is_a_clear_error() -> None:
    with pytest.raises(MixtureError, match="x must be"):
        project_ranks(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(MixtureError, match="h must be"):
        expand_ranks(torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, 1).long(), torch.zeros(2, 1))
