"""Each method's scores and selection against its formula, and the losses and reports made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from some_mixtures import some_mixture
from torch import Tensor, nn

from experts.mixing import LayerAdapter, fresh_adapters, install_mixture
from experts.mixing.adapters import depth_of
from experts.mixing.balance import BalanceRule, Record, add_records, auxiliary_loss, entropy_of, record_of, report
from experts.mixing.post_hoc import glider_bias
from experts.mixing.selection import argmax, entropy_hybrid, everything, top_k, top_p

LAYER = "model.layers.0.self_attn.q_proj"
Adapters = Mapping[str, Mapping[str, LayerAdapter]]


def dense(routing: tuple[Tensor, Tensor, Tensor], experts: int) -> list[dict[int, float]]:
    """Adapter -> weight for each token."""
    indices, weights, _ = routing
    return [
        {e: round(w, 4) for e, w in zip(row, ws, strict=True) if e >= 0}
        for row, ws in zip(indices.tolist(), weights.tolist(), strict=True)
    ]


def logits(*rows: list[float]) -> Tensor:
    """Whose softmax is `rows`."""
    return torch.tensor(rows).log()


def test_selections_follow_their_papers() -> None:
    p = logits([0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4])
    assert dense(top_k(p, 2, renormalise=True), 4) == [{0: 0.625, 1: 0.375}, {3: 0.5714, 2: 0.4286}]
    assert dense(top_k(p, 2, renormalise=False), 4) == [{0: 0.5, 1: 0.3}, {3: 0.4, 2: 0.3}]
    assert dense(argmax(p), 4) == [{0: 1.0}, {3: 1.0}]
    assert dense(top_p(p, 0.4), 4) == [{0: 0.5}, {3: 0.4}]
    assert dense(top_p(p, 0.6), 4) == [{0: 0.5, 1: 0.3}, {3: 0.4, 2: 0.3}]
    assert dense(everything(p), 4)[0] == {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}


def test_dynmole_takes_all_where_a_token_is_undecided() -> None:
    p = logits([0.6, 0.12, 0.12, 0.08, 0.08], [0.22, 0.21, 0.2, 0.19, 0.18], [0.96, 0.01, 0.01, 0.01, 0.01])
    first, second, third = dense(entropy_hybrid(p, 0.75, 2, 0.9, 1.1), 5)
    assert first == {0: 0.6, 1: 0.12}  # 0.72 is within 0.75, 0.84 is not; the entropy is 0.77 of the largest
    assert second == {0: 0.22, 1: 0.21, 2: 0.2, 3: 0.19, 4: 0.18}
    assert third == {0: 0.96, 1: 0.01}  # two in any case


def test_minus_infinity_leaves_an_adapter_out_of_every_selection() -> None:
    p = logits([0.5, 0.0, 0.5])
    for routing in (top_k(p, 3, renormalise=True), top_p(p, 1.0), everything(p), entropy_hybrid(p, 0.9, 2, 0.9, 1.1)):
        assert dense(routing, 3) == [{0: 0.5, 2: 0.5}]
    nothing = torch.full((1, 3), -torch.inf)
    for routing in (top_k(nothing, 2, renormalise=True), top_p(nothing, 0.5), everything(nothing), argmax(nothing)):
        assert not bool(routing.weights.nonzero().numel()) or dense(routing, 3) == [{}]


def test_the_argmax_passes_a_gradient_to_the_gate() -> None:
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    argmax(x).weights.sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0] > 0 > x.grad[0, 1]


def test_arrows_prototypes_are_first_right_singular_vectors(model: nn.Module, adapters: Adapters) -> None:
    gate = install_mixture(model, adapters, "arrow").gates["model.layers.0.mlp.up_proj"]
    for e, name in enumerate("abcd"):
        part = adapters[name]["model.layers.0.mlp.up_proj"]
        top = torch.linalg.svd(part.b.double() @ part.a.double()).Vh[0]
        assert abs(float(gate.prototypes[e].double() @ top)) == pytest.approx(1, abs=1e-5)


def test_moles_scores_are_those_of_the_adapters_outputs(model: nn.Module, adapters: Adapters) -> None:
    mixture = some_mixture(model, adapters, "mole")
    gate, layer = mixture.gates[LAYER], mixture.layers[LAYER]
    x = torch.randn(5, 32)
    parts = [layer.part(e) for e in layer.adapters]
    outputs = torch.stack([p.scale * x.double() @ p.a.double().T @ p.b.double().T for p in parts], 1)  # [T, E, o]
    normal = outputs / outputs.pow(2).mean((1, 2), keepdim=True).sqrt()
    expected = torch.einsum("teo,eof->tf", normal, gate.weight.double()) / math.sqrt(sum(p.a.shape[0] for p in parts))
    torch.testing.assert_close(gate.score(x).double() * gate.log_temperature.exp(), expected, rtol=1e-4, atol=1e-4)


def test_moles_scores_need_no_copy_of_the_map_for_each_rank(model: nn.Module, adapters: Adapters) -> None:
    gate = some_mixture(model, adapters, "mole").gates[LAYER]
    x = torch.randn(5, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gate.score(x)
    ranks, experts = 4 + 1 + 8, 3
    assert max(event.cpu_memory_usage for event in profile.events()) < ranks * 32 * experts * 4  # [R, o, E]


def test_phatgoose_scores_normalised_vectors_and_glider_adds_its_bias(model: nn.Module, adapters: Adapters) -> None:
    gate = some_mixture(model, adapters, "glider").gates[LAYER]
    x, ln = torch.randn(4, 32), nn.LayerNorm(32, elementwise_affine=False)
    scores = ln(x) @ ln(gate.vectors).T / math.sqrt(32)
    torch.testing.assert_close(gate.score(x), scores)
    bias = torch.tensor([[0.0, 50.0, 0.0]]).expand(4, -1)
    routing = gate(x, bias)
    p = (scores + bias).softmax(1).topk(2)
    assert (routing.indices[:, 0] == 1).all()
    torch.testing.assert_close(routing.weights, p.values / (p.values.sum(1, keepdim=True) + 1e-6))
    torch.testing.assert_close(gate.solo(x, torch.tensor([[2]] * 4)), (x @ gate.vectors[2]).sigmoid()[:, None])


def test_gliders_factor_is_each_requests_own() -> None:
    bias = glider_bias(torch.tensor([[0.9, 0.1], [0.5, 0.2]]))
    torch.testing.assert_close(bias, torch.tensor([[103 * 0.9, 103 * 0.1], [1.5, 0.6]]))


def test_a_block_decides_once(model: nn.Module, adapters: Adapters, tokens: Tensor) -> None:
    mixture = some_mixture(model, adapters, "mixlora")
    with torch.no_grad(), mixture.recording() as records:
        model(tokens)
        sites = [record.site.removeprefix("model.layers.") for record in records]
    first = ["self_attn.q_proj", "mlp.gate_proj"]
    assert sites == [f"{layer}.{name}" for layer in (0, 1) for name in first]
    assert all(float(record.load.sum()) == 2 * tokens.numel() for record in records)


def test_molas_deeper_layers_have_more_adapters(model: nn.Module) -> None:
    mixture = install_mixture(model, fresh_adapters(model, "mola", experts=(2, 5), rank=4), "mola")
    assert {(depth_of(name), len(layer.adapters)) for name, layer in mixture.layers.items()} == {(0, 2), (1, 5)}


def test_padding_is_not_counted(model: nn.Module, adapters: Adapters, tokens: Tensor) -> None:
    mixture = some_mixture(model, adapters, "mola")
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    with torch.no_grad(), mixture.recording() as records:
        model(tokens, attention_mask=mask)
        assert {float(record.tokens) for record in records} == {tokens.numel() - 4.0}
    with torch.no_grad():
        model(tokens)
    assert not mixture.state.records


def test_biases_follow_the_load_and_select_without_weighing(model: nn.Module) -> None:
    gate = some_mixture(model, fresh_adapters(model, "smora", rank=8), "smora", {"k": 2, "bias_rate": 0.5}).gates[LAYER]
    load = torch.tensor([9.0, 9, 9, 1, 1, 1, 5, 5])
    gate.rebalance(load)
    assert gate.bias.tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.0, 0.0]
    x = torch.randn(3, 32)
    gate.bias.zero_()
    gate.bias[5] = 10
    routing = gate.choose(x, x)
    assert (routing.indices[:, 0] == 5).all()
    scores = (x @ gate.weight.T).sigmoid()
    assert routing.weights[:, 0].lt(8).all()
    torch.testing.assert_close(
        routing.weights[:, 0] / routing.weights[:, 1],
        scores[:, 5] / scores.gather(1, routing.indices[:, 1:].long())[:, 0],
    )


def records() -> list[Record]:
    """Two layers, three tokens, the last of them padding."""
    counted = torch.tensor([True, True, False])
    indices = torch.tensor([[0, 1], [0, 2], [2, 2]], dtype=torch.int32)
    p = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.0, 0.0, 1.0]])
    return [
        record_of("one", indices, p, counted, (0, 1, 2)),
        record_of("two", indices.flip(0), p.flip(0), counted.flip(0), (0, 1, 2)),
    ]


def test_balance_losses_are_those_of_their_papers() -> None:
    own = records()
    f, p = torch.tensor([1.0, 0.5, 0.5]), torch.tensor([0.55, 0.2, 0.25])
    torch.testing.assert_close(own[0].load, 2 * f)
    switch = auxiliary_loss(own, BalanceRule("switch", 0.1))
    assert switch is not None
    torch.testing.assert_close(switch, 0.1 * 3 * (f * p).sum())
    product = auxiliary_loss(own, BalanceRule("product", 1.0))
    assert product is not None
    torch.testing.assert_close(product, -p.prod().log())
    entropy = auxiliary_loss(own, BalanceRule("none", entropy=1.0))
    assert entropy is not None
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]])
    torch.testing.assert_close(entropy, -(rows * rows.log()).sum(1).mean())
    assert auxiliary_loss(own, BalanceRule()) is None


def test_pooling_averages_the_layers_before_the_product() -> None:
    one, two = records()
    even = replace(two, load=one.load.roll(1), importance=one.importance.roll(1))
    pooled = auxiliary_loss([one, even], BalanceRule("switch", 1.0, pooled=True))
    f = (one.load + even.load) / 4
    p = (one.importance + even.importance) / 4
    torch.testing.assert_close(pooled, 3 * (f * p).sum())
    assert pooled != auxiliary_loss([one, even], BalanceRule("switch", 1.0))


def test_pooling_takes_layers_with_different_adapters() -> None:
    """Even loads are the least, whatever the layers' numbers of adapters; each adapter is averaged where it is."""
    even = [
        Record(str(n), torch.full((n,), 2.0 / n), torch.full((n,), 1.0 / n, requires_grad=True), *torch.ones(2), own)
        for n, own in ((2, (0, 2)), (3, (0, 1, 2)))
    ]
    rule = BalanceRule("switch", 1.0, pooled=True)
    loss = auxiliary_loss(even, rule)
    assert loss is not None
    torch.testing.assert_close(loss, torch.tensor(2.0))
    loss.backward()
    for record in even:  # no adapter of a layer is pulled at more than the others
        assert record.importance.grad is not None
        torch.testing.assert_close(record.importance.grad, record.importance.grad[:1].expand(len(record.load)))
    uneven = replace(even[1], load=torch.tensor([0.0, 2.0, 0.0]), importance=torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(auxiliary_loss([even[0], uneven], rule), torch.tensor((1.0 + 6.0) / 2))


def test_mixlora_balances_layers_with_different_adapters(model: nn.Module, adapters: Adapters, tokens: Tensor) -> None:
    mixture = some_mixture(model, adapters, "mixlora")
    assert {len(layer.adapters) for layer in mixture.layers.values()} == {3, 4}
    mixture.prepare_training()
    with mixture.recording() as own:
        model(tokens)
        loss = auxiliary_loss(own, mixture.rule)
    assert loss is not None
    loss.backward()
    assert all(bool(gate.weight.grad.any()) for gate in mixture.gates.values())


def test_an_entropys_gradient_is_finite_where_a_probability_vanishes() -> None:
    logits = torch.tensor([[0.0, -200.0, 1.0]], requires_grad=True)
    for q in (None, 1.1):
        (gradient,) = torch.autograd.grad(entropy_of(logits.softmax(1), q).sum(), logits)
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())


def test_loads_of_the_global_batch_stand_for_the_micro_batchs_own() -> None:
    indices, p = torch.tensor([[0], [0]], dtype=torch.int32), torch.tensor([[0.7, 0.3], [0.9, 0.1]])
    first, second = (record_of("a", chosen, p, None, (0, 1)) for chosen in (indices, 1 - indices))
    loss = auxiliary_loss([second], BalanceRule("switch", 1.0), add_records([first], [second]))
    torch.testing.assert_close(loss, torch.tensor(1.0))  # both adapters have half of the four tokens


def test_a_report_has_shares_and_entropies() -> None:
    line = report(records())["one"]
    assert line["load"] == [1.0, 0.5, 0.5]
    assert line["load_entropy"] == pytest.approx(1.0397 / math.log(3), abs=1e-3)
    assert 0 < float(line["token_entropy"]) < 1
