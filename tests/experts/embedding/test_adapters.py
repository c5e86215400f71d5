"""Adapters on an encoder: against PEFT, in mixed batches, loaded and unloaded while it runs."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import BertModel

from experts.embedding.adapters import AdaptedEncoder
from experts.embedding.encoder import EmbedderConfig, Encoder, EncoderFiles, FloatArray
from experts.errors import ExpertConfigError

TEXTS = ["wing flow", "shock of the wing in flow and noise", "blood", "cell and lung", "radio wave noise", ""]


def encoder_of(folder: Path) -> AdaptedEncoder:
    config = EmbedderConfig(model=str(folder))
    return AdaptedEncoder(Encoder(EncoderFiles.find(config), config))


def vectors(encoder: AdaptedEncoder, names: list[str | None]) -> FloatArray:
    return encoder.encode(encoder.tokenize(TEXTS), names)


def through_peft(tiny: Path, adapter: Path, encoder: AdaptedEncoder) -> FloatArray:
    model = PeftModel.from_pretrained(BertModel.from_pretrained(tiny), str(adapter)).eval()
    rows = []
    for ids in encoder.tokenize(TEXTS):
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        rows.append(torch.nn.functional.normalize(hidden, dim=0).numpy())
    return np.stack(rows)


def test_an_adapter_does_what_peft_does(tiny: Path, loras: dict[str, Path]) -> None:
    encoder = encoder_of(tiny)
    encoder.load(loras)
    for name, folder in loras.items():
        found = vectors(encoder, [name] * len(TEXTS))
        np.testing.assert_allclose(found, through_peft(tiny, folder, encoder), atol=2e-6)


def test_each_text_of_a_batch_goes_through_its_own(tiny: Path, loras: dict[str, Path]) -> None:
    encoder = encoder_of(tiny)
    encoder.load(loras)
    names: list[str | None] = ["air", "med", None, "med", "air", None]
    alone = {name: vectors(encoder, [name] * len(TEXTS)) for name in (None, "air", "med")}
    mixed = vectors(encoder, names)
    for row, name in enumerate(names):
        np.testing.assert_allclose(mixed[row], alone[name][row], atol=2e-6)
    assert abs(alone["air"] - alone[None]).max() > 0.01 < abs(alone["air"] - alone["med"]).max()


def test_removing_an_adapter_leaves_everything_bit_for_bit_as_it_was(tiny: Path, loras: dict[str, Path]) -> None:
    encoder = encoder_of(tiny)
    base = vectors(encoder, [None] * len(TEXTS))
    encoder.load({"air": loras["air"]})
    before = vectors(encoder, ["air", None] * 3)
    encoder.load({"med": loras["med"]})
    encoder.unload("med")
    assert vectors(encoder, ["air", None] * 3).tobytes() == before.tobytes()
    encoder.unload("air")
    assert vectors(encoder, [None] * len(TEXTS)).tobytes() == base.tobytes()
    assert encoder.names == []


def test_adapters_come_and_go_while_others_are_used(tiny: Path, loras: dict[str, Path]) -> None:
    encoder = encoder_of(tiny)
    encoder.load({"air": loras["air"]})
    expected = vectors(encoder, ["air"] * len(TEXTS))
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            encoder.load({"med": loras["med"]})
            encoder.unload("med")

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(30):
            np.testing.assert_allclose(vectors(encoder, ["air"] * len(TEXTS)), expected, atol=2e-6)
    finally:
        stop.set()
        other.join()


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(
    tiny: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    encoder = encoder_of(tiny)
    with pytest.raises(ExpertConfigError, match=r"adapter 'new': adapter_config.json cannot be read"):
        encoder.load({"air": loras["air"], "new": tmp_path})
    assert encoder.names == []
    with pytest.raises(ExpertConfigError, match="no adapter 'air' is loaded"):
        vectors(encoder, ["air"] * len(TEXTS))
    with pytest.raises(ExpertConfigError, match="no adapter 'air' is loaded"):
        encoder.unload("air")


def test_a_folder_with_layers_that_are_not_here_is_refused(tiny: Path, tmp_path: Path) -> None:
    for path in tiny.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "modules.json").unlink()
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "2", "type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ExpertConfigError, match="module 'Dense' is not supported"):
        EncoderFiles.find(EmbedderConfig(model=str(tmp_path)))
