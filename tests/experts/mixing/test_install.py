"""Putting mixtures in and out, their files, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_adapter, save_model
from safetensors.torch import load_file, save_file
from some_mixtures import some_mixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from experts.errors import MixingError
from experts.mixing import (
    GATES,
    GateLoad,
    LayerAdapter,
    RequestMixture,
    fresh_adapters,
    install_mixture,
    load_mixture,
    new_adapters,
    read_adapters,
)
from experts.mixing.gate import Site
from experts.mixing.install import GATE_FILE
from experts.mixing.layer import MixedLoraLinear

LAYER = "model.layers.0.self_attn.q_proj"
Adapters = Mapping[str, Mapping[str, LayerAdapter]]


def test_removing_gives_the_model_back(model: nn.Module, adapters: Adapters, tokens: Tensor) -> None:
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        before = model(tokens).logits
        mixture = some_mixture(model, adapters, "mixlora")
        mixed = model(tokens).logits
        mixture.remove()
        mixture.remove()
        after = model(tokens).logits
    assert torch.equal(before, after)
    assert not torch.allclose(before, mixed)
    assert [name for name, _ in model.named_modules()] == names
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("gate", list(GATES))
def test_a_mixture_comes_back_from_its_files(
    gate: str, model: nn.Module, adapters: Adapters, tokens: Tensor, tmp_path: Path
) -> None:
    ranks = gate in ("smora", "flylora")
    options: dict[str, Any] = {"weights": {"a": 0.5, "c": -1.0}} if gate == "static" else {}
    own = fresh_adapters(model, gate, rank=16) if ranks else adapters
    mixture = some_mixture(model, own, gate, options)
    mixture.save(tmp_path / "m")
    with torch.no_grad():
        expected = model(tokens).logits
        mixture.remove()
        again = load_mixture(model, tmp_path / "m")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert again.adapters == tuple(own)
    assert again.options == mixture.options
    files = sorted(path.relative_to(tmp_path / "m").parts[0] for path in (tmp_path / "m").rglob("*") if path.is_file())
    assert set(files) == {"adapters", GATE_FILE}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_architectures(architecture: str, tmp_path: Path, tokens: Tensor) -> None:
    folder = save_model(tmp_path / "m", architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapters = read_adapters({n: save_adapter(folder, tmp_path / n, seed=i) for i, n in enumerate("xy")}, model)
    mixture = install_mixture(model, adapters, "arrow", {"k": 1})
    with torch.no_grad(), mixture.requests([RequestMixture.only("x")]):
        only = model(tokens).logits
    mixture.remove()
    with torch.no_grad():
        assert not torch.allclose(model(tokens).logits, only)


def gpt2() -> nn.Module:
    """A model without linear layers in its blocks."""
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))


def broken(adapters: Adapters, **change: Any) -> dict[str, dict[str, LayerAdapter]]:
    """With one part of adapter `b` changed."""
    copy = {name: dict(adapter) for name, adapter in adapters.items()}
    copy["b"][LAYER] = replace(copy["b"][LAYER], **change)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a": torch.zeros(2, 32)},
            r"adapter 'b', layer '\S+q_proj': ranks do not fit: A .* \[2, 32\], B",
        ),
        ({"a": torch.zeros(1, 48)}, "it maps 48 to 32 features, the layer 32 to 32: is this its base"),
        ({"b": torch.full((32, 1), torch.nan)}, "not finite"),
        ({"scale": float("nan")}, "its scale must be a finite number, got nan"),
    ],
)
def test_matrices_that_do_not_fit(change: dict[str, Any], message: str, model: nn.Module, adapters: Adapters) -> None:
    with pytest.raises(MixingError, match=message):
        install_mixture(model, broken(adapters, **change), "arrow")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, a: install_mixture(m, {}, "arrow"), "at least one adapter"),
        (lambda m, a: install_mixture(m, {"../x": a["a"]}, "arrow"), "also its folder's"),
        (lambda m, a: install_mixture(m, {"x": {}}, "arrow"), "changes no layer"),
        (lambda m, a: install_mixture(m, {"x": {"model.layers.9.q": a["a"][LAYER]}}, "arrow"), "no such layer"),
        (lambda m, a: install_mixture(m, {"x": {"model.norm": a["a"][LAYER]}}, "arrow"), "no linear layer"),
        (lambda m, a: install_mixture(m, a, "moe"), "no gate 'moe': choose one of mole"),
        (lambda m, a: install_mixture(m, a, "arrow", {"k": 5}), "k = 5 is more than the 4 adapters"),
        (lambda m, a: install_mixture(m, a, "arrow", {"top": 5}), "option 'top'.*its options are k, temperature"),
        (lambda m, a: install_mixture(m, a, "dynamic", {"top_p": 0}), "option 'top_p'.*greater than 0"),
        (lambda m, a: install_mixture(m, a, "static", {"weights": {"z": 1}}), "weights name 'z'"),
        (lambda m, a: install_mixture(m, a, "smora"), "ranks of one adapter, got 4"),
        (lambda m, a: install_mixture(m, {"b": a["b"]}, "smora"), "k = 8 is more than the 1 ranks"),
        (lambda m, a: new_adapters(m, rank=40), "rank 40 is more than the 32"),
        (lambda m, a: new_adapters(gpt2()), "there are .*; its Conv1D layers cannot be adapted"),
        (lambda m, a: new_adapters(m, experts=0), "at least 1"),
        (lambda m, a: new_adapters(m, targets=["query"]), "no linear layer fits targets.*q_proj"),
        (lambda m, a: read_adapters({"a": Path("/nowhere")}, m), "adapter 'a' in '/nowhere'"),
        (lambda m, a: load_mixture(m, Path("/nowhere")), "cannot be read"),
        (lambda m, a: [install_mixture(m, a, "arrow") for _ in range(2)], "remove it first"),
    ],
)
def test_what_cannot_be_is_refused(
    make: Callable[[nn.Module, Adapters], object], message: str, model: nn.Module, adapters: Adapters
) -> None:
    with pytest.raises(MixingError, match=message):
        make(model, adapters)


def test_a_gate_file_that_does_not_fit_leaves_the_model_alone(
    model: nn.Module, adapters: Adapters, tmp_path: Path
) -> None:
    mixture = some_mixture(model, adapters, "mola")
    mixture.save(tmp_path)
    mixture.remove()
    tensors = load_file(tmp_path / GATE_FILE)
    described = {"mixture": '{"gate": "mola", "options": {}, "adapters": ["a", "b", "c", "d"]}'}
    name = f"{LAYER}/weight"
    for changed, message in (
        (tensors | {name: torch.full_like(tensors[name], torch.inf)}, "expected finite"),
        (tensors | {name: tensors[name][:2].clone()}, r"is \[2, 32\]"),
        ({key: tensor for key, tensor in tensors.items() if key != name}, "in one of them only"),
    ):
        save_file(changed, tmp_path / GATE_FILE, metadata=described)
        with pytest.raises(MixingError, match=message):
            load_mixture(model, tmp_path)
        assert type(model.get_submodule(LAYER)) is nn.Linear
    save_file(tensors, tmp_path / GATE_FILE, metadata={"mixture": '{"gate": 3}'})
    with pytest.raises(MixingError, match="does not describe a mixture"):
        load_mixture(model, tmp_path)


@pytest.mark.parametrize(
    ("requests", "rows", "message"),
    [
        ([], None, "at least one request"),
        ([RequestMixture.only("z")], None, "no adapter 'z': there are a, b, c, d"),
        ([RequestMixture(weights={"a": float("nan")})], None, "weight of 'a' must be a finite number, got nan"),
        ([RequestMixture(bias={"a": float("inf")})], None, "bias of 'a'"),
        ([RequestMixture(weights={"a": 1.0}, bias={"b": 1.0})], None, "not both"),
        ([RequestMixture(weights={"a": 1.0}, load=GateLoad())], None, "where the gate decides"),
        ([RequestMixture()], torch.tensor([0, 1]), r"must be in \[0, 1\), got 0 to 1"),
        ([RequestMixture()], torch.tensor([0.0]), "must be integers"),
    ],
)
def test_wrong_requests_are_refused_when_they_are_set(
    requests: list[RequestMixture], rows: Tensor | None, message: str, model: nn.Module, adapters: Adapters
) -> None:
    state = install_mixture(model, adapters, "arrow").state
    with pytest.raises(MixingError, match=message):
        state.set(requests, request_of_token=rows)
    assert state.requests == 0


@pytest.mark.parametrize(
    ("gate", "wish", "message"),
    [
        (
            "smora",
            RequestMixture.only("expert-0"),
            "'smora' mixes the ranks of one adapter: a request has the gate, or",
        ),
        ("flylora", RequestMixture.only("expert-0"), "the gate, or the base alone"),
        ("smora", RequestMixture(bias={"expert-0": 1.0}), "takes no bias: a request has the gate, or the base alone"),
        ("smora", RequestMixture(load=GateLoad()), "among adapters"),
        (
            "static",
            RequestMixture(bias={"a": 1.0}),
            "takes no bias: a request has weights of its own, or those installed",
        ),
    ],
)
def test_wishes_that_the_gate_cannot_serve_are_refused(
    gate: str, wish: RequestMixture, message: str, model: nn.Module, adapters: Adapters
) -> None:
    own = adapters if gate == "static" else fresh_adapters(model, gate, rank=16)
    state = install_mixture(model, own, gate).state
    with pytest.raises(MixingError, match=message):
        state.set([RequestMixture(), wish])
    state.set([RequestMixture(), RequestMixture.base()])


def test_an_install_that_fails_half_way_leaves_the_model_alone(
    model: nn.Module, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def fail_late(self: MixedLoraLinear) -> Site:
        made.append(self)
        if len(made) == 5:
            raise MemoryError
        return site(self)

    site = MixedLoraLinear.site
    monkeypatch.setattr(MixedLoraLinear, "site", fail_late)
    with pytest.raises(MemoryError):
        install_mixture(model, adapters, "arrow")
    assert not any(isinstance(module, MixedLoraLinear) for module in model.modules())
    assert not model._forward_pre_hooks


def test_removing_a_trained_mixture_gives_back_what_learned(model: nn.Module, adapters: Adapters) -> None:
    model.model.embed_tokens.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    mixture = some_mixture(model, adapters, "mixlora")
    mixture.prepare_training()
    mixture.prepare_training()
    mixture.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_gates_nan_is_an_error_and_no_answer(model: nn.Module, adapters: Adapters, tokens: Tensor) -> None:
    from kernels import MixtureError

    mixture = some_mixture(model, adapters, "mixlora")
    with torch.no_grad():
        mixture.gates[LAYER].weight[0, 0] = torch.nan
        with pytest.raises(MixtureError, match="NaN"):
            model(tokens)


def test_saved_adapters_keep_ranks_and_scales(model: nn.Module, adapters: Adapters, tmp_path: Path) -> None:
    mixed = {"one": dict(adapters["a"]), "two": dict(adapters["c"])}
    other = new_adapters(model, experts=1, rank=2, alpha=7, targets=["q_proj"])["expert-0"]
    mixed["one"] |= other  # q_proj has another rank and scale than the rest
    some_mixture(model, mixed, "static").save(tmp_path)
    back = read_adapters({"one": tmp_path / "adapters" / "one"}, AutoModelForCausalLM.from_config(model.config))
    for layer, part in mixed["one"].items():
        read = back["one"][layer]
        assert read.a.shape == part.a.shape
        if layer not in other:
            torch.testing.assert_close(read.b, part.b * part.scale)
