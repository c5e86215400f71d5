"""What the requests of the coming forward pass ask of the mixing layers.

An engine sets this once before a forward pass, and every mixing layer of the model looks here. A batch may hold
requests of all kinds at once: one adapter, a mixture that the request names, the model's gate, the gate with a bias of
the request's own. The tokens may lie as [requests, tokens, d], or side by side in any order with `request_of_token`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from experts.errors import MixingError
from experts.mixing.balance import Record
from experts.mixing.gate import Gate
from experts.mixing.load import GateLoad, weights_of
from experts.mixing.selection import Routing

NONE = -1


@dataclass(frozen=True, slots=True)
class RequestMixture:
    """One request's wish.

    Attributes:
        weights: Adapter -> weight, the same for all its tokens; empty is the base alone. None: the gate decides.
        bias: Adapter -> what is added to the gate's scores (GLIDER's global half); -inf leaves an adapter out.
            Adapters that are not named get 0. Only where the gate decides.
        load: Is told what the gate decides for the request's tokens. Only where it decides among adapters.
        own: How many of its row's tokens, the last ones, are counted there; the others are padding. None: all.
    """

    weights: Mapping[str, float] | None = None
    bias: Mapping[str, float] = field(default_factory=dict)
    load: GateLoad | None = None
    own: int | None = None

    @classmethod
    def only(cls, adapter: str) -> RequestMixture:
        """One adapter with weight 1."""
        return cls(weights={adapter: 1.0})

    @classmethod
    def base(cls) -> RequestMixture:
        """No adapter."""
        return cls(weights={})


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The requests' wishes in the numbering of layers that have the same adapters. B requests, E adapters."""

    indices: Tensor  # [B, k] int32: given adapters, -1 is none
    weights: Tensor  # [B, k] float32
    bias: Tensor | None  # [B, E] float32


class MixingState:
    """Shared by all mixing layers of one model.

    `recording` makes gates note what they decide in `records` (for losses and reports), over the tokens of `counted`
    [T] bool, or over all of them. `solo` makes given adapters count as far as their own gate lets them (how PHATGOOSE
    trains its gates).
    """

    def __init__(self, adapters: Sequence[str], gate: type[Gate], model: nn.Module) -> None:
        self.adapters, self.gate = tuple(adapters), gate
        self.recording = self.solo = False
        self.records: list[Record] = []
        self.counted: Tensor | None = None
        self._model = model
        self._subsets: list[tuple[int, ...]] = []
        self.clear()

    @property
    def device(self) -> torch.device:
        """Where the model is now, and the tables are made."""
        return next(self._model.parameters()).device

    def clear(self) -> None:
        """Every request gets the gate, without bias."""
        self.requests = 0
        self.any_given = self.all_given = False
        self._watched: list[tuple[int, GateLoad, int | None]] = []
        self._request_of_token: Tensor | None = None
        self._tables: list[Table] = []

    def set(self, requests: Sequence[RequestMixture], *, request_of_token: Tensor | None = None) -> None:
        """Say what the coming passes hold.

        Args:
            requests: In the order of the batch's rows; where there are several rows for each (beams), these lie side by
                side.
            request_of_token: [T] integers, the request of each token, where rows of the batch are not requests.

        Raises `MixingError` for an adapter that is not there, for weights and biases that are no numbers or nothing
        that the installed gate can serve, for a token of no request.
        """
        if not requests:
            raise MixingError("give at least one request, or clear the state")
        for request in requests:
            self._check(request)
        if request_of_token is not None:
            request_of_token = _checked_tokens(request_of_token, len(requests)).to(self.device)
        given = [request.weights is not None for request in requests]
        tables = [self._table(requests, subset) for subset in self._subsets]
        self.requests = len(requests)
        self.any_given, self.all_given = any(given), all(given)
        self.given = torch.tensor(given, device=self.device)
        self._watched = [(i, r.load, r.own) for i, r in enumerate(requests) if r.load is not None]
        self._request_of_token, self._tables = request_of_token, tables

    def subset(self, adapters: Sequence[int]) -> int:
        """The number of the table for layers that have these of the adapters."""
        key = tuple(adapters)
        if key not in self._subsets:
            self._subsets.append(key)
        return self._subsets.index(key)

    def table(self, subset: int) -> Table:
        return self._tables[subset]

    def check_rows(self, rows: int) -> None:
        """Raise `MixingError` unless the rows of a batch are those of the requests."""
        if self.requests and self._request_of_token is None and rows % self.requests:
            raise MixingError(
                f"a batch of {rows} rows is not that of {self.requests} requests, nor of as many rows for each: "
                "set as many requests as there are rows, or give request_of_token"
            )

    def per_token(self, rows: Tensor, x: Tensor) -> Tensor:
        """[B, ...] by request to [T, ...] by token, where x [T, d] is."""
        rows, tokens = rows.to(x.device), x.shape[0]
        if self._request_of_token is not None:
            if self._request_of_token.shape[0] != tokens:
                raise MixingError(f"request_of_token names {self._request_of_token.shape[0]} tokens, not {tokens}")
            return rows[self._request_of_token.to(x.device)]
        if tokens == self.requests:
            return rows
        self.check_rows(tokens)
        return rows.repeat_interleave(tokens // self.requests, 0)

    def tell(self, site: str, adapters: Sequence[int], routing: Routing) -> None:
        """Tell the requests that want to know what the gate of a site with these adapters decided for T tokens."""
        if not self._watched:
            return
        names, weights = tuple(self.adapters[e] for e in adapters), weights_of(routing, len(adapters))
        for request, load, own in self._watched:
            load.add(site, names, self._of_request(weights, request, own))

    def _of_request(self, rows: Tensor, request: int, own: int | None) -> Tensor:
        """The rows [t, E] of one request's own tokens among [T, E]."""
        if self._request_of_token is not None:
            return rows[self._request_of_token.to(rows.device) == request]
        mine = rows.view(self.requests, -1, rows.shape[1])[request]
        return mine if own is None else mine[-own:]

    def _check(self, request: RequestMixture) -> None:
        named = {**(request.weights or {}), **request.bias}
        if unknown := sorted(set(named) - set(self.adapters)):
            raise MixingError(f"no adapter {unknown[0]!r}: there are {', '.join(self.adapters)}")
        if request.weights is not None and request.bias:
            raise MixingError("a request has either weights of its own or a bias for the gate, not both")
        if request.weights and not self.gate.takes_weights:
            raise MixingError(
                f"gate {self.gate.method!r} mixes the ranks of one adapter: a request has the gate, or the base alone"
            )
        if request.bias and not self.gate.takes_bias:
            can = "weights of its own, or those installed" if self.gate.takes_weights else "the gate, or the base alone"
            raise MixingError(f"gate {self.gate.method!r} takes no bias: a request has {can}")
        if request.load is not None and (request.weights is not None or not self.gate.takes_weights):
            raise MixingError("a load is told where the gate decides among adapters")
        for name, weight in (request.weights or {}).items():
            if not math.isfinite(weight):
                raise MixingError(f"the weight of {name!r} must be a finite number, got {weight!r}")
        for name, bias in request.bias.items():
            if math.isnan(bias) or bias == math.inf:
                raise MixingError(f"the bias of {name!r} must be a number below infinity, got {bias!r}")

    def _table(self, requests: Sequence[RequestMixture], subset: tuple[int, ...]) -> Table:
        local = {self.adapters[e]: i for i, e in enumerate(subset)}
        pairs = [[(local[n], w) for n, w in (r.weights or {}).items() if n in local] for r in requests]
        slots = max(1, *map(len, pairs))
        padded = [row + [(NONE, 0.0)] * (slots - len(row)) for row in pairs]
        bias = [[r.bias.get(name, 0.0) for name in local] for r in requests]
        return Table(
            torch.tensor([[e for e, _ in row] for row in padded], dtype=torch.int32, device=self.device),
            torch.tensor([[w for _, w in row] for row in padded], dtype=torch.float32, device=self.device),
            torch.tensor(bias, device=self.device) if any(r.bias for r in requests) else None,
        )


def _checked_tokens(rows: Tensor, requests: int) -> Tensor:
    if rows.dim() != 1 or rows.is_floating_point():
        raise MixingError(f"request_of_token must be integers [T], got {rows.dtype} {list(rows.shape)!r}")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < requests:
        raise MixingError(f"request_of_token must be in [0, {requests}), got {int(rows.min())} to {int(rows.max())}")
    return rows.long()
