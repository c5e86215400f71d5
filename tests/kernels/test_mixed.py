"""Every CPU backend against the sum in float64, its gradients, and what a mixture must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mixtures import RANKS, TOLERANCES, error, exact, gradients_of, in_float64, random_choice, random_stack
from torch import Tensor

from kernels import AdapterStack, KernelError, MixtureError, check_mixture, mixed_lora, route

BACKENDS = ["loop", "cpp", "grouped", "stacked"]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_sum_in_float64(backend: str, dtype: torch.dtype) -> None:
    stack = random_stack(RANKS, 72, [40, 24, 8], dtype=dtype)
    indices, weights = random_choice(37, 3, len(RANKS))
    x, base = torch.randn(37, 72, dtype=dtype), torch.randn(37, 72, dtype=dtype)
    y = mixed_lora(x, stack, indices, weights, base=base, backend=backend)
    assert y.dtype == dtype
    assert error(y, exact(x, stack, indices, weights, base)) < TOLERANCES[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_may_be_stored_in_bfloat16(backend: str) -> None:
    """Every bfloat16 is a float32, so nothing is lost."""
    stack = random_stack(RANKS, 72, [40, 24, 8], dtype=torch.bfloat16)
    wide = replace(stack, A=stack.A.float(), B=stack.B.float())
    indices, weights = random_choice(37, 3, len(RANKS))
    x, base = torch.randn(37, 72), torch.randn(37, 72)
    y = mixed_lora(x, stack, indices, weights, base=base, backend=backend)
    assert torch.equal(y, mixed_lora(x, wide, indices, weights, base=base, backend=backend))
    with pytest.raises(MixtureError, match="gradients need"):
        mixed_lora(x.requires_grad_(), stack, indices, weights)


@pytest.mark.parametrize("backend", ["loop", "cpp", "stacked"])
def test_width_need_not_be_a_multiple_of_anything(backend: str) -> None:
    stack = random_stack([3, 33], 37, [53])
    indices, weights = random_choice(11, 2, 2)
    x = torch.randn(11, 37)
    assert error(mixed_lora(x, stack, indices, weights, backend=backend), exact(x, stack, indices, weights)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_equal_ranks(backend: str, tokens: int) -> None:
    stack = random_stack([8] * 5, 48, [64])
    indices, weights = random_choice(tokens, 2, 5)
    indices[0, 0] = 4
    x = torch.randn(tokens, 48)
    y = mixed_lora(x, stack, indices.int(), weights, backend=backend)
    assert error(y, exact(x, stack, indices, weights)) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_those_in_float64(backend: str, dtype: torch.dtype) -> None:
    stack = random_stack([1, 33, 4, 8], 40, [24, 8], dtype=dtype)
    indices, weights = random_choice(29, 3, 4)
    indices[indices == 2] = 0  # adapter 2 is used by none: its gradient is zero
    x, dy = torch.randn(29, 40, dtype=dtype), torch.randn(29, 32, dtype=dtype)
    found = gradients_of(x, stack, indices, weights, dy, backend)
    wanted = gradients_of(x.double(), in_float64(stack), indices, weights.double(), dy.double(), "loop")
    for name, gradient, reference in zip(("x", "A", "B", "weights", "base"), found, wanted, strict=True):
        assert error(gradient, reference) < TOLERANCES[dtype], name
    assert not found[1][:, 34:38].any()


def test_float64_gradients_equal_finite_differences() -> None:
    stack = random_stack([1, 3], 5, [4, 2], dtype=torch.float64)
    indices = torch.tensor([[0, 1], [1, 1], [-1, 0], [-1, -1]])

    def call(x: Tensor, A: Tensor, B: Tensor, weights: Tensor, base: Tensor) -> Tensor:
        return mixed_lora(x, replace(stack, A=A, B=B), indices, weights, base=base)

    shapes = [(4, 5), stack.A.shape, stack.B.shape, (4, 2), (4, 6)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(call, tensors)


def test_second_derivatives_are_refused() -> None:
    stack = random_stack([4, 4], 16, [16])
    logits, x = torch.randn(6, 2, requires_grad=True), torch.randn(6, 16, requires_grad=True)
    indices, weights, _ = route(logits, 2)
    y = mixed_lora(x, stack, indices, weights.detach())
    for result, source in ((y, x), (weights, logits)):
        (gradient,) = torch.autograd.grad(result.square().sum(), source, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_only_wanted_gradients_are_computed() -> None:
    stack = random_stack([4, 4], 16, [16])
    B = stack.B.clone().requires_grad_()
    indices, weights = random_choice(6, 2, 2)
    mixed_lora(torch.randn(6, 16), replace(stack, B=B), indices, weights).sum().backward()
    assert B.grad is not None
    assert B.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_base", [True, False])
def test_no_tokens_and_no_adapters(backend: str, with_base: bool) -> None:
    stack = random_stack([4, 8], 16, [24])
    for tokens in (0, 7):
        x, indices = torch.randn(tokens, 16, requires_grad=True), torch.full((tokens, 2), -1)
        base = torch.randn(tokens, 24) if with_base else None
        y = mixed_lora(x, stack, indices, torch.rand(tokens, 2), base=base, backend=backend)
        assert torch.equal(y, torch.zeros(tokens, 24) if base is None else base)
        y.sum().backward()
        assert x.grad is not None
        assert not x.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_adapter_for_all_is_plain_lora(backend: str) -> None:
    stack = random_stack([8, 16, 8], 32, [32])
    ((A, B),) = stack.adapter(1)
    x = torch.randn(65, 32)
    y = mixed_lora(x, stack, torch.ones(65, 1, dtype=torch.long), torch.ones(65, 1), backend=backend)
    assert error(y, (stack.scales[0, 1] * (x @ A.T) @ B.T).double()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_that_stands_twice_adds_twice(backend: str) -> None:
    stack = random_stack([8, 4], 32, [32])
    x, once = torch.randn(9, 32), torch.zeros(9, 1, dtype=torch.long)
    twice = mixed_lora(x, stack, once.expand(9, 3), torch.tensor([[0.5, 0.25, -1.0]]).expand(9, 3), backend=backend)
    assert error(twice, -0.25 * mixed_lora(x, stack, once, torch.ones(9, 1), backend="loop").double()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_equal_and_tokens_independent_of_their_order(backend: str) -> None:
    stack = random_stack(RANKS, 64, [48])
    indices, weights = random_choice(40, 2, len(RANKS))
    x, dy, order = torch.randn(40, 64), torch.randn(40, 48), torch.randperm(40)
    y = mixed_lora(x, stack, indices, weights, backend=backend)
    assert torch.equal(y, mixed_lora(x, stack, indices, weights, backend=backend))
    assert error(mixed_lora(x[order], stack, indices[order], weights[order], backend=backend), y[order].double()) < 1e-6
    first, second = (gradients_of(x, stack, indices, weights, dy, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_cpp_kernel_answers_a_token_alone_as_in_a_batch() -> None:
    stack = random_stack(RANKS, 72, [40])
    indices, weights = random_choice(33, 2, len(RANKS))
    x = torch.randn(33, 72)
    together = mixed_lora(x, stack, indices, weights, backend="cpp")
    alone = [mixed_lora(x[[t]], stack, indices[[t]], weights[[t]], backend="cpp") for t in range(33)]
    assert torch.equal(together, torch.cat(alone))


def test_the_cpp_kernel_does_not_depend_on_the_number_of_threads() -> None:
    stack = random_stack(RANKS, 72, [640, 8])
    indices, weights = random_choice(33, 2, len(RANKS))
    x, dy, threads = torch.randn(33, 72), torch.randn(33, 648), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y = mixed_lora(x, stack, indices, weights, backend="cpp")
            results.append((y, *gradients_of(x, stack, indices, weights, dy, "cpp")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend: str) -> None:
    stack = random_stack([8, 8], 32, [32])
    indices, weights = random_choice(12, 2, 2)
    x = torch.randn(32, 12).T
    y = mixed_lora(x, stack, indices.T.contiguous().T, weights.T.contiguous().T, backend=backend)
    assert error(y, exact(x, stack, indices, weights)) < 1e-5


def test_operator_is_well_formed() -> None:
    stack = random_stack([4, 8], 16, [8, 8])
    indices, weights = random_choice(6, 2, 2)
    x = torch.randn(6, 16, requires_grad=True)
    arguments = (x, stack.A, stack.B, stack.offsets, stack.scales, indices, weights, None, [8, 8], 8, "", True)
    torch.library.opcheck(torch.ops.router_kernels.mixed_lora.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    stack = random_stack([4, 8], 16, [16])

    def layer(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return mixed_lora(x.relu(), stack, indices, weights, base=x).tanh()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 7):
        indices, weights = random_choice(tokens, 2, 2)
        x, same = (
            torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)
        )
        compiled(x, indices, weights).sum().backward()
        layer(same, indices, weights).sum().backward()
        assert x.grad is not None
        assert same.grad is not None
        assert torch.allclose(x.grad, same.grad)


def bad_calls() -> dict[str, tuple[dict[str, object], str]]:
    indices = torch.zeros(3, 2, dtype=torch.long)
    return {
        "another base model": ({"x": torch.randn(3, 20)}, r"x must be \[tokens, 16\]"),
        "index too high": ({"indices": indices + 2}, r"\[-1, 2\), got 2 to 2"),
        "index too low": ({"indices": indices - 2}, r"\[-1, 2\), got -2 to -2"),
        "float indices": ({"indices": indices.float()}, "int32 or int64"),
        "NaN weight": ({"weights": torch.tensor([[1.0, torch.nan]]).expand(3, 2)}, "finite"),
        "other shape": ({"weights": torch.rand(3, 1)}, r"\[3, k\]"),
        "other dtype": ({"x": torch.randn(3, 16).half()}, "float16"),
        "base of another width": ({"base": torch.randn(3, 4)}, r"base must be \[3, 24\]"),
        "another device": ({"weights": torch.rand(3, 2, device="meta")}, "must be on cpu"),
        "unknown backend": ({"backend": "fast"}, "unknown backend 'fast'"),
        "no Triton on a CPU": ({"backend": "triton"}, "GPU"),
        "odd width for grouped_mm": (
            {"x": torch.randn(3, 15), "stack": random_stack([4, 8], 15, [24]), "backend": "grouped"},
            "16 bytes",
        ),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_is_a_clear_error(name: str) -> None:
    change, message = bad_calls()[name]
    call = {
        "x": torch.randn(3, 16),
        "stack": random_stack([4, 8], 16, [24]),
        "indices": torch.zeros(3, 2, dtype=torch.long),
        "weights": torch.rand(3, 2),
    }
    with pytest.raises(KernelError, match=message):
        mixed_lora(**(call | change))  # type: ignore[arg-type]


def test_values_are_checked_where_they_come_from_outside() -> None:
    check_mixture(torch.tensor([[-1, 1]]), torch.rand(1, 2), 2)
    with pytest.raises(MixtureError, match="finite"):
        check_mixture(torch.tensor([[-1, 1]]), torch.tensor([[1.0, torch.inf]]), 2)


def test_bad_adapters_are_a_clear_error() -> None:
    A, B = torch.randn(4, 16), torch.randn(24, 4)
    for adapters, scales, message in [
        ([[(A, B)], [(A, torch.randn(24, 5))]], [1.0, 1.0], "adapter 1, slice 0"),
        ([[(A, B)], [(torch.randn(4, 12), B)]], [1.0, 1.0], "maps 12 to 24 features, adapter 0 maps 16 to 24"),
        ([[(A, B)], [(A, B), (A, B)]], [1.0, 1.0], "2 slices"),
        ([[(A, B)]], [1.0, 2.0], "1 adapters with 2 scales"),
        ([[(A, B)]], [float("nan")], "finite"),
        ([], [], "at least one"),
    ]:
        with pytest.raises(MixtureError, match=message):
            AdapterStack.pack(adapters, scales)  # type: ignore[arg-type]
    with pytest.raises(MixtureError, match=r"A must be \[1 slices, 8 rows, d\]"):
        AdapterStack.of(torch.randn(1, 7, 16), torch.randn(8, 24), torch.ones(1, 2), ranks=[4, 4])


def test_packed_adapters_come_out_as_they_went_in() -> None:
    adapters = [[(torch.randn(r, 6), torch.randn(4, r)), (torch.randn(2, 6), torch.randn(3, 2))] for r in (1, 5)]
    stack = AdapterStack.pack(adapters, [[1.0, 2.0], [3.0, 4.0]])
    assert (stack.ranks, stack.widths, stack.scales.tolist()) == ((2, 5), (4, 3), [[1, 3], [2, 4]])
    for e, adapter in enumerate(adapters):
        for (A, B), (packed_A, packed_B) in zip(adapter, stack.adapter(e), strict=True):
            assert torch.equal(packed_A[: len(A)], A)
            assert not packed_A[len(A) :].any()
            assert torch.equal(packed_B[:, : len(A)], B)


@pytest.mark.parametrize("backend", ["loop", "cpp", "grouped", "stacked"])
def test_no_temporary_holds_tokens_times_slots_times_outputs(backend: str) -> None:
    tokens, slots, outputs = 2048, 4, 512
    stack = random_stack([4] * 6, 64, [outputs])
    indices, weights = random_choice(tokens, slots, 6)
    x = torch.randn(tokens, 64)
    mixed_lora(x, stack, indices, weights, backend=backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        mixed_lora(x, stack, indices, weights, backend=backend)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert tokens * outputs * 4 <= largest <= tokens * slots * outputs * 4 / 2  # y, and at most twice of it at once
