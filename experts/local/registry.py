"""The adapters and gates of a base, by name: loaded, replaced and unloaded while it serves."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TypeVar

from experts.adapter_files import local_copy
from experts.errors import ExpertConfigError, ExpertRequestError
from experts.local.lora import read_adapter
from experts.local.mixture import BASE, Mixture
from experts.local.model import LocalModel
from experts.local.pool import Adapter, adapter_of
from experts.mixing.install import GATE_FILE, load_mixture
from experts.mixing.install import Mixture as GateMixture
from experts.mixtures import MixtureName

T = TypeVar("T")


class AdapterRegistry:
    """Thread safe. A request keeps the adapters that it found, whatever becomes of their names.

    Those of the fleet file may also be named by the last part of their path, where that is only one's.
    """

    def __init__(self, model: LocalModel) -> None:
        self._model = model
        self._adapters: dict[str, Adapter] = {}
        self._gates: dict[str, GateMixture] = {}
        self._short: dict[str, set[str]] = {}
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # one at a time: each more would take the interpreter from who generates

    @property
    def names(self) -> list[str]:
        """The adapters and gates that are loaded."""
        return [*self._adapters, *self._gates]

    def load(self, name: str, path: str, revision: str | None = None, *, short: bool = False) -> Adapter | None:
        """Register a PEFT adapter, or a saved mixture with its gate, from a folder, an fsspec URL or the hub.

        It is read and checked first; one of the same name is replaced, and returned if it was an adapter. `short` lets
        the last part of `path` name it too. Raises `ExpertConfigError`.
        """
        with local_copy(path, revision) as folder, self._reading:
            if (folder / GATE_FILE).exists():
                gate, adapter = load_mixture(self._model.linears.skeleton(), folder), None
            else:
                weights = read_adapter(folder, self._model.linears)
                gate, adapter = None, adapter_of(name, weights, self._model.sites.values())
        with self._lock:
            replaced = self._remove(name)
            if adapter is not None:
                self._adapters[name] = adapter
            if gate is not None:
                self._gates[name] = gate
            if short:
                self._short.setdefault(path.rstrip("/").rpartition("/")[2], set()).add(name)
        return replaced

    def unload(self, name: str) -> Adapter | None:
        """Forget an adapter, which is returned, or a gate. Raises `ExpertConfigError` where there is none."""
        with self._lock:
            if name not in self.names:
                raise ExpertConfigError(f"there is no adapter {name!r}")
            return self._remove(name)

    def _remove(self, name: str) -> Adapter | None:
        for short, names in list(self._short.items()):
            names.discard(name)
            if not names:
                del self._short[short]
        self._gates.pop(name, None)
        return self._adapters.pop(name, None)

    def mixture(self, wanted: MixtureName, bias: Mapping[str, float]) -> Mixture:
        """What a mixture's name stands for; `bias` is the request's for its gate. Raises `ExpertRequestError`."""
        with self._lock:
            return self._mixture(wanted, bias)

    def _mixture(self, wanted: MixtureName, bias: Mapping[str, float]) -> Mixture:
        if wanted.gate is not None:
            return self._gated(wanted.gate, bias)
        if bias:
            message = "gate_bias needs a gate: model BASE+gate:NAME"
            raise ExpertRequestError(message, param="gate_bias", code="invalid_value")
        if len(wanted.weights) > self._model.pool.slots:
            message = f"model: {len(wanted.weights)} adapters are mixed, at most {self._model.pool.slots} can be"
            raise ExpertRequestError(message, param="model", code="invalid_value")
        found = [(self._find(name, self._adapters), weight) for name, weight in wanted.weights.items()]
        if len({adapter for adapter, _ in found}) < len(found):
            raise ExpertRequestError("model: an adapter is named twice", param="model", code="invalid_value")
        label = "+".join(f"{adapter.name}:{weight:g}" for adapter, weight in found)
        return Mixture(label, found) if found else BASE

    def _gated(self, name: str, bias: Mapping[str, float]) -> Mixture:
        gate = self._find(name, self._gates)
        if bias and not gate.gate.takes_bias:
            message = f"gate_bias: gate {name!r} is of the method {gate.gate.method!r}, which takes no bias"
            raise ExpertRequestError(message, param="gate_bias", code="invalid_value")
        if unknown := sorted(set(bias) - set(gate.adapters)):
            message = f"gate_bias: gate {name!r} has no adapter {unknown[0]!r}; it has {', '.join(gate.adapters)}"
            raise ExpertRequestError(message, param="gate_bias", code="invalid_value")
        return Mixture(f"gate:{name}", gate=gate, bias=bias)

    def _find(self, name: str, among: Mapping[str, T]) -> T:
        candidates = [name] if name in among else [full for full in self._short.get(name, ()) if full in among]
        if len(candidates) == 1 and (found := among.get(candidates[0])) is not None:
            return found
        what = "gate" if among is self._gates else "adapter"
        if candidates:
            message = f"model: {what} {name[:128]!r} may be {' or '.join(sorted(candidates))}: write it in full"
        else:
            message = f"model: there is no {what} {name[:128]!r} on this base"
        raise ExpertRequestError(message, status=404, param="model", code="model_not_found")
