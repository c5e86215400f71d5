"""The Triton kernels under Triton's interpreter: run by test_gpu.py, since it must be on before Triton is imported."""

from __future__ import annotations

import pytest
import torch
from mixtures import TOLERANCES, error, exact, gradients_of, in_float64, random_choice, random_stack

from kernels import mixed_lora
from kernels.gpu_route import route
from kernels.route import route_reference


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_equals_the_sum_in_float64(dtype: torch.dtype) -> None:
    stack = random_stack([1, 4, 33, 128], 40, [24, 8], dtype=dtype)
    indices, weights = random_choice(19, 3, 4)
    x, base = torch.randn(19, 40, dtype=dtype), torch.randn(19, 32, dtype=dtype)
    y = mixed_lora(x, stack, indices, weights, base=base, backend="triton")
    assert error(y, exact(x, stack, indices, weights, base)) < TOLERANCES[dtype]


def test_sums_over_wide_inputs_are_split_and_large_batches_tiled() -> None:
    stack = random_stack([16, 8], 600, [130])
    indices, weights = random_choice(70, 1, 2)
    x = torch.randn(70, 600)
    for tokens in (1, 70):
        y = mixed_lora(x[:tokens], stack, indices[:tokens], weights[:tokens], backend="triton")
        assert error(y, exact(x[:tokens], stack, indices[:tokens], weights[:tokens])) < 1e-5


def test_an_adapter_that_stands_twice_adds_twice_and_runs_are_equal() -> None:
    stack = random_stack([8, 4], 32, [32])
    indices, weights = torch.tensor([[1, 1, 0], [0, -1, 0], [-1, -1, -1]]), torch.randn(3, 3)
    x = torch.randn(3, 32)
    first, second = (mixed_lora(x, stack, indices, weights, backend="triton") for _ in range(2))
    assert error(first, exact(x, stack, indices, weights)) < 1e-5
    assert torch.equal(first, second)


def test_gradients_equal_those_in_float64() -> None:
    stack = random_stack([1, 33, 4], 40, [24, 8])
    indices, weights = random_choice(19, 2, 3)
    indices[indices == 2] = 0  # adapter 2 is used by none
    x, dy = torch.randn(19, 40), torch.randn(19, 32)
    found = gradients_of(x, stack, indices, weights, dy, "triton")
    wanted = gradients_of(x.double(), in_float64(stack), indices, weights.double(), dy.double(), "loop")
    for name, gradient, reference in zip(("x", "A", "B", "weights", "base"), found, wanted, strict=True):
        assert error(gradient, reference) < 1e-5, name
    assert not found[1][:, 34:].any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
def test_routes_as_the_formula(score: str, biased: bool, renormalise: bool) -> None:
    logits, bias = torch.randn(5, 11), torch.randn(11) if biased else None
    logits[0, 2:], logits[1], logits[2, 3:] = -torch.inf, -torch.inf, 0.5
    found = route(logits, bias, 3, score, renormalise)
    expected = route_reference(logits, bias, 3, score, renormalise)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-6)
    assert torch.allclose(found[2], expected[2], atol=1e-6)


def test_routes_to_all_in_order() -> None:
    logits = torch.randn(4, 11)
    logits[0, 2:], logits[1], logits[2, 3:] = -torch.inf, -torch.inf, 0.5
    found, expected = route(logits, None, 11, "softmax", False), route_reference(logits, None, 11, "softmax", False)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-6)
