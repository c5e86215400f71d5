"""LoRA adapters (arXiv 2106.09685) in PEFT's file format, all of them in memory beside one base.

PEFT's own layers hold one active adapter, and changing it walks the whole model (11 ms for a 6-layer model, twice a
decoding step); here each row of a batch has its own. A linear layer keeps all adapters' matrices side by side:

    y = x W^T + ((x A^T) * [rank belongs to the row's adapter]) B       A [R, in], B [R, out], R the sum of all ranks

and, where all rows have the same adapter, multiplies with its slices alone. The scale is folded into B.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from experts.errors import ExpertConfigError

NO_ADAPTER = -1

_UNSUPPORTED = (
    "use_dora",
    "bias",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")  # initialisations that train against a changed base
_WEIGHT = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter's matrices for one linear layer: `a` [r, in], `b` [r, out] with the scale in it."""

    a: Tensor
    b: Tensor


class AdapterChoice:
    """Which adapter each row of the coming forward pass uses; all layers of a model look here."""

    def __init__(self) -> None:
        self.all = NO_ADAPTER
        self.rows: Tensor | None = None

    def set(self, adapters: Sequence[int], device: torch.device) -> None:
        """One adapter for each row of the batch."""
        self.all = adapters[0]
        mixed = any(adapter != self.all for adapter in adapters)
        self.rows = torch.tensor(adapters, device=device).view(-1, 1, 1) if mixed else None


class LoraLinear(nn.Module):
    """A linear layer with the adapters that change it. Input [B, T, in], output [B, T, out]."""

    def __init__(self, base: nn.Linear, adapters: Mapping[int, LoraWeights], choice: AdapterChoice) -> None:
        super().__init__()
        ranks = [one.a.shape[0] for one in adapters.values()]
        self.weight, self.bias = base.weight, base.bias
        self._choice = choice
        self._a = torch.cat([one.a for one in adapters.values()]).to(base.weight)
        self._b = torch.cat([one.b for one in adapters.values()]).to(base.weight)
        owners = torch.tensor(list(adapters), device=base.weight.device)
        self._owners = owners.repeat_interleave(torch.tensor(ranks, device=base.weight.device))
        slices = zip(torch.split(self._a, ranks), torch.split(self._b, ranks), strict=True)
        self._slices = dict(zip(adapters, slices, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus that of each row's adapter."""
        y = linear(x, self.weight, self.bias)
        rows = self._choice.rows
        if rows is not None:
            return self._add(y, linear(x, self._a) * (rows == self._owners), self._b)
        if (own := self._slices.get(self._choice.all)) is not None:
            return self._add(y, linear(x, own[0]), own[1])
        return y

    @staticmethod
    def _add(y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b).view(y.shape)


def install_adapters(model: nn.Module, adapters: Sequence[Mapping[str, LoraWeights]]) -> AdapterChoice:
    """Put adapters (for each: layer name -> matrices) on a model. Row index i of a choice means `adapters[i]`."""
    choice = AdapterChoice()
    for name in sorted({name for adapter in adapters for name in adapter}):
        layer = model.get_submodule(name)
        own = {i: adapter[name] for i, adapter in enumerate(adapters) if name in adapter}
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(cast("nn.Linear", layer), own, choice))
    return choice


def read_adapter(folder: Path, model: nn.Module) -> dict[str, LoraWeights]:
    """The matrices of a PEFT adapter for each linear layer of `model` that it changes.

    Raises `ExpertConfigError` unless it is a plain LoRA adapter in safetensors, its layers are linear layers of the
    model, shapes and ranks fit, and all numbers are finite.
    """
    config = _read_config(folder)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ExpertConfigError(f"adapter_model.safetensors cannot be read: {error}") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _WEIGHT.match(key)
        if not match:
            raise ExpertConfigError(f"{key!r} is no LoRA weight of a linear layer")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise ExpertConfigError("adapter_model.safetensors is empty")
    return {name: _layer_weights(name, pair, model, config) for name, pair in sides.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExpertConfigError(f"adapter_config.json cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ExpertConfigError("adapter_config.json does not describe a LoRA adapter (peft_type)")
    for name in _UNSUPPORTED:
        if config.get(name) not in (None, False, "none", [], {}):
            raise ExpertConfigError(f"adapter_config.json: {name} {config[name]!r} is not supported, plain LoRA is")
    if _CHANGES_BASE.match(str(config.get("init_lora_weights"))):
        init = config["init_lora_weights"]
        raise ExpertConfigError(f"adapter_config.json: init_lora_weights {init!r} needs a changed base")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ExpertConfigError(f"adapter_config.json: r {rank!r} and lora_alpha {alpha!r} must be positive numbers")
    return config


def _layer_weights(name: str, pair: Mapping[str, Tensor], model: nn.Module, config: Mapping[str, Any]) -> LoraWeights:
    if pair.keys() != {"A", "B"}:
        raise ExpertConfigError(f"layer {name!r} has only lora_{next(iter(pair))}")
    try:
        linear = model.get_submodule(name)
    except AttributeError as error:
        raise ExpertConfigError(f"the base has no layer {name!r}: is this its base?") from error
    if type(linear) is not nn.Linear:
        raise ExpertConfigError(f"layer {name!r} of the base is no linear layer, but {type(linear).__name__}")
    rank = int(_for_layer(config.get("rank_pattern"), name, config["r"]))
    expected = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
    for side, tensor in pair.items():
        if tuple(tensor.shape) != expected[side]:
            shapes = f"{list(tensor.shape)}, not {list(expected[side])}"
            raise ExpertConfigError(f"layer {name!r}: lora_{side} has shape {shapes}: is this its base, is r right?")
        if not bool(torch.isfinite(tensor).all()):
            raise ExpertConfigError(f"layer {name!r}: lora_{side} holds numbers that are not finite")
    alpha = float(_for_layer(config.get("alpha_pattern"), name, config["lora_alpha"]))
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraWeights(pair["A"].float(), pair["B"].float().t() * scale)


def _for_layer(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of PEFT's `rank_pattern` or `alpha_pattern` for a layer: the first key that its name ends with."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default
