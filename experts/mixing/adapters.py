"""Adapters as matrices for each linear layer: read from PEFT's files, made anew, written as PEFT's files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from experts.errors import ExpertConfigError, MixingError
from experts.local.lora import read_adapter

_MLP = re.compile(r"(^|\.)(\w*mlp\w*|feed_forward|ffn|ff|intermediate|output|fc\d?|lin\d|w[123]|dense_\w+)(\.|$)")
_ATTENTION = re.compile(r"(^|\.)\w*att\w*(\.|$)")


@dataclass(frozen=True, slots=True, eq=False)
class LayerAdapter:
    """One adapter's part for one linear layer: it adds scale * B A x."""

    a: Tensor  # [r, d]
    b: Tensor  # [o, r]
    scale: float = 1.0  # alpha / r


Project = Callable[[int, int, torch.Generator], Tensor]

Adapter = Mapping[str, LayerAdapter]
"""An adapter: layer name -> its part."""


def read_adapters(folders: Mapping[str, Path], model: nn.Module) -> dict[str, dict[str, LayerAdapter]]:
    """PEFT LoRA adapters by name, for `model`, which must be as it was loaded. Raises `MixingError`."""
    adapters = {}
    for name, folder in folders.items():
        try:
            weights = read_adapter(folder, model)
        except ExpertConfigError as error:
            raise MixingError(f"adapter {name!r} in {str(folder)!r}: {error}") from error
        adapters[name] = {
            layer: LayerAdapter(part.a.float(), part.b.float(), part.scale) for layer, part in weights.items()
        }
    return adapters


def new_adapters(
    model: nn.Module,
    *,
    experts: int | Sequence[int] = 8,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    mlp_only: bool = False,
    seed: int = 0,
    project: Project | None = None,
) -> dict[str, dict[str, LayerAdapter]]:
    """Adapters `expert-0`, `expert-1` ... that add nothing yet (B is zero), to be trained.

    Args:
        experts: How many; several numbers are for successive parts of the model's depth, as in MoLA.
        rank: Of each adapter in each layer.
        alpha: The scale is alpha / rank; by default 2 * rank.
        targets: Last parts of layer names, such as `q_proj`; by default all linear layers of the transformer's blocks.
        mlp_only: Leave attention layers out.
        project: Makes each A [rank, features] from a generator; by default uniform within 1 / sqrt(features).
    """
    counts = [experts] if isinstance(experts, int) else list(experts)
    if rank < 1 or not counts or min(counts) < 1:
        raise MixingError(f"rank and numbers of experts must be at least 1, got {rank!r} and {experts!r}")
    layers = target_layers(model, targets, mlp_only=mlp_only)
    scale = (2 * rank if alpha is None else alpha) / rank
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, dict[str, LayerAdapter]] = {f"expert-{e}": {} for e in range(max(counts))}
    for name, layer in layers.items():
        if rank > min(layer.in_features, layer.out_features):
            width = min(layer.in_features, layer.out_features)
            raise MixingError(f"rank {rank} is more than the {width} that layer {name!r} can have")
        for e in range(_count(counts, name, layers)):
            a = (project or _uniform)(rank, layer.in_features, generator)
            made[f"expert-{e}"][name] = LayerAdapter(a, torch.zeros(layer.out_features, rank), scale)
    return {name: adapter for name, adapter in made.items() if adapter}


def _uniform(rank: int, features: int, generator: torch.Generator) -> Tensor:
    uniform = torch.empty(rank, features).uniform_(-1, 1, generator=generator)
    return uniform * float(features**-0.5)


def target_layers(
    model: nn.Module, targets: Sequence[str] | None = None, *, mlp_only: bool = False
) -> dict[str, nn.Linear]:
    """The linear layers of the transformer's numbered blocks, all or those named by their last part."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and depth_of(n) is not None}
    found = {n: m for n, m in linears.items() if targets is None or n.rpartition(".")[2] in targets}
    if mlp_only:
        found = {n: m for n, m in found.items() if _MLP.search(n) and not _ATTENTION.search(n)}
    if not found:
        known = sorted({name.rpartition(".")[2] for name in linears})
        raise MixingError(f"no linear layer fits targets {targets!r} (MLP only: {mlp_only}); there are {known!r}")
    return found


def depth_of(layer: str) -> int | None:
    """The number of the block that a layer lies in: the first number in its name."""
    numbers = [int(part) for part in layer.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def _count(counts: Sequence[int], layer: str, layers: Mapping[str, nn.Linear]) -> int:
    depth = 1 + max(depth_of(name) or 0 for name in layers)
    return counts[(depth_of(layer) or 0) * len(counts) // depth]


def check_adapters(adapters: Mapping[str, Adapter], model: nn.Module) -> None:
    """Raise `MixingError` unless every adapter has a fitting, finite part for some linear layers of the model."""
    if not adapters:
        raise MixingError("give at least one adapter")
    for name, adapter in adapters.items():
        if not name or "/" in name or name.startswith("."):
            raise MixingError(f"an adapter's name is also its folder's: {name!r} will not do")
        if not adapter:
            raise MixingError(f"adapter {name!r} changes no layer")
        for layer, part in adapter.items():
            try:
                _check_part(part, model, layer)
            except MixingError as error:
                raise MixingError(f"adapter {name!r}, layer {layer!r}: {error}") from None


def _check_part(part: LayerAdapter, model: nn.Module, layer: str) -> None:
    try:
        linear = model.get_submodule(layer)
    except AttributeError:
        raise MixingError("the model has no such layer: is this its base?") from None
    if not isinstance(linear, nn.Linear):
        raise MixingError(f"it is no linear layer, but {type(linear).__name__}")
    a, b = tuple(part.a.shape), tuple(part.b.shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
        raise MixingError(f"ranks do not fit: A [r, d] is {list(a)}, B [o, r] is {list(b)}")
    if (a[1], b[0]) != (linear.in_features, linear.out_features):
        shapes = f"{a[1]} to {b[0]} features, the layer {linear.in_features} to {linear.out_features}"
        raise MixingError(f"it maps {shapes}: is this its base?")
    if not bool(part.a.isfinite().all() and part.b.isfinite().all()):
        raise MixingError("its matrices hold numbers that are not finite")


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """One adapter in PEFT's format, in the dtype that it has."""
    from peft import LoraConfig

    ranks = {layer: part.a.shape[0] for layer, part in adapter.items()}
    alphas = {layer: part.scale * part.a.shape[0] for layer, part in adapter.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={re.escape(layer): r for layer, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(layer): a for layer, a in alphas.items() if a != alpha},
        target_modules=sorted(adapter),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {}
    for layer, part in adapter.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = part.a.detach().contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = part.b.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
