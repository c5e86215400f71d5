"""A fitted router on disk: `router.json` (what it is) beside `router.safetensors` (its arrays). No pickle, no code.

`router.json` names every array with its shape and type and carries the SHA-256 of `router.safetensors`, so that two
files that do not belong together, or that another version wrote, are refused at load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from routers.errors import RouterConfigError

FORMAT = 1
ARTEFACT_FILE, _ARRAYS = "router.json", "router.safetensors"

AnyArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Artefact:
    """What a router needs to be itself again. `header` is plain JSON data."""

    folder: Path
    header: Mapping[str, Any]
    arrays: Mapping[str, AnyArray]

    def array(self, name: str, *shape: int | None) -> AnyArray:
        """The array `name`. Each size of `shape` must hold, None for any, and no value may be infinite.

        Raises `RouterConfigError`.
        """
        array = self.arrays.get(name)
        if array is None:
            self.refuse(f"lacks the array {name!r}")
        fits = array.ndim == len(shape) and all(
            want in (None, size) for want, size in zip(shape, array.shape, strict=True)
        )
        if not fits:
            self.refuse(f"has array {name!r} in shape {array.shape} instead of {shape}")
        if array.dtype.kind == "f" and np.isinf(array).any():
            self.refuse(f"has infinite values in array {name!r}")
        return array

    def known(self, name: str, *shape: int | None) -> AnyArray:
        """As `array`, and no value may be NaN either."""
        array = self.array(name, *shape)
        if array.dtype.kind == "f" and np.isnan(array).any():
            self.refuse(f"has unknown values in array {name!r}")
        return array

    def refuse(self, what: str) -> NoReturn:
        """Raise `RouterConfigError` about this folder."""
        raise RouterConfigError(f"router artefact {str(self.folder)!r} {what}")


def write(folder: Path, header: Mapping[str, Any], arrays: Mapping[str, AnyArray]) -> None:
    """Write both files into `folder`, `router.json` last: a reader finds the old router or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    blob = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    described = {
        "format": FORMAT,
        **header,
        "arrays": {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()},
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    _replace(folder / _ARRAYS, blob)
    _replace(folder / ARTEFACT_FILE, json.dumps(described, indent=1, allow_nan=False).encode() + b"\n")


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def read(folder: Path) -> Artefact:
    """Read and check what `write` wrote. Raises `RouterConfigError`."""
    header = read_header(folder)
    artefact = Artefact(folder, header, {})
    try:
        blob = (folder / _ARRAYS).read_bytes()
        arrays = load(blob)
    except (OSError, SafetensorError) as error:
        raise RouterConfigError(f"router artefact {str(folder)!r}: {_ARRAYS} cannot be read: {error}") from error
    if header.get("sha256") != hashlib.sha256(blob).hexdigest():
        artefact.refuse(f"is broken: {_ARRAYS} is not the file that {ARTEFACT_FILE} was written with")
    found = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}
    if header.get("arrays") != found:
        artefact.refuse(f"is broken: {ARTEFACT_FILE} describes other arrays than {_ARRAYS} holds")
    return Artefact(folder, header, arrays)


def read_header(folder: Path) -> dict[str, Any]:
    """The contents of `router.json`, of this version and naming its router. Raises `RouterConfigError`."""
    try:
        header = json.loads((folder / ARTEFACT_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise RouterConfigError(f"router artefact {str(folder)!r}: {ARTEFACT_FILE} cannot be read: {error}") from error
    artefact = Artefact(folder, {}, {})
    if not isinstance(header, dict) or not isinstance(header.get("router"), str):
        artefact.refuse(f"is broken: {ARTEFACT_FILE} does not name a router")
    if header.get("format") != FORMAT:
        artefact.refuse(f"has format {header.get('format')!r}, this version reads {FORMAT}: fit the router again")
    return header
