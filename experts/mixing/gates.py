"""Gates that are learned together with their adapters, and `static`, which is given its weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from experts.mixing.balance import BalanceRule
from experts.mixing.gate import BalancedOptions, Gate, GateOptions, LinearGate, Site
from experts.mixing.selection import Routing, argmax, entropy_hybrid, top_k, top_p


class TopKOptions(BalancedOptions):
    k: int = Field(default=2, ge=1, description="adapters for each token")


class MixLoraGate(LinearGate):
    """MixLoRA, arXiv 2404.15159: an MLP's adapters, one decision for the block, top-2 of 8 by renormalised softmax.

    The balance loss is over the decisions of all layers together. The paper applies each expert's whole MLP and adds
    the outputs; here each linear layer mixes, as all methods of this package do.
    """

    method = "mixlora"
    options_type = TopKOptions
    per_block = True
    mlp_only = True
    pooled: ClassVar[bool] = True

    def __init__(self, site: Site, options: TopKOptions) -> None:
        super().__init__(site, options)
        self.k = min(options.k, site.experts)
        self.rule = BalanceRule("switch", options.balance, pooled=self.pooled)

    def select(self, logits: Tensor) -> Routing:
        return top_k(logits, self.k, renormalise=True)


class MolaGate(MixLoraGate):
    """MoLA, arXiv 2402.08562: each linear layer decides; deeper layers have more adapters (2, 4, 6, 8; rank 8)."""

    method = "mola"
    per_block = False
    mlp_only = False
    pooled = False
    fresh = ((2, 4, 6, 8), 8)


class DynMoleOptions(BalancedOptions):
    top_p: float = Field(default=0.75, gt=0, le=1, description="cumulative probability that is kept")
    least: int = Field(default=2, ge=1, description="adapters that are kept in any case")
    entropy_threshold: float = Field(default=0.9, ge=0, le=1, description="relative entropy above which all are kept")
    tsallis: float = Field(default=1.1, gt=1, description="index q of Tsallis' entropy")
    entropy: float = Field(default=1e-2, ge=0, description="factor of the entropy loss")


class DynMoleGate(LinearGate):
    """DynMoLE, arXiv 2504.00661: top-p for tokens that the gate is sure of, all adapters for the others."""

    method = "dynmole"
    options_type = DynMoleOptions
    fresh = ((6,), 24)

    def __init__(self, site: Site, options: DynMoleOptions) -> None:
        super().__init__(site, options)
        self.options = options
        self.rule = BalanceRule("switch", options.balance, entropy=options.entropy, tsallis=options.tsallis)

    def select(self, logits: Tensor) -> Routing:
        o = self.options
        return entropy_hybrid(logits, o.top_p, o.least, o.entropy_threshold, o.tsallis)


class LlavaMoleOptions(BalancedOptions):
    balance: float = Field(default=1e-2, ge=0, description="factor of the balance loss")


class LlavaMoleGate(LinearGate):
    """LLaVA-MoLE, arXiv 2401.16160: an MLP's adapters, one decision for the block, the best alone with weight 1."""

    method = "llava_mole"
    options_type = LlavaMoleOptions
    per_block = True
    mlp_only = True

    def __init__(self, site: Site, options: LlavaMoleOptions) -> None:
        super().__init__(site, options)
        self.rule = BalanceRule("switch", options.balance)

    def select(self, logits: Tensor) -> Routing:
        return argmax(logits)


class DynamicOptions(BalancedOptions):
    top_p: float = Field(default=0.4, gt=0, le=1, description="cumulative probability, the crossing adapter included")
    balance: float = Field(default=1e-2, ge=0, description="factor of the balance loss")
    entropy: float = Field(default=1e-4, ge=0, description="factor of the entropy loss")


class DynamicGate(LinearGate):
    """Top-p routing, arXiv 2403.07652: a token gets as many adapters as it takes to reach a cumulative probability."""

    method = "dynamic"
    options_type = DynamicOptions

    def __init__(self, site: Site, options: DynamicOptions) -> None:
        super().__init__(site, options)
        self.top_p = options.top_p
        self.rule = BalanceRule("switch", options.balance, entropy=options.entropy)

    def select(self, logits: Tensor) -> Routing:
        return top_p(logits, self.top_p)


class StaticOptions(GateOptions):
    weights: dict[str, float] = Field(
        default_factory=dict, description="of requests that name none; empty is the base alone"
    )


class StaticGate(Gate):
    """Weights that are given, by the request or here: LoRA composition."""

    method = "static"
    options_type = StaticOptions
    learns = "nothing"
    takes_bias = False
    given: Tensor
    numbers: Tensor

    def __init__(self, site: Site, options: StaticOptions) -> None:
        super().__init__(site, options)
        weights = torch.tensor([options.weights.get(name, 0.0) for name in site.adapters])
        numbers = weights.nonzero().flatten().to(torch.int32)
        self.experts = site.experts
        self.register_buffer("numbers", numbers.to(site.stack.A.device), persistent=False)
        self.register_buffer("given", weights[numbers.long()].to(site.stack.A.device), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Routing:
        tokens = x.shape[0]
        share = torch.zeros(self.experts, device=x.device).scatter(0, self.numbers.long(), self.given)
        return Routing(self.numbers.expand(tokens, -1), self.given.expand(tokens, -1), share.expand(tokens, -1))
