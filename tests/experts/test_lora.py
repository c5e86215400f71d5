"""Adapters beside PEFT's own layers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from experts.errors import ExpertConfigError
from experts.local.lora import NO_ADAPTER, install_adapters, read_adapter
from tests.experts.models import save_model

TOKENS = torch.arange(40).view(4, 10)


def test_each_row_has_its_own_adapter_and_it_is_pefts(llama: Path, adapters: list[Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    choice = install_adapters(model, [read_adapter(path, model) for path in adapters])
    rows = [2, NO_ADAPTER, 0, 1]
    choice.set(rows, torch.device("cpu"))
    mixed = model(TOKENS).logits
    for row, adapter in enumerate(rows):
        reference = AutoModelForCausalLM.from_pretrained(llama)
        if adapter != NO_ADAPTER:
            reference = PeftModel.from_pretrained(reference, adapters[adapter])
        expected = reference(TOKENS[row : row + 1]).logits[0]
        choice.set([adapter], torch.device("cpu"))
        alone = model(TOKENS[row : row + 1]).logits[0]
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-4)


def test_the_base_is_untouched_by_its_adapters(llama: Path, adapters: list[Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    before = model(TOKENS).logits
    install_adapters(model, [read_adapter(path, model) for path in adapters])
    assert torch.equal(model(TOKENS).logits, before)


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
        (_config(r=8), "shape"),
        (_config(r="four"), "r 'four'"),
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
