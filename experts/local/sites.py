"""Linear layers with room for adapters: `slots` of them at once, a different mixture for each token.

    y_t = W x_t + sum over i of w[t, i] * scale_e * B_e A_e x_t,    e = slot[t, i]

Layers that read the same input (q, k and v; gate and up) are one site: one product with the base's weights laid side by
side, and one call of `mixed_lora` for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from experts.local.lora import LoraWeights
from experts.mixing.install import Mixture as GateMixture
from experts.mixing.state import RequestMixture
from kernels import AdapterStack, mixed_lora

_UNSOUND = 1e15
"""No gate is asked about numbers beyond: it would refuse the whole batch for them. Their rows become NaN and fail."""

_SHARE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True, eq=False)
class GatedRows:
    """Requests of a batch whose mixture one gate decides anew for each token."""

    gate: GateMixture
    requests: Sequence[RequestMixture]
    tokens: Tensor  # places of their tokens among those of the pass, request after request


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the adapters do in a pass over T tokens (`tokens`, 0 where they do nothing)."""

    indices: Tensor | None = None  # [T, k] int32: adapters of the sites' stacks, -1 is none
    weights: Tensor | None = None  # [T, k] float32
    gated: Sequence[GatedRows] = ()
    tokens: int = 0
    rows: int = 0

    def for_tokens(self, tokens: int) -> Plan:
        """The plan for a layer that sees only the last token of each row, as one after the blocks may.

        Raises `ValueError` for any other number: it cannot be known whose tokens they are.
        """
        if tokens == self.tokens:
            return self
        if tokens != self.rows:
            raise ValueError(f"a layer with adapters sees {tokens} tokens of {self.tokens} in {self.rows} rows")
        step = self.tokens // tokens
        last = slice(step - 1, None, step)
        indices, weights = (None if side is None else side[last] for side in (self.indices, self.weights))
        gated = [GatedRows(rows.gate, rows.requests, rows.tokens[last] // step) for rows in self.gated]
        return Plan(indices, weights, gated, tokens, tokens)

    def begin(self) -> None:
        """Tell the gates what is coming."""
        for rows in self.gated:
            rows.gate.state.set(rows.requests)
            rows.gate.begin_pass()


class Current:
    """The plan of the coming pass; all sites of a model look here."""

    def __init__(self) -> None:
        self.plan = Plan()

    def set(self, plan: Plan) -> None:
        """Follow `plan` from now on."""
        plan.begin()
        self.plan = plan


@dataclass(frozen=True, slots=True, eq=False)
class HostPart:
    """One adapter's part for a site, in host memory: S slices, those that it leaves alone being zero."""

    a: Tensor  # [S, r, d]
    b: Tensor  # [r, sum of widths]
    scales: Tensor  # [S] float32

    @property
    def rank(self) -> int:
        return self.a.shape[1]


class Site:
    """One linear layer, or several that read the same input, with `slots` adapters on the device.

    Slot i has the rows i * R to (i + 1) * R of the stack, R the largest rank so far. An adapter fills the first of
    them, and is number 2 i of the stack; the rest are number 2 i + 1, which nobody uses.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], slots: int, current: Current) -> None:
        self.layers = dict(layers)
        self.name = next(iter(layers))
        self.weight, self.bias = _side_by_side(list(layers.values()))
        self.widths = tuple(layer.out_features for layer in layers.values())
        self._slots = slots
        self._current = current
        self._stack: AdapterStack | None = None
        self._used: set[int] = set()

    def host_part(self, weights: Mapping[str, LoraWeights]) -> HostPart | None:
        """An adapter's part for this site, from its layers' matrices; None where it leaves the site alone."""
        own = [weights.get(name) for name in self.layers]
        given = [one for one in own if one is not None]
        if not given:
            return None
        rank = max(one.a.shape[0] for one in given)
        dtype = reduce(torch.promote_types, (side.dtype for one in given for side in (one.a, one.b)))
        a = torch.zeros(len(own), rank, given[0].a.shape[1], dtype=dtype)
        b = torch.zeros(rank, sum(self.widths), dtype=dtype)
        for one, a_slice, b_slice in zip(own, a, torch.split(b, list(self.widths), 1), strict=True):
            if one is not None:
                a_slice[: one.a.shape[0]] = one.a
                b_slice[: one.a.shape[0]] = one.b.T
        scales = torch.tensor([0.0 if one is None else one.scale for one in own])
        return HostPart(a, b, scales)

    @torch.no_grad()
    def write(self, slot: int, part: HostPart | None) -> None:
        """Put an adapter's part into a slot, in place of what was there. The stack must have room for its rank."""
        self._used.discard(slot)
        stack = self._stack
        if part is None:
            if stack is not None:
                stack.offsets[2 * slot + 1] = stack.offsets[2 * slot]
            return
        if stack is None:
            raise ValueError(f"site {self.name!r} has no room for an adapter of rank {part.rank}")
        first = slot * stack.max_rank
        stack.A[:, first : first + part.rank] = part.a.to(stack.A, non_blocking=True)
        stack.B[first : first + part.rank] = part.b.to(stack.B, non_blocking=True)
        stack.scales[:, 2 * slot] = part.scales.to(stack.scales)
        stack.offsets[2 * slot + 1] = first + part.rank
        self._used.add(slot)

    @torch.no_grad()
    def reserve(self, part: HostPart) -> None:
        """Make room for such a part, and keep what is in the slots.

        On a CPU, adapters in bfloat16 stay so beside a base in float32: reading them is most of the work.
        """
        rank, dtype, old = part.rank, self.weight.dtype, self._stack
        if old is not None:
            narrow = old.A.dtype == part.a.dtype
            if old.max_rank >= rank and (narrow or old.A.dtype == dtype):
                return
            rank = max(rank, old.max_rank)
            dtype = part.a.dtype if narrow else dtype
        elif self.weight.device.type == "cpu" and (dtype, part.a.dtype) == (torch.float32, torch.bfloat16):
            dtype = torch.bfloat16
        self._stack = self._enlarged(self._empty(rank, dtype))

    def _empty(self, rank: int, dtype: torch.dtype) -> AdapterStack:
        """A stack with room for `rank` in each slot."""
        rows, outputs = self._slots * rank, self.weight.shape[0]
        starts = torch.arange(0, rows + 1, rank, dtype=torch.int32)
        offsets = torch.stack([starts, starts], 1).flatten()[:-1]
        return AdapterStack(
            A=self.weight.new_zeros(len(self.widths), rows, self.weight.shape[1], dtype=dtype),
            B=self.weight.new_zeros(rows, outputs, dtype=dtype),
            scales=torch.zeros(len(self.widths), 2 * self._slots, device=self.weight.device),
            offsets=offsets.to(self.weight.device).contiguous(),
            ranks=(rank,) * (2 * self._slots),
            widths=self.widths,
        )

    def _enlarged(self, new: AdapterStack) -> AdapterStack:
        """`new`, with what is in the slots now."""
        if (old := self._stack) is not None:
            for theirs, ours in zip(_by_slot(new, self._slots), _by_slot(old, self._slots), strict=True):
                theirs[..., : old.max_rank, :] = ours
            new.scales.copy_(old.scales)
            new.offsets[1::2] = new.offsets[:-1:2] + (old.offsets[1::2] - old.offsets[:-1:2])
        return new

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of each of the site's layers for x [..., d]."""
        y = linear(x, self.weight, self.bias)
        plan = self._current.plan
        if not plan.tokens:
            return self._split(y)
        flat = x.reshape(-1, x.shape[-1])
        plan = plan.for_tokens(flat.shape[0])
        if plan.indices is not None and plan.weights is not None and self._stack is not None and self._used:
            added = mixed_lora(flat, self._stack, plan.indices, plan.weights, base=y.view(-1, y.shape[-1]))
            y = added.view(y.shape)
        for rows in plan.gated:
            self._add_gated(rows, flat, y.view(-1, y.shape[-1]))
        return self._split(y)

    def _split(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.split(y, list(self.widths), -1) if len(self.widths) > 1 else (y,)

    def _add_gated(self, rows: GatedRows, x: Tensor, y: Tensor) -> None:
        own = x[rows.tokens]
        sound = own.abs().amax(1, keepdim=True) < _UNSOUND  # NaN is not
        own = torch.where(sound, own, 0)
        for name, part in zip(self.layers, torch.split(y, list(self.widths), 1), strict=True):
            if (layer := rows.gate.layers.get(name)) is not None:
                part[rows.tokens] = torch.where(sound, layer.mixed(own, part[rows.tokens]), torch.nan)


def _by_slot(stack: AdapterStack, slots: int) -> tuple[Tensor, Tensor]:
    """A stack's A [S, slots, R, d] and B [slots, R, o]."""
    rows = stack.max_rank
    return stack.A.view(-1, slots, rows, stack.A.shape[2]), stack.B.view(slots, rows, -1)


class SiteLinear(nn.Module):
    """Stands where a linear layer stood: one of the outputs of its site. The first that is asked computes them all."""

    def __init__(self, base: nn.Linear, site: _SharedInput, index: int) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self._site, self._index = site, index

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus that of each token's mixture."""
        return self._site.output(x, self._index)


class _SharedInput:
    """Keeps a site's outputs until each was taken, as long as they are for the same input."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._x: Tensor | None = None
        self._left: dict[int, Tensor] = {}

    def output(self, x: Tensor, index: int) -> Tensor:
        if x is not self._x or index not in self._left:
            self._x, self._left = x, dict(enumerate(self._site.outputs(x)))
        y = self._left.pop(index)
        if not self._left:
            self._x = None
        return y


class LinearLayers:
    """A network's linear layers as they were before sites stood in their places, by name."""

    def __init__(self, layers: Mapping[str, nn.Linear], network: nn.Module) -> None:
        self.by_name = layers
        self._network = network

    def get_submodule(self, target: str) -> nn.Module:
        """The layer `target` as it was. Raises `AttributeError` where there is none."""
        return self.by_name.get(target) or self._network.get_submodule(target)

    def skeleton(self) -> nn.Module:
        """A module with nothing but these layers under their names, which shares them with the network."""
        root = nn.Module()
        for name, layer in self.by_name.items():
            parent = root
            *path, last = name.split(".")
            for step in path:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = cast("nn.Module", parent._modules[step])
            parent.add_module(last, layer)
        return root


def install_sites(network: nn.Module, slots: int) -> tuple[dict[str, Site], LinearLayers, Current]:
    """Put sites in the place of all linear layers of `network`; by name of their first layer."""
    current = Current()
    linears = {name: module for name, module in network.named_modules() if type(module) is nn.Linear}
    sites = {}
    for names in _groups(linears):
        site = Site({name: linears[name] for name in names}, slots, current)
        shared = _SharedInput(site)
        for index, name in enumerate(names):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, SiteLinear(linears[name], shared, index))
        sites[site.name] = site
    return sites, LinearLayers(linears, network), current


def _groups(linears: Mapping[str, nn.Linear]) -> Iterator[tuple[str, ...]]:
    """Names of layers that share a site, in the order of the model."""
    taken: set[str] = set()
    for name in linears:
        if name in taken:
            continue
        parent, dot, child = name.rpartition(".")
        family = next((family for family in _SHARE_INPUT if child in family), (child,))
        names = tuple(f"{parent}{dot}{member}" for member in family)
        if not all(other in linears and _alike(linears[other], linears[name]) for other in names):
            names = (name,)
        taken.update(names)
        yield names


def _alike(one: nn.Linear, other: nn.Linear) -> bool:
    return one.in_features == other.in_features and (one.bias is None) == (other.bias is None)


def _side_by_side(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of all layers in one; each layer keeps its part of it as its own, so nothing is held twice."""
    if len(layers) == 1:
        return layers[0].weight, layers[0].bias
    widths = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    biases: Sequence[Tensor | None] = [None] * len(layers) if bias is None else list(torch.split(bias, widths))
    for layer, own, own_bias in zip(layers, torch.split(weight, widths), biases, strict=True):
        layer.weight = nn.Parameter(own, requires_grad=False)
        if own_bias is not None:
            layer.bias = nn.Parameter(own_bias, requires_grad=False)
    return weight, bias


def plan_of(
    tables: Sequence[Sequence[tuple[int, float]]],
    tokens: int,
    device: torch.device,
    gated: Sequence[tuple[GateMixture, Mapping[int, RequestMixture]]] = (),
) -> Plan:
    """The plan of a batch of rows with `tokens` tokens each.

    Args:
        tables: For each row, the slots of its adapters with their weights; empty is the base alone.
        gated: Each gate with its rows, by number.
    """
    table, rows = _table(tables, tokens, device), _gated(gated, tokens, device)
    if not rows and table[0] is None:
        return Plan()
    return Plan(*table, rows, len(tables) * tokens, len(tables))


def _table(
    rows: Sequence[Sequence[tuple[int, float]]], tokens: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    slots = max(map(len, rows), default=0)
    if not slots:
        return None, None
    indices = torch.full((len(rows), slots), -1, dtype=torch.int32)
    weights = torch.zeros(len(rows), slots)
    for i, row in enumerate(rows):
        for j, (slot, weight) in enumerate(row):
            indices[i, j], weights[i, j] = 2 * slot, weight
    if tokens > 1:
        indices, weights = indices.repeat_interleave(tokens, 0), weights.repeat_interleave(tokens, 0)
    return indices.to(device), weights.to(device)


def _gated(
    gated: Sequence[tuple[GateMixture, Mapping[int, RequestMixture]]], tokens: int, device: torch.device
) -> tuple[GatedRows, ...]:
    made = []
    for gate, requests in gated:
        starts = torch.tensor(list(requests), device=device) * tokens
        places = (starts[:, None] + torch.arange(tokens, device=device)).flatten()
        made.append(GatedRows(gate, list(requests.values()), places))
    return tuple(made)
