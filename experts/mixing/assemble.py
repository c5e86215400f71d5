"""A mixture laid together from adapters whose gates were made apart, one adapter at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from experts.errors import MixingError
from experts.mixing.install import GATE_FILE, GateFile, gate_options, gate_type, read_gate_file

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def assemble_mixture(
    gates: Mapping[str, Path], adapters: Mapping[str, Path], folder: Path, options: Mapping[str, Any] | None = None
) -> None:
    """Write the mixture of the adapters `gates` names into `folder`, as `Mixture.save` does.

    Only for gates whose tensors have a row for each adapter that is that adapter's alone (`Gate.by_rows`). Rows and
    adapters' files are those of the parts, bit for bit.

    Args:
        gates: Adapter -> the gate file of a mixture of that adapter alone. All of one method.
        adapters: Adapter -> its folder, in PEFT's format.
        options: Of the method in this mixture; by default its paper's, with no more adapters than there are.
    """
    parts = {name: read_gate_file(path) for name, path in gates.items()}
    method = _common_method(parts)
    tensors: dict[str, list[Tensor]] = {}
    for _, own in parts.values():
        for key, tensor in own.items():
            tensors.setdefault(key, []).append(tensor)
    for name in parts:
        own_folder = folder / "adapters" / name
        own_folder.mkdir(parents=True, exist_ok=True)
        for file in ADAPTER_FILES:
            shutil.copyfile(adapters[name] / file, own_folder / file)
    chosen = gate_options(method, options if options is not None else _usual(method, len(parts)))
    described = GateFile(gate=method, options=chosen.model_dump(mode="json"), adapters=list(parts))
    save_file(
        {key: torch.cat(rows) for key, rows in tensors.items()},
        folder / GATE_FILE,
        metadata={"mixture": described.model_dump_json()},
    )


def _common_method(parts: Mapping[str, tuple[GateFile, Mapping[str, Tensor]]]) -> str:
    if not parts:
        raise MixingError("give at least one adapter")
    methods = {described.gate for described, _ in parts.values()}
    if len(methods) > 1:
        raise MixingError(f"the gates are of several methods: {', '.join(sorted(methods))}")
    (method,) = methods
    if not gate_type(method).by_rows:
        raise MixingError(f"gate {method!r} is made for all its adapters together: it cannot be laid together of parts")
    for name, (described, _) in parts.items():
        if described.adapters != [name]:
            raise MixingError(f"the gate file of {name!r} is that of {', '.join(described.adapters)}")
    return method


def _usual(method: str, adapters: int) -> dict[str, Any]:
    """The method's `k`, at most the number of adapters."""
    return {"k": min(gate_options(method, None).model_dump()["k"], adapters)}
