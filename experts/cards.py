"""Expert cards: all that a router may know of an expert."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from experts.expert import Usage

Kind = Literal["local", "adapter", "remote", "embedding"]
Modality = Literal["text", "image", "audio", "file"]
Feature = Literal["tools", "json", "logprobs"]

_PER_MILLION = 1e-6


class ExpertCard(BaseModel):
    """Name, description, prices and abilities of one expert.

    Prices are USD per million tokens. A card is enough to route to an expert of which nothing was observed yet.
    `routed` is false for a model that no policy chooses: the policy model of `router_r1`, which its strategy calls.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/@-]*$")
    description: str = ""
    kind: Kind = "remote"
    input_price: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    output_price: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    cached_input_price: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    context_length: int = Field(default=4096, gt=0)
    modalities: frozenset[Modality] = frozenset({"text"})
    features: frozenset[Feature] = frozenset()
    tags: frozenset[str] = frozenset()
    routed: bool = True

    def cost(self, usage: Usage) -> float:
        """What `usage` costs at this card's prices, in USD."""
        cached_price = self.input_price if self.cached_input_price is None else self.cached_input_price
        fresh = usage.input_tokens - usage.cached_input_tokens
        return _PER_MILLION * (
            fresh * self.input_price
            + usage.cached_input_tokens * cached_price
            + usage.output_tokens * self.output_price
        )
