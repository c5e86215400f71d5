"""A tiny Llama that mixtures are put into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from experts.mixing import LayerAdapter, new_adapters


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 200, (3, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adapters(model: torch.nn.Module) -> dict[str, dict[str, LayerAdapter]]:
    """Four adapters that do something, of ranks 4, 1, 8 and 3; the last leaves attention alone."""
    made = {}
    for e, rank in enumerate([4, 1, 8, 3]):
        new = new_adapters(model, experts=1, rank=rank, alpha=rank * (1 + e), seed=e, mlp_only=e == 3)
        made["abcd"[e]] = {layer: trained(part, seed=e) for layer, part in new["expert-0"].items()}
    return made


def trained(part: LayerAdapter, seed: int = 0) -> LayerAdapter:
    """With a random B, as training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    return LayerAdapter(part.a, 0.3 * torch.randn(part.b.shape, generator=generator), part.scale)
