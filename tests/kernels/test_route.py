"""K1: the decision against its formula, its gradients, and what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import MixtureError, cpu, dispatch, route
from kernels.route import Score


@pytest.fixture(params=["cpp", "loop"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with the C++ kernel and with plain tensor operations."""
    monkeypatch.setenv("ROUTER_KERNELS_BACKEND", request.param)
    return request.param


def test_the_backend_is_forced_else_by_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, 2)
    assert dispatch.choose_route(logits) == backend
    monkeypatch.delenv("ROUTER_KERNELS_BACKEND")
    assert dispatch.choose_route(logits) == "cpp"
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert dispatch.choose_route(logits) == "loop"


@pytest.mark.parametrize("experts", [1, 7, 1024])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_renormalised_softmax_is_softmax_over_the_chosen(experts: int, k: int) -> None:
    k, logits = min(k, experts), 3 * torch.randn(9, experts)
    indices, weights, scores = route(logits, k)
    top = logits.topk(k)
    assert torch.allclose(scores, logits.softmax(1), atol=1e-6)
    assert torch.equal(indices, top.indices.int())
    assert torch.allclose(weights, top.values.softmax(1), atol=1e-6)


def test_scores_without_renormalisation() -> None:
    logits = torch.randn(5, 6)
    for score, expected in (("softmax", logits.softmax(1)), ("sigmoid", logits.sigmoid())):
        indices, weights, _ = route(logits, 3, score=score, renormalise=False)  # type: ignore[arg-type]
        assert torch.allclose(weights, expected.gather(1, indices.long()))


def test_bias_selects_but_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    indices, weights, _ = route(logits, 2, bias=torch.tensor([5.0, 0.0, 0.0]), score="sigmoid")
    chosen = logits[0, [0, 2]].sigmoid()
    assert indices.tolist() == [[0, 2]]
    assert torch.allclose(weights[0], chosen / chosen.sum())


def test_infinite_logits_leave_adapters_out_and_ties_go_to_the_lower_index() -> None:
    low = -torch.inf
    logits = torch.tensor([[1.0, low, 1.0, 1.0], [low, low, 0.5, low], [low, low, low, low]])
    for score in ("softmax", "sigmoid"):
        indices, weights, _ = route(logits, 2, score=score, bias=torch.zeros(4))  # type: ignore[arg-type]
        assert indices.tolist() == [[0, 2], [2, -1], [-1, -1]]
        assert torch.allclose(weights, torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("used", ["weights", "scores", "both"])
def test_gradients_equal_those_of_the_formula(score: Score, renormalise: bool, used: str) -> None:
    logits, dw, ds = torch.randn(6, 5), torch.randn(6, 3), torch.randn(6, 5)
    logits[0, :3] = -torch.inf
    dw, ds = dw * (used != "scores"), ds * (used != "weights")
    ours, formula = (logits.clone().requires_grad_() for _ in range(2))
    indices, weights, scores = route(ours, 3, score=score, renormalise=renormalise)
    wanted = formula.softmax(1) if score == "softmax" else formula.sigmoid()
    expected = wanted.gather(1, indices.long().clamp(min=0)).masked_fill(indices < 0, 0)
    if renormalise:
        expected = expected / expected.sum(1, keepdim=True)
    assert torch.allclose(weights, expected)
    assert torch.allclose(scores, wanted)
    sides = {"weights": (weights * dw).sum(), "scores": (scores * ds).sum()}
    sum(side for name, side in sides.items() if used in (name, "both")).backward()
    ((expected * dw).sum() + (wanted * ds).sum()).backward()
    assert ours.grad is not None
    assert formula.grad is not None
    assert torch.allclose(ours.grad, formula.grad, atol=1e-6)


def test_a_token_without_adapters_has_no_gradient() -> None:
    logits = torch.full((1, 4), -torch.inf, requires_grad=True)
    _, weights, scores = route(logits, 2)
    (weights.sum() + scores.sum()).backward()
    assert not weights.any()
    assert not scores.any()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_compiles_and_is_well_formed() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.router_kernels.route.default, (logits, None, 2, "softmax", True))
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: route(2 * t, 2), fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (compiled, lambda t: route(2 * t, 2)):
        indices, weights, scores = call(logits)
        (gradient,) = torch.autograd.grad((weights.sum(), (scores * scores).sum()), logits)
        gradients.append((indices, weights, scores, gradient))
    assert all(map(torch.equal, *gradients))


def test_a_token_is_routed_alone_as_in_a_batch() -> None:
    logits = torch.randn(8, 64)
    assert all(map(torch.equal, (t[3:4] for t in route(logits, 4)), route(logits[3:4], 4)))
    assert route(logits[:0], 4)[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("logits", "k", "options", "message"),
    [
        (torch.tensor([[1.0, torch.nan]]), 1, {}, "NaN"),
        (torch.zeros(1, 2), 3, {}, "k <= E"),
        (torch.zeros(2), 1, {}, r"\[T, E\]"),
        (torch.zeros(1, 2), 1, {"score": "tanh"}, "'tanh'"),
        (torch.zeros(1, 2), 1, {"bias": torch.zeros(3)}, r"bias must be \[2\]"),
    ],
)
def test_bad_input_is_a_clear_error(logits: Tensor, k: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(MixtureError, match=message):
        route(logits, k, **options)  # type: ignore[arg-type]
