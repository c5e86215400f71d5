"""LoRA adapters (arXiv 2106.09685) in PEFT's file format: read and checked against the layers that they change."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from experts.errors import ExpertConfigError

NO_ADAPTER = -1
MOST_RANK = 512
"""A rank beyond is a mistake, or an attack: room for it would be made in every slot."""

_MOST_SCALE = 1e6
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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
    """One adapter's matrices for one linear layer, in the file's dtype: it adds scale * B A x."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float  # alpha / r


class HasLayers(Protocol):
    """A model, or whatever else has its linear layers under their names."""

    def get_submodule(self, target: str) -> nn.Module:
        """The layer of that name. Raises `AttributeError`."""
        ...


def read_adapter(folder: Path, model: HasLayers) -> dict[str, LoraWeights]:
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
    except (OSError, ValueError, RecursionError) as error:
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
    if not _is_rank(rank) or not _is_number(alpha):
        message = f"r {rank!r} must be 1 to {MOST_RANK}, and lora_alpha {alpha!r} a number"
        raise ExpertConfigError(f"adapter_config.json: {message}")
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        _check_pattern(name, config.get(name), fits)
    return config


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_RANK


def _is_number(value: object) -> bool:
    """Whether it is a number that a float can hold; NaN and infinity are refused with the scale that they make."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float)


def _check_pattern(name: str, pattern: object, fits: Callable[[object], bool]) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, dict) or not all(map(fits, pattern.values())):
        raise ExpertConfigError(f"adapter_config.json: {name} must be an object of layers with fitting numbers")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise ExpertConfigError(f"adapter_config.json: {name} {key!r} is no regular expression: {error}") from error


def _layer_weights(name: str, pair: Mapping[str, Tensor], model: HasLayers, config: Mapping[str, Any]) -> LoraWeights:
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
        if tensor.dtype not in _DTYPES:
            raise ExpertConfigError(f"layer {name!r}: lora_{side} is of {tensor.dtype}, which no LoRA weight is")
        if not bool(torch.isfinite(tensor).all()):
            raise ExpertConfigError(f"layer {name!r}: lora_{side} holds numbers that are not finite")
    alpha = float(_for_layer(config.get("alpha_pattern"), name, config["lora_alpha"]))
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if not abs(scale) <= _MOST_SCALE:  # NaN is not
        raise ExpertConfigError(f"layer {name!r}: alpha {alpha!r} is not finite, or far too large")
    return LoraWeights(pair["A"], pair["B"], scale)


def _for_layer(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of PEFT's `rank_pattern` or `alpha_pattern` for a layer: the first key that its name ends with."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default
