from __future__ import annotations

from pathlib import Path

import pytest

from tests.experts.embedding.encoders import save_encoder, save_lora


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder's folder."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def loras(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of it, which change different layers."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        "air": save_lora(tiny, folder / "air", seed=1),
        "med": save_lora(tiny, folder / "med", seed=2, targets=("value", "dense")),
    }
