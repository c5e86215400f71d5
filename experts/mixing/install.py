"""Putting a mixture into a model by one call, taking it out again, and its files.

A saved mixture is a folder: `adapters/NAME/` for each adapter, in PEFT's format, and `gate.safetensors`, whose tensors
are the gates' and whose metadata says which method, with which options, over which adapters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from experts.errors import MixingError
from experts.mixing.adapters import Adapter, LayerAdapter, check_adapters, new_adapters, read_adapters, write_adapter
from experts.mixing.balance import BalanceRule, Record
from experts.mixing.gate import Gate, GateOptions
from experts.mixing.gates import DynamicGate, DynMoleGate, LlavaMoleGate, MixLoraGate, MolaGate, StaticGate
from experts.mixing.layer import Decision, MixedLoraLinear, RankLoraLinear
from experts.mixing.post_hoc import ArrowGate, GliderGate, MoleGate, PhatgooseGate
from experts.mixing.rank_gates import FlyLoraGate, FlyLoraOptions, RankGate, SmoraGate, sparse_projection
from experts.mixing.state import MixingState, RequestMixture

GATES: dict[str, type[Gate]] = {
    gate.method: gate
    for gate in (
        MoleGate,
        MixLoraGate,
        MolaGate,
        DynMoleGate,
        LlavaMoleGate,
        DynamicGate,
        ArrowGate,
        PhatgooseGate,
        GliderGate,
        SmoraGate,
        FlyLoraGate,
        StaticGate,
    )
}
GATE_FILE = "gate.safetensors"


class _Description(BaseModel):
    """The metadata of a gate file."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    gate: str
    options: dict[str, Any]
    adapters: list[str]


class Mixture:
    """A model whose linear layers mix adapters. `remove` gives the model back as it was."""

    def __init__(
        self, model: nn.Module, gate: type[Gate], options: GateOptions, adapters: Mapping[str, Adapter]
    ) -> None:
        self.model, self.gate, self.options = model, gate, options
        self.adapters = tuple(adapters)
        device = next(model.parameters()).device
        self.state = MixingState(self.adapters, device)
        self.layers = _install(model, gate, options, adapters, self.state)
        self._decisions = list({id(layer._decision): layer._decision for layer in self.layers.values()}.values())
        self._hook = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.installed = True

    @property
    def gates(self) -> dict[str, Gate]:
        """Each gate by the layer that it belongs to; that of a block belongs to the block's first adapted layer."""
        return {decision.name: decision.gate for decision in self._decisions if decision.gate is not None}

    @property
    def rule(self) -> BalanceRule:
        """The method's auxiliary loss."""
        return next(iter(self.gates.values())).rule

    @contextmanager
    def requests(self, requests: Sequence[RequestMixture], *, request_of_token: Tensor | None = None) -> Iterator[None]:
        """What the forward passes within hold; see `MixingState.set`."""
        self.state.set(requests, request_of_token=request_of_token)
        try:
            yield
        finally:
            self.state.clear()

    @contextmanager
    def recording(self) -> Iterator[list[Record]]:
        """Within, each forward pass leaves what its gates decided in the list, in place of the pass before."""
        self.state.recording = True
        try:
            yield self.state.records
        finally:
            self.state.recording = False

    def prepare_training(self) -> list[nn.Parameter]:
        """Freeze the model but for what the method learns, which is returned."""
        self.model.requires_grad_(False)
        learned = list(self._learned())
        for parameter in learned:
            parameter.requires_grad_(True)
        return learned

    def remove(self) -> None:
        """Put the model's own layers back."""
        if self.installed:
            self._hook.remove()
            for name, layer in self.layers.items():
                _replace(self.model, name, layer.base_layer)
            self.installed = False

    def adapter(self, name: str) -> dict[str, LayerAdapter]:
        """A copy of an adapter's matrices as they are now."""
        number = self.adapters.index(name)
        return {n: layer.part(number) for n, layer in self.layers.items() if number in layer.adapters}

    def save(self, folder: Path) -> None:
        """Write the adapters and the gate file."""
        for name in self.adapters:
            write_adapter(self.adapter(name), folder / "adapters" / name)
        described = _Description(
            gate=self.gate.method, options=self.options.model_dump(mode="json"), adapters=list(self.adapters)
        )
        tensors = {
            f"{name}/{key}": tensor.detach().float().contiguous()
            for name, gate in self.gates.items()
            for key, tensor in gate.state_dict().items()
        }
        save_file(tensors, folder / GATE_FILE, metadata={"mixture": described.model_dump_json()})

    def _learned(self) -> Iterator[nn.Parameter]:
        if self.gate.learns in ("gate", "gate and adapters"):
            for gate in self.gates.values():
                yield from gate.parameters()
        for layer in self.layers.values():
            if self.gate.learns == "gate and adapters":
                yield layer.A
            if self.gate.learns in ("gate and adapters", "adapters' B"):
                yield layer.B

    def begin_pass(self) -> None:
        """A new pass: nothing is decided yet. A forward pass of the model does this by itself."""
        self.state.records.clear()
        for decision in self._decisions:
            decision.routing = None

    def _begin(self, _module: nn.Module, _args: Any, kwargs: Any) -> None:
        self.begin_pass()
        mask = kwargs.get("attention_mask") if self.state.recording else None
        self.state.counted = None if mask is None or mask.dim() != 2 else mask.flatten() > 0


def install_mixture(
    model: nn.Module, adapters: Mapping[str, Adapter], gate: str, options: Mapping[str, Any] | None = None
) -> Mixture:
    """Make a transformers model mix `adapters` by the method `gate`; all else of the model stays as it is.

    Args:
        model: Any model whose adapted layers are linear layers.
        adapters: Name -> layer -> matrices, from `read_adapters` or `new_adapters`. They may have different ranks and
            layers.
        gate: One of `GATES`.
        options: Of the method; by default its paper's.

    Raises `MixingError` for what does not fit, before the model is touched.
    """
    kind, own = gate_type(gate), gate_options(gate, options)
    if any(isinstance(module, MixedLoraLinear) for module in model.modules()):
        raise MixingError("the model has a mixture already: remove it first")
    check_adapters(adapters, model)
    _check_gate(kind, own, adapters)
    return Mixture(model, kind, own, adapters)


def fresh_adapters(
    model: nn.Module,
    gate: str,
    options: Mapping[str, Any] | None = None,
    *,
    experts: int | Sequence[int] | None = None,
    rank: int | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, LayerAdapter]]:
    """New adapters as the method `gate` wants them; numbers, ranks and layers are its paper's unless they are given."""
    kind, own = gate_type(gate), gate_options(gate, options)
    counts, usual_rank = kind.fresh
    rank = usual_rank if rank is None else rank
    project = partial(sparse_projection, density=own.density) if isinstance(own, FlyLoraOptions) else None
    return new_adapters(
        model,
        experts=counts if experts is None else experts,
        rank=rank,
        alpha=kind.alpha * rank,
        targets=targets,
        mlp_only=kind.mlp_only and targets is None,
        seed=seed,
        project=project,
    )


def load_mixture(model: nn.Module, folder: Path) -> Mixture:
    """Install a saved mixture. Raises `MixingError` where files are missing, malformed or of another base."""
    described, tensors = _read_gate_file(folder / GATE_FILE)
    adapters = read_adapters({name: folder / "adapters" / name for name in described.adapters}, model)
    mixture = install_mixture(model, adapters, described.gate, described.options)
    try:
        _load_gates(mixture, tensors)
    except MixingError:
        mixture.remove()
        raise
    return mixture


def gate_type(name: str) -> type[Gate]:
    """The gate of that name. Raises `MixingError`."""
    if name not in GATES:
        raise MixingError(f"no gate {name!r}: choose one of {', '.join(GATES)}")
    return GATES[name]


def gate_options(name: str, options: Mapping[str, Any] | None) -> GateOptions:
    """A method's options, checked. Raises `MixingError`."""
    kind = gate_type(name).options_type
    try:
        return kind.model_validate(dict(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MixingError(
            f"gate {name!r}, option {where!r}: {first['msg']}; its options are {', '.join(kind.model_fields) or 'none'}"
        ) from error


def _check_gate(kind: type[Gate], options: GateOptions, adapters: Mapping[str, Adapter]) -> None:
    fewest = min(len(layers) for layers in _by_layer(adapters).values())
    k = getattr(options, "k", 1)
    if issubclass(kind, RankGate):
        if len(adapters) != 1:
            raise MixingError(f"gate {kind.method!r} mixes the ranks of one adapter, got {len(adapters)}")
        ranks = min(part.a.shape[0] for adapter in adapters.values() for part in adapter.values())
        if k > ranks:
            raise MixingError(f"gate {kind.method!r}: k = {k} is more than the {ranks} ranks of the adapter")
    elif k > len(adapters):
        raise MixingError(f"gate {kind.method!r}: k = {k} is more than the {len(adapters)} adapters")
    if not fewest:
        raise MixingError("every layer needs an adapter")
    if unknown := sorted(set(getattr(options, "weights", {})) - set(adapters)):
        raise MixingError(f"gate {kind.method!r}: weights name {unknown[0]!r}, there are {', '.join(adapters)}")


def _by_layer(adapters: Mapping[str, Adapter]) -> dict[str, list[int]]:
    """Layer -> which adapters change it, by number."""
    layers: dict[str, list[int]] = {}
    for number, adapter in enumerate(adapters.values()):
        for layer in adapter:
            layers.setdefault(layer, []).append(number)
    return layers


def _install(
    model: nn.Module, gate: type[Gate], options: GateOptions, adapters: Mapping[str, Adapter], state: MixingState
) -> dict[str, MixedLoraLinear]:
    by_layer, named = _by_layer(adapters), list(adapters.values())
    layers: dict[str, MixedLoraLinear] = {}
    decisions: dict[tuple[str, tuple[int, ...]], Decision] = {}
    kind = RankLoraLinear if issubclass(gate, RankGate) else MixedLoraLinear
    for name in [name for name, _ in model.named_modules() if name in by_layer]:  # in the order of the model
        subset = tuple(by_layer[name])
        block = name.rpartition(".")[0] if gate.per_block else name
        decision = decisions.setdefault((block, subset), Decision(name))
        parts = [named[e][name] for e in subset]
        base: Any = model.get_submodule(name)
        layer = layers[name] = kind(base, name, parts, subset, state, decision)
        if decision.gate is None:
            decision.gate = layer.gate = gate(layer.site(), options)
        _replace(model, name, layer)
    return layers


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _read_gate_file(path: Path) -> tuple[_Description, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("mixture", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return _Description.model_validate(json.loads(text)), tensors
    except (OSError, SafetensorError) as error:
        raise MixingError(f"{str(path)!r} cannot be read: {error}") from error
    except ValueError as error:
        raise MixingError(f"{str(path)!r} does not describe a mixture: {error}") from error


def _load_gates(mixture: Mixture, tensors: Mapping[str, Tensor]) -> None:
    expected = {f"{n}/{key}": t for n, gate in mixture.gates.items() for key, t in gate.state_dict().items()}
    if missing := sorted(set(expected) ^ set(tensors)):
        raise MixingError(f"the gate file and the model do not fit: {missing[0]!r} is in one of them only")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not bool(tensor.isfinite().all()):
            shapes = f"{list(tensor.shape)}, expected finite {list(expected[name].shape)}"
            raise MixingError(f"the gate file's {name!r} is {shapes}")
        with torch.no_grad():
            expected[name].copy_(tensor)
