"""The same mixtures as PEFT makes them: Arrow, `adapter_names`, and merging by concatenation."""

from __future__ import annotations

import pytest
import torch
from mixtures import error
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn

from kernels import AdapterStack, mixed_lora, route

NAMES = ["one", "two", "three"]


class Tiny(nn.Module):
    """A base model of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.fixture
def model() -> LoraModel:
    torch.manual_seed(0)
    configs = [LoraConfig(r=4, lora_alpha=8 + i, target_modules=["linear"], init_lora_weights=False) for i in range(3)]
    peft = get_peft_model(Tiny(), configs[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], configs[1:], strict=True):
        peft.add_adapter(name, config)
    return peft.base_model.eval()


def packed(model: LoraModel) -> AdapterStack:
    layer = model.model.linear
    adapters = [[(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach())] for name in NAMES]
    return AdapterStack.pack(adapters, [layer.scaling[name] for name in NAMES])


def test_one_adapter_for_each_row_equals_adapter_names(model: LoraModel) -> None:
    x, rows = torch.randn(5, 24), [2, 0, 1, 1, 2]
    expected = model.model.linear(x, adapter_names=[NAMES[e] for e in rows])
    base = model.model.linear.base_layer(x)
    y = mixed_lora(x, packed(model), torch.tensor(rows)[:, None], torch.ones(5, 1), base=base)
    assert error(y, expected.double()) < 1e-5


def test_constant_weights_equal_merging_by_concatenation(model: LoraModel) -> None:
    weights, x = [0.5, 0.2, 1.3], torch.randn(6, 24)
    model.add_weighted_adapter(NAMES, weights, "merged", combination_type="cat")
    model.set_adapter("merged")
    expected, base = model.model.linear(x), model.model.linear.base_layer(x)
    indices = torch.arange(3).expand(6, 3)
    y = mixed_lora(x, packed(model), indices, torch.tensor(weights).expand(6, 3), base=base)
    assert error(y, expected.double()) < 1e-5


def test_arrow_on_the_same_prototypes_equals_peft(model: LoraModel) -> None:
    layer, stack, x = model.model.linear, packed(model), torch.randn(7, 24)
    config = ArrowConfig(top_k=2, router_temperature=0.7)
    config.task_adapter_names = []
    arrow = ArrowLoraLinearLayer(24, config)
    arrow.on_adapter_change(layer.lora_A, layer.lora_B)
    arrow.build_prototypes(layer.lora_A, layer.lora_B)
    expected = arrow(x, layer.lora_A, layer.lora_B, dropout=nn.Identity(), scaling=layer.scaling)
    indices, weights, _ = route((x @ arrow.prototypes.T).abs() / 0.7, 2)
    assert arrow.task_adapter_names == NAMES
    assert error(mixed_lora(x, stack, indices, weights), expected.detach().double()) < 1e-5
