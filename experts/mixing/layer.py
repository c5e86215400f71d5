"""A linear layer with adapters that a gate, or the request, mixes anew for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from experts.errors import MixingError
from experts.mixing.adapters import LayerAdapter
from experts.mixing.balance import record_of
from experts.mixing.gate import Gate, Site, uncast
from experts.mixing.rank_gates import RankGate
from experts.mixing.selection import Routing
from experts.mixing.state import NONE, MixingState
from kernels import AdapterStack, expand_ranks, mixed_lora, project_ranks


class Decision:
    """A gate and what it decided in this pass, for the layers that share it: the first of them decides."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate: Gate | None = None
        self.routing: Routing | None = None


class MixedLoraLinear(nn.Module):
    """y_t = W x_t + sum over e of w[t, e] * scale_e * B_e A_e x_t. Input [..., d], output [..., o].

    The adapters' matrices lie in one stack, in the base's dtype. `A` and `B` are parameters; whether they learn is the
    method's affair.
    """

    scales: Tensor
    offsets: Tensor

    def __init__(
        self,
        base: nn.Linear,
        name: str,
        parts: Sequence[LayerAdapter],
        subset: Sequence[int],
        state: MixingState,
        decision: Decision,
    ) -> None:
        super().__init__()
        pairs = [[(part.a.to(base.weight), part.b.to(base.weight))] for part in parts]
        stack = AdapterStack.pack(pairs, [part.scale for part in parts])
        self.base_layer, self.name = base, name
        self.A, self.B = nn.Parameter(stack.A), nn.Parameter(stack.B)
        self.register_buffer("scales", stack.scales, persistent=False)
        self.register_buffer("offsets", stack.offsets, persistent=False)
        self.adapters = tuple(subset)
        self.gate: Gate | None = None
        self._ranks, self._widths = stack.ranks, stack.widths
        self._state, self._decision, self._subset = state, decision, state.subset(subset)

    @property
    def weight(self) -> Tensor:
        """The base layer's, for models that look at it (T5 at its dtype)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """The base layer's."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """The base layer's."""
        return self.base_layer.out_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixedLoraLinear:
        """A, B and the base are cast; the kernel's constants only move."""
        constants = {name: uncast(fn, buffer) for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(constants)
        return self

    @property
    def stack(self) -> AdapterStack:
        """The adapters as the kernel takes them: views of the parameters."""
        return AdapterStack(self.A, self.B, self.scales, self.offsets, self._ranks, self._widths)

    def site(self) -> Site:
        """What a gate is built from."""
        own = tuple(self._state.adapters[e] for e in self.adapters)
        return Site(self.name, self.base_layer.in_features, self.stack, own)

    def part(self, adapter: int) -> LayerAdapter:
        """One adapter's matrices, copied; `adapter` is the state's number, which must be among `adapters`."""
        local = self.adapters.index(adapter)
        ((a, b),) = self.stack.adapter(local)
        return LayerAdapter(a.detach().clone(), b.detach().clone(), float(self.scales[0, local]))

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus that of each token's mixture. The first dimension of x is the batch's rows."""
        self._state.check_rows(x.shape[0])
        base: Tensor = self.base_layer(x)
        flat = x.reshape(-1, x.shape[-1]).to(self.A.dtype)
        flat_base = base.reshape(-1, base.shape[-1])
        if base.dtype == self.A.dtype:
            return self.mixed(flat, flat_base).view(base.shape)
        return base + self.mixed(flat, None).view(base.shape).to(base.dtype)  # under autocast

    def mixed(self, x: Tensor, base: Tensor | None) -> Tensor:
        """What the adapters add for x [T, d], to `base` [T, o] where it is given."""
        routing = self._routing(x)
        return mixed_lora(x, self.stack, routing.indices, routing.weights, base=base)

    def _routing(self, x: Tensor) -> Routing:
        state = self._state
        if state.all_given:
            return self._given(x)
        routing = self._gated(x)
        if not state.any_given:
            return routing
        return _instead(routing, self._given(x), state.per_token(state.given, x))

    def _given(self, x: Tensor) -> Routing:
        table = self._state.table(self._subset)
        indices = self._state.per_token(table.indices, x)
        weights = self._state.per_token(table.weights, x)
        if self._state.solo:
            weights = weights * cast("Gate", self._decision.gate).solo(x, indices)
        return Routing(indices, weights, weights)

    def _gated(self, x: Tensor) -> Routing:
        if self.gate is not None:
            bias = self._state.table(self._subset).bias if self._state.requests else None
            per_token = None if bias is None else self._state.per_token(bias, x)
            self._decision.routing = self.gate(x, per_token)
            self._record(self.gate, self._decision.routing)
            self._state.tell(self._decision.name, self.adapters, self._decision.routing)
        if self._decision.routing is None:
            raise MixingError(f"layer {self.name!r} ran before {self._decision.name!r}, which decides for its block")
        return self._decision.routing

    def _record(self, gate: Gate, routing: Routing) -> None:
        state = self._state
        if state.recording:
            state.records.append(
                record_of(
                    self._decision.name,
                    routing.indices,
                    routing.probabilities,
                    state.counted,
                    self.adapters,
                    gate.rule.tsallis,
                )
            )


class RankLoraLinear(MixedLoraLinear):
    """The same with one adapter, whose ranks are the experts. A request can have the gate, or the base alone."""

    def mixed(self, x: Tensor, base: Tensor | None) -> Tensor:
        """What the chosen ranks add for x [T, d], to `base` [T, o] where it is given."""
        gate = cast("RankGate", self.gate)
        hidden = project_ranks(x, self.A[0])
        routing = gate.choose(x, hidden)
        self._record(gate, routing)
        indices = routing.indices
        if self._state.any_given:
            indices = indices.masked_fill(self._state.per_token(self._state.given, x)[:, None], NONE)
        return expand_ranks(hidden, self.B, indices, routing.weights * self.scales[0, 0], base=base)


def _instead(gated: Routing, given: Routing, use_given: Tensor) -> Routing:
    """`given` where `use_given` [T] says so, else `gated`, in as many slots as the larger has."""
    slots = max(gated.indices.shape[1], given.indices.shape[1])
    sides = []
    for routing in (given, gated):
        padding = (0, slots - routing.indices.shape[1])
        sides.append(
            (
                nn.functional.pad(routing.indices, padding, value=NONE),
                nn.functional.pad(routing.weights, padding),
            )
        )
    (given_indices, given_weights), (indices, weights) = sides
    where = use_given[:, None]
    return Routing(
        torch.where(where, given_indices, indices), torch.where(where, given_weights, weights), gated.probabilities
    )
