"""Shared by the mixing layer's tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from experts.mixing import Mixture, install_mixture
from experts.mixing.adapters import Adapter


def some_mixture(
    model: nn.Module, adapters: Mapping[str, Adapter], gate: str, options: Mapping[str, Any] | None = None
) -> Mixture:
    """A mixture whose gates have decided opinions, and whose adapters all do something."""
    mixture = install_mixture(model, adapters, gate, options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for own in mixture.gates.values():
            for parameter in own.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for layer in mixture.layers.values():
            if not bool(layer.B.any()):
                layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.3)
    return mixture
