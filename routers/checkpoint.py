"""Checkpoints of a fit that takes many steps, so that a killed fit goes on and ends with the same arrays.

step, arrays = self.checkpoint.load() or (0, initial)
for step in range(step, steps):
    ...                                        # what is random here is drawn from the seed and `step` alone
    self.checkpoint.step(step + 1, steps, lambda: arrays)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from routers.errors import RouterConfigError

Arrays = Mapping[str, npt.NDArray[Any]]

_STEP = "step"


class Checkpoint:
    """Keeps the state of one fit in `folder`, at most every `every_s` seconds; without a folder it keeps nothing.

    `on_progress` hears of every step: how many are done, and of how many. A folder belongs to one fit: the same data,
    options and seed.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        every_s: float = 10.0,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._path = folder / "checkpoint.safetensors" if folder else None
        self._every_s = every_s
        self._on_progress = on_progress
        self._saved_at = time.monotonic()

    def load(self) -> tuple[int, dict[str, npt.NDArray[Any]]] | None:
        """How many steps were done, and the arrays then; None where nothing was kept. Raises `RouterConfigError`."""
        if self._path is None or not self._path.exists():
            return None
        try:
            arrays = load(self._path.read_bytes())
            return int(arrays.pop(_STEP)[0]), arrays
        except (SafetensorError, KeyError) as error:
            raise RouterConfigError(f"checkpoint {str(self._path)!r} cannot be read: {error}") from error

    def step(self, done: int, total: int, arrays: Callable[[], Arrays]) -> None:
        """Say that `done` of `total` steps are done; `arrays` gives the state to go on from, and is asked when due."""
        self._on_progress(done, total)
        if self._path is not None and time.monotonic() - self._saved_at >= self._every_s:
            self._save(self._path, {**arrays(), _STEP: np.array([done])})
            self._saved_at = time.monotonic()

    def _save(self, path: Path, arrays: Arrays) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
        part.replace(path)
