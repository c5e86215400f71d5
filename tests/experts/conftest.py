from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
import yaml

from experts.build import build_experts
from experts.expert import Expert
from experts.fleet import load_fleet
from tests.experts.models import save_adapter, save_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of it, of different ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(llama, folder / "one", seed=1, r=4),
        save_adapter(llama, folder / "two", seed=2, r=8, use_rslora=True, targets=["q_proj", "o_proj", "gate_proj"]),
        save_adapter(llama, folder / "three", seed=3, r=4, rank_pattern={"v_proj": 6}, alpha_pattern={"v_proj": 3}),
    ]


@pytest.fixture(scope="session")
async def fleet(
    llama: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, Expert]]:
    """The model and its adapters as experts `base`, `one`, `two`, `three`, from a fleet file."""
    entry = {"context_length": 512, "features": ["logprobs"]}
    experts = [{"name": "base", "local": {"model": str(llama), "max_batch": 8, "max_queue": 16}, **entry}]
    experts += [{"name": path.name, "adapter": {"base": "base", "path": str(path)}, **entry} for path in adapters]
    path = tmp_path_factory.mktemp("fleet") / "fleet.yaml"
    path.write_text(yaml.safe_dump({"experts": experts}))
    built = build_experts(load_fleet(path))
    yield built
    for expert in built.values():
        await expert.close()
