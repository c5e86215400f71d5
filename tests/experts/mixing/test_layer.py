"""The layer against the definition in float64, and against what PEFT makes of the same adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from some_mixtures import some_mixture
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from experts.errors import MixingError
from experts.mixing import GATES, GateLoad, LayerAdapter, Mixture, RequestMixture, fresh_adapters, install_mixture
from experts.mixing.layer import MixedLoraLinear

LAYER = "model.layers.1.mlp.up_proj"
Adapters = Mapping[str, Mapping[str, LayerAdapter]]


def exact(layer: MixedLoraLinear, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The layer's definition, token by token, in float64."""
    y = nn.functional.linear(x.double(), layer.base_layer.weight.double())
    for t, i in (indices >= 0).nonzero().tolist():
        part = layer.part(layer.adapters[int(indices[t, i])])
        y[t] += weights[t, i].double() * part.scale * (part.b.double() @ (part.a.double() @ x[t].double()))
    return y


def error(y: Tensor, reference: Tensor) -> float:
    return float((y.detach().double() - reference.detach()).norm() / reference.detach().norm())


@pytest.mark.parametrize("gate", sorted(set(GATES) - {"smora", "flylora", "static"}))
def test_a_layer_is_the_sum_that_mixing_is_defined_as(gate: str, model: nn.Module, adapters: Adapters) -> None:
    mixture = some_mixture(model, adapters, gate)
    name = next(iter(mixture.gates))
    layer = mixture.layers[name]
    x = torch.randn(9, layer.base_layer.in_features, generator=torch.Generator().manual_seed(1))
    routing = mixture.gates[name](x)
    assert error(layer(x), exact(layer, x, routing.indices, routing.weights)) < 1e-5
    assert error(layer(x[None, 2:4]), exact(layer, x, routing.indices, routing.weights)[None, 2:4]) < 1e-5


def test_smora_is_the_sum_over_ranks(model: nn.Module) -> None:
    mixture = some_mixture(model, fresh_adapters(model, "smora", rank=16), "smora")
    layer, gate = mixture.layers[LAYER], mixture.gates[LAYER]
    gate.bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(3)) * 0.1)
    x = torch.randn(7, 32)
    part = layer.part(0)
    scores = (x.double() @ gate.weight.double().T).sigmoid()
    y = nn.functional.linear(x.double(), layer.base_layer.weight.double())
    alpha = part.scale * 16
    for t in range(7):
        chosen = (scores[t] + gate.bias.double()).topk(8).indices
        weights = scores[t, chosen] / scores[t, chosen].sum() * 8
        for rank, weight in zip(chosen.tolist(), weights, strict=True):
            y[t] += weight * alpha / 8 * (part.a[rank].double() @ x[t].double()) * part.b[:, rank].double()
    assert error(layer(x), y) < 1e-5


def test_flylora_is_the_sum_over_the_largest_activations(model: nn.Module) -> None:
    mixture = some_mixture(model, fresh_adapters(model, "flylora", rank=16), "flylora")
    layer, gate = mixture.layers[LAYER], mixture.gates[LAYER]
    gate.bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(3)) * 0.1)
    part, x = layer.part(0), torch.randn(7, 32)
    assert part.scale == 2
    assert ((part.a != 0).sum(1) == 8).all()
    h = x.double() @ part.a.double().T
    kept = torch.zeros_like(h).scatter(1, (h + gate.bias.double()).topk(8).indices, 1.0)
    y = nn.functional.linear(x.double(), layer.base_layer.weight.double()) + 2 * (h * kept) @ part.b.double().T
    assert error(layer(x), y) < 1e-5


def test_requests_of_all_kinds_share_a_batch(model: nn.Module, adapters: Adapters, tokens: Tensor) -> None:
    mixture = some_mixture(model, adapters, "arrow")
    wishes = [
        RequestMixture(),
        RequestMixture.only("b"),
        RequestMixture(weights={"a": 0.5, "d": -0.25}),
        RequestMixture.base(),
        RequestMixture(bias={"c": 3.0, "a": float("-inf")}),
    ]
    batch = tokens[:1].expand(5, -1)
    with torch.no_grad():
        with mixture.requests(wishes):
            together = model(batch).logits
        for row, wish in enumerate(wishes):
            with mixture.requests([wish]):
                alone = model(batch[:1]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
        assert len({round(float(row.norm()), 3) for row in together}) == 5


def test_each_request_learns_what_its_own_tokens_got(model: nn.Module, adapters: Adapters) -> None:
    mixture = some_mixture(model, adapters, "dynmole")  # whose weights sum to less than 1
    layer, gate = mixture.layers[LAYER], mixture.gates[LAYER]
    names = [mixture.adapters[e] for e in layer.adapters]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    made = gate(x)
    weights = torch.zeros(6, len(names)).scatter_add(1, made.indices.clamp(min=0).long(), made.weights)

    def told(load: GateLoad, rows: list[int]) -> None:
        shares = load.shares()[LAYER]
        expected = dict(zip(names, weights[rows].mean(0).tolist(), strict=True))
        assert shares == pytest.approx({name: share for name, share in expected.items() if share})
        assert load.tokens == len(rows)

    first, second = GateLoad(), GateLoad()
    wishes = [RequestMixture(load=first), RequestMixture(), RequestMixture(load=second, own=1)]
    with mixture.requests(wishes):  # two tokens each
        layer(x.view(3, 2, 32))
    layer(x)  # nobody asks any more
    told(first, [0, 1])
    told(second, [5])
    mixture.state.set([RequestMixture(), RequestMixture(load=first)], request_of_token=torch.tensor([1, 1, 0, 0, 1, 0]))
    layer(x)
    told(first, [0, 1, 0, 1, 4])
    assert (GateLoad().tokens, GateLoad().shares()) == (0, {})


def test_tokens_of_several_requests_lie_side_by_side(model: nn.Module, adapters: Adapters) -> None:
    layer = some_mixture(model, adapters, "arrow").layers[LAYER]
    x = torch.randn(6, 32)
    state = layer._state
    state.set([RequestMixture.only("a"), RequestMixture.only("c")], request_of_token=torch.tensor([0, 1, 1, 0, 1, 0]))
    y = layer(x)
    state.set([RequestMixture.only("c")])
    torch.testing.assert_close(y[[1, 2, 4]], layer(x[[1, 2, 4]]), rtol=1e-5, atol=1e-5)
    state.set([RequestMixture.only("a")] * 2, request_of_token=torch.tensor([0, 1]))
    with pytest.raises(MixingError, match="names 2 tokens, not 6"):
        layer(x)
    for wish in (RequestMixture(), RequestMixture.base()):
        state.set([wish] * 4)
        with pytest.raises(MixingError, match="6 rows is not that of 4 requests"):
            layer(x)


def test_requests_are_never_smeared_over_rows(model: nn.Module, adapters: Adapters, tokens: Tensor) -> None:
    mixture = some_mixture(model, adapters, "static")
    wishes = [RequestMixture.only("a"), RequestMixture.only("c")]
    with torch.no_grad(), mixture.requests(wishes):
        with pytest.raises(MixingError, match="3 rows is not that of 2 requests"):
            model(tokens)  # 18 tokens, which two requests would divide
        with pytest.raises(MixingError, match="1 rows is not"):
            model(tokens[:1])
        beams = model(tokens[:1].expand(4, -1)).logits  # two rows for each
        alone = model(tokens[:1].expand(2, -1)).logits
    torch.testing.assert_close(beams, alone.repeat_interleave(2, 0))


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_the_constants_and_the_answers(
    gate: str, dtype: torch.dtype, model: nn.Module, adapters: Adapters
) -> None:
    """A layer whose model was cast answers as the one that was made of the cast matrices."""
    mixture = made_for(model, gate, adapters)
    if gate == "static":
        mixture.state.set([RequestMixture(weights={"a": 0.7, "c": -0.3})])
    layer = mixture.layers[LAYER.replace("up_proj", "gate_proj")]  # the first of its block
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    model.to(dtype)
    kept = [*layer.named_buffers(recurse=False), *(layer.gate.state_dict().items() if layer.gate else ())]
    assert kept
    assert {tensor.dtype for _, tensor in kept} <= {torch.float32, torch.int32, torch.int64}
    assert layer.A.dtype == layer.weight.dtype == dtype
    low = layer(x)
    rounded = model.float()  # A, B and the base stay as the cast rounded them, sums are exact enough
    assert rounded is model
    assert error(low, layer(x.float()).double()) < 2e-2


def test_a_model_in_bfloat16_gives_the_sum_in_float64(model: nn.Module, adapters: Adapters) -> None:
    mixture = install_mixture(model, adapters, "static", {"weights": {"a": 0.7, "c": -0.3}})
    layer = mixture.layers[LAYER]
    model.to(torch.bfloat16)
    x = torch.randn(5, 32).bfloat16()
    indices, weights = torch.tensor([[0, 2]]).expand(5, -1), torch.tensor([[0.7, -0.3]]).expand(5, -1)
    assert error(layer(x), exact(layer, x, indices, weights)) < 1e-2


def test_a_state_makes_its_tables_where_the_model_is(model: nn.Module, adapters: Adapters) -> None:
    state = install_mixture(model, adapters, "arrow").state
    model.to("meta")
    state.set([RequestMixture.only("a")])
    assert state.table(0).weights.device.type == state.given.device.type == "meta"


def test_a_mixed_layer_has_what_models_read_of_a_linear_one(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()  # reads self.wo.weight.dtype
    mixture = some_mixture(model, fresh_adapters(model, "mola", experts=2, rank=2), "mola")
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        mixed = model(input_ids=tokens, decoder_input_ids=tokens).logits
        mixture.remove()
        assert not torch.allclose(model(input_ids=tokens, decoder_input_ids=tokens).logits, mixed)
    layer = next(iter(mixture.layers.values()))
    base = layer.base_layer
    assert (layer.weight, layer.bias) == (base.weight, base.bias)
    assert (layer.in_features, layer.out_features) == (base.in_features, base.out_features)


def test_a_row_of_one_adapter_equals_pefts_adapter_names(
    base_folder: Path, tmp_path: Path, model: nn.Module, adapters: Adapters, tokens: Tensor
) -> None:
    mixture = some_mixture(model, adapters, "static")
    mixture.save(tmp_path)
    with torch.no_grad(), mixture.requests([RequestMixture.only(name) for name in "cab"]):
        y = model(tokens).logits
        with torch.no_grad():
            expected = peft_model(base_folder, tmp_path)(tokens, adapter_names=list("cab")).logits
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_static_mixture_equals_pefts_merging_by_concatenation(
    base_folder: Path, tmp_path: Path, model: nn.Module, adapters: Adapters, tokens: Tensor
) -> None:
    weights = {"a": 0.5, "b": 1.5, "c": 0.25}
    mixture = some_mixture(model, adapters, "static", {"weights": weights})
    mixture.save(tmp_path)
    peft = peft_model(base_folder, tmp_path)
    peft.add_weighted_adapter(list(weights), list(weights.values()), "merged", combination_type="cat")
    peft.set_adapter("merged")
    with torch.no_grad():
        y, expected = model(tokens).logits, peft(tokens).logits
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_arrow_equals_pefts_arrow(base_folder: Path, tmp_path: Path, model: nn.Module, tokens: Tensor) -> None:
    from models import save_adapter
    from peft import ArrowConfig, create_arrow_model

    from experts.mixing import read_adapters

    folders = {name: save_adapter(base_folder, tmp_path / name, seed=e) for e, name in enumerate("abc")}
    mixture = install_mixture(model, read_adapters(folders, model), "arrow", {"k": 2})
    arrow = create_arrow_model(
        base_model=AutoModelForCausalLM.from_pretrained(base_folder),
        task_specific_adapter_paths=[str(folder) for folder in folders.values()],
        arrow_config=ArrowConfig(top_k=2, router_temperature=1.0),
    ).eval()
    with torch.no_grad():
        arrow(tokens)  # PEFT makes its prototypes in the first pass, by a few power iterations
        for name, gate in mixture.gates.items():
            gate.prototypes.copy_(arrow.base_model.model.get_submodule(name).lora_arrow["arrow_router"].prototypes)
        torch.testing.assert_close(model(tokens).logits, arrow(tokens).logits, rtol=1e-4, atol=1e-4)


def peft_model(base: Path, mixture: Path) -> Any:
    """The saved adapters on the same base, by PEFT."""
    first, *rest = sorted((mixture / "adapters").iterdir())
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, adapter_name=first.name)
    for folder in rest:
        peft.load_adapter(folder, adapter_name=folder.name)
    return peft.eval()


@pytest.mark.parametrize("gate", list(GATES))
def test_gradients_reach_what_the_method_learns_and_nothing_else(
    gate: str, model: nn.Module, adapters: Adapters, tokens: Tensor
) -> None:
    mixture = made_for(model, gate, adapters)
    learned = mixture.prepare_training()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in learned}
    assert bool(learned) == (mixture.gate.learns != "nothing")
    if learned:
        if mixture.gate.learns_alone:
            mixture.state.set([RequestMixture.only(name) for name in "abc"])
            mixture.state.solo = True
        loss = model(tokens).logits.log_softmax(-1)[..., 7].mean()
        loss.backward()
        without = [p for p in learned if p.grad is None or not bool(p.grad.any())]
        assert not without


def made_for(model: nn.Module, gate: str, adapters: Adapters) -> Mixture:
    """The method over adapters that it can take."""
    ranks = gate in ("smora", "flylora")
    return some_mixture(model, fresh_adapters(model, gate, rank=16) if ranks else adapters, gate)


@pytest.mark.slow
@pytest.mark.parametrize("gate", list(GATES))
def test_a_compiled_model_gives_the_same_without_a_graph_break(
    gate: str, model: nn.Module, adapters: Adapters, tokens: Tensor
) -> None:
    model.model.layers = model.model.layers[:1]  # one block says all, and compiles in half the time
    first = {name: {n: part for n, part in own.items() if ".layers.0." in n} for name, own in adapters.items()}
    made_for(model, gate, first)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        expected = [model(tokens).logits, model(tokens + 1).logits]
        torch.testing.assert_close([compiled(tokens).logits, compiled(tokens + 1).logits], expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_compiled_model_serves_requests_of_their_own(model: nn.Module, adapters: Adapters, tokens: Tensor) -> None:
    mixture = some_mixture(model, adapters, "glider")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for bias in (0.5, 2.0):
        wishes = [RequestMixture(bias={"a": bias}), RequestMixture.only("b"), RequestMixture.base()]
        with torch.no_grad(), mixture.requests(wishes):
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)
    assert counter.frame_count == 1
