"""Adapters beside PEFT's own layers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from experts.errors import ExpertConfigError
from experts.local.lora import read_adapter
from experts.local.mixture import BASE, Mixture, plan_for
from experts.local.pool import Adapter, AdapterPool, adapter_of
from experts.local.sites import LinearLayers, install_sites
from tests.experts.models import save_model

TOKENS = torch.arange(40).view(4, 10)


CPU = torch.device("cpu")


class Served:
    """A model with sites, and adapters on it."""

    def __init__(self, base: Path, adapters: list[Path], slots: int = 4) -> None:
        self.network = AutoModelForCausalLM.from_pretrained(base)
        sites, self.linears, self.current = install_sites(self.network, slots)
        self.pool = AdapterPool(sites, slots)
        self.adapters = [self.read(path, sites) for path in adapters]

    def read(self, path: Path, sites: Any) -> Adapter:
        return adapter_of(path.name, read_adapter(path, self.linears), sites.values())

    def logits(self, *rows: Mixture, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
        wanted = [adapter for row in rows for adapter in row.adapters]
        assert self.pool.fits(wanted)
        self.pool.acquire(wanted)
        self.current.set(plan_for(rows, tokens.shape[1], self.pool, CPU))
        with torch.inference_mode():
            logits: torch.Tensor = self.network(tokens[: len(rows)]).logits
        self.pool.release(wanted)
        return logits

    def only(self, i: int) -> Mixture:
        return Mixture(weights=[(self.adapters[i], 1.0)])


def reference(base: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_each_row_has_its_own_adapter_and_it_is_pefts(llama: Path, adapters: list[Path]) -> None:
    served = Served(llama, adapters)
    rows = [2, None, 0, 1]
    mixed = served.logits(*(BASE if i is None else served.only(i) for i in rows))
    for row, i in enumerate(rows):
        tokens = TOKENS[row : row + 1]
        expected = reference(llama, None if i is None else adapters[i])(tokens).logits
        close(served.logits(BASE if i is None else served.only(i), tokens=tokens), expected)
        close(mixed[row : row + 1], expected)


def test_a_static_mixture_is_pefts_weighted_sum(llama: Path, adapters: list[Path]) -> None:
    served = Served(llama, adapters)
    mixture = Mixture(weights=[(served.adapters[0], 0.7), (served.adapters[2], -0.3)])
    model = reference(llama, adapters[0])
    model.load_adapter(adapters[2], "three")
    model.add_weighted_adapter(["default", "three"], [0.7, -0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    mixed = served.logits(BASE, mixture, served.only(0))
    close(mixed[1:2], model(TOKENS[1:2]).logits)
    model.set_adapter("default")
    close(mixed[2:3], model(TOKENS[2:3]).logits)


def test_adapters_take_turns_in_few_slots(llama: Path, adapters: list[Path]) -> None:
    """Ranks differ, so a slot's rows are those of its adapter alone, and a larger rank makes new room for all."""
    served = Served(llama, adapters, slots=2)
    expected = [reference(llama, path)(TOKENS[:1]).logits for path in adapters]
    for i in (0, 1, 2, 0, 2, 1):
        close(served.logits(served.only(i), tokens=TOKENS[:1]), expected[i])
    assert (served.pool.resident, served.pool.loads, served.pool.hits) == (2, 5, 1)


def test_adapters_in_use_stay_and_the_least_recently_used_go(llama: Path, adapters: list[Path]) -> None:
    served = Served(llama, adapters, slots=2)
    one, two, three = served.adapters
    pool = served.pool
    pool.acquire([one])
    pool.acquire([two])
    assert not pool.fits([three])
    pool.release([two])
    pool.acquire([three])
    assert pool.slot(one) != pool.slot(three)
    assert not pool.fits([two, three])
    pool.release([three])
    pool.release([one])
    pool.acquire([one])
    pool.release([one])
    pool.acquire([two])
    assert pool.slot(one) != pool.slot(two)
    pool.forget(one)
    assert pool.resident == 1


def test_an_adapter_that_cannot_be_copied_leaves_the_others_as_they_are(
    llama: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails midway, after the first sites have made room for its larger rank."""
    served = Served(llama, adapters, slots=3)
    expected = served.logits(served.only(0), served.only(2))
    last = list(served.pool._sites.values())[-2]  # down_proj of the last block

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(last, "write", fail)
        with pytest.raises(torch.OutOfMemoryError):
            served.pool.acquire([served.adapters[1]])
    assert (served.pool.resident, len(served.pool._free), len(served.pool._pins)) == (2, 1, 0)
    close(served.logits(served.only(0), served.only(2)), expected)
    close(served.logits(served.only(1), tokens=TOKENS[:1]), reference(llama, adapters[1])(TOKENS[:1]).logits)


def test_a_layer_that_sees_other_tokens_than_those_of_the_pass_is_refused(llama: Path, adapters: list[Path]) -> None:
    """As one in a mixture of experts does: it cannot be known whose adapter is whose."""
    served = Served(llama, adapters)
    served.pool.acquire([served.adapters[0]])
    plan = plan_for([served.only(0), BASE], 4, served.pool, CPU)
    assert plan.for_tokens(8) is plan
    assert plan.for_tokens(2).tokens == 2
    with pytest.raises(ValueError, match="sees 4 tokens of 8 in 2 rows"):
        plan.for_tokens(4)


def test_matrices_of_different_dtypes_lose_nothing(llama: Path, adapters: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(adapters[0], folder)
    _tensors(lambda t: t.update({name: t[name].bfloat16() for name in t if "lora_A" in name}))(folder)
    served = Served(llama, [folder])
    mixed = served.logits(served.only(0), tokens=TOKENS[:1])
    torch.testing.assert_close(mixed, reference(llama, folder)(TOKENS[:1]).logits, rtol=1e-4, atol=1e-4)


def test_the_base_is_untouched_by_its_adapters(llama: Path, adapters: list[Path]) -> None:
    before = reference(llama)(TOKENS).logits
    served = Served(llama, adapters)
    for mixture in (BASE, served.only(0), BASE):
        after = served.logits(*[mixture] * 4)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    skeleton = served.linears.skeleton()
    assert skeleton.get_submodule("model.layers.0.mlp.up_proj") is served.linears.by_name["model.layers.0.mlp.up_proj"]
    assert isinstance(served.linears, LinearLayers)


Break = Callable[[Path], None]


def _config(**change: object) -> Break:
    def change_config(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return change_config


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Break:
    def change_tensors(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return change_tensors


def _first(tensors: dict[str, torch.Tensor], side: str) -> str:
    return next(name for name in tensors if f"lora_{side}" in name)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_config(use_dora=True), "use_dora"),
        (_config(bias="all"), "bias"),
        (_config(modules_to_save=["lm_head"]), "modules_to_save"),
        (_config(init_lora_weights="pissa"), "pissa"),
        (_config(peft_type="IA3"), "LoRA"),
        (lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), "cannot be read"),
        (_config(r=8), "shape"),
        (_config(r="four"), "r 'four'"),
        (_config(r=True), "r True"),
        (_config(r=100_000), "r 100000 must be 1 to 512"),
        (_config(lora_alpha=float("nan")), "alpha nan is not finite"),
        (_config(lora_alpha=1e300), r"alpha 1e\+300 is not finite, or far too large"),
        (_config(lora_alpha=10**400), "lora_alpha"),
        (_config(rank_pattern=["q_proj"]), "rank_pattern must be an object"),
        (_config(rank_pattern={"q_proj": "x"}), "rank_pattern must be an object"),
        (_config(rank_pattern={"(": 4}), "no regular expression"),
        (_config(alpha_pattern={"q_proj": None}), "alpha_pattern must be an object"),
        (_tensors(lambda t: t.update({name: side.to(torch.int8) for name, side in t.items()})), "of torch.int8"),
        (
            _tensors(lambda t: t.update({name: side.to(torch.float8_e4m3fn) for name, side in t.items()})),
            "of torch.float8",
        ),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"adapter_config\.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"junk"), r"adapter_model\.safetensors"),
        (_tensors(lambda t: t.__delitem__(_first(t, "B"))), "has only lora_A"),
        (_tensors(lambda t: t.update({_first(t, "A"): t[_first(t, "A")] * float("nan")})), "not finite"),
        (_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)})), "no LoRA weight"),
        (_tensors(lambda t: t.update({"base_model.model.nowhere.lora_A.weight": torch.ones(1)})), "nowhere"),
        (_tensors(lambda t: t.clear()), "empty"),
    ],
)
def test_a_wrong_adapter_is_refused(
    llama: Path, adapters: list[Path], tmp_path: Path, damage: Break, complaint: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    damage(folder)
    with pytest.raises(ExpertConfigError, match=complaint):
        read_adapter(folder, AutoModelForCausalLM.from_pretrained(llama))


def test_an_adapter_of_another_base_is_refused(llama: Path, adapters: list[Path], tmp_path: Path) -> None:
    gpt2 = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "gpt2"))
    with pytest.raises(ExpertConfigError, match="is this its base"):
        read_adapter(adapters[0], gpt2)
