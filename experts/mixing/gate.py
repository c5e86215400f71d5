"""What a gate is: score -> bias -> select -> normalise, and the loss that keeps it balanced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from experts.mixing.balance import BalanceRule
from experts.mixing.selection import Routing
from kernels import AdapterStack

Learns = Literal["nothing", "gate", "gate and adapters", "adapters' B"]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """The place that a gate is built for: a linear layer, or the first adapted layer of a block."""

    name: str
    features: int  # width of x
    stack: AdapterStack
    adapters: tuple[str, ...]

    @property
    def experts(self) -> int:
        return self.stack.experts


def uncast(move: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`move` of `model.to(...)`, `.half()` and the like without a change of dtype."""
    moved = move(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class GateOptions(BaseModel):
    """Options of a method; each method has its own, and its paper's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BalancedOptions(GateOptions):
    balance: float = Field(default=1e-3, ge=0, description="factor of the balance loss")


class Gate(nn.Module):
    """Decides for the tokens of a site. Subclasses score and select.

    Parameters and buffers are float32, and stay so whatever the model is cast to.

    Attributes:
        method: The method's name.
        options_type: The method's options.
        per_block: One decision for all adapted layers of a block (an attention or an MLP), made by the first of them.
        learns: What training changes.
        learns_alone: Each adapter's gate is trained with that adapter alone, by `solo`.
        by_rows: Row e of each tensor of the gate is adapter e's alone, so that gates made apart can be laid together.
        fresh: Number and rank of the adapters that the method makes where it is given none; several numbers are for
            successive parts of the model's depth.
        takes_weights: Whether a request can bring weights of its own, other than those of the base alone.
        takes_bias: Whether a request can bring a bias to the scores.
        alpha: alpha / rank of fresh adapters, in ranks.
        mlp_only: Whether fresh adapters go to MLPs alone, as in the paper.
        rule: The method's auxiliary loss.
    """

    method: ClassVar[str]
    options_type: ClassVar[type[GateOptions]] = GateOptions
    per_block: ClassVar[bool] = False
    learns: ClassVar[Learns] = "gate and adapters"
    learns_alone: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    fresh: ClassVar[tuple[tuple[int, ...], int]] = ((8,), 16)
    alpha: ClassVar[float] = 2.0
    mlp_only: ClassVar[bool] = False
    takes_weights: ClassVar[bool] = True
    takes_bias: ClassVar[bool] = True

    def __init__(self, site: Site, options: GateOptions) -> None:
        super().__init__()
        self.rule = BalanceRule()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        super()._apply(partial(uncast, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def score(self, x: Tensor) -> Tensor:
        """Logits [T, E] float32 for x [T, d]."""
        raise NotImplementedError

    def select(self, logits: Tensor) -> Routing:
        """The decision; -inf leaves an adapter out."""
        raise NotImplementedError

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Routing:
        """Decide for x [T, d]; `bias` [T, E] is added to the scores, to weigh as well as to select."""
        logits = self.score(x)
        return self.select(logits if bias is None else logits + bias)

    def solo(self, x: Tensor, indices: Tensor) -> Tensor:
        """How much of its adapter a token's own gate lets through: [T, k] for given adapters."""
        raise NotImplementedError

    def rebalance(self, load: Tensor) -> None:
        """Move a loss-free balancing bias after an optimizer step, given the step's `load` [E]."""


class LinearGate(Gate):
    """Scores by a learned linear map of x."""

    def __init__(self, site: Site, options: GateOptions) -> None:
        super().__init__(site, options)
        self.weight = nn.Parameter(torch.randn(site.experts, site.features, device=site.stack.A.device) * 0.02)

    def score(self, x: Tensor) -> Tensor:
        return x.float() @ self.weight.float().T
