"""Adapters in host memory, of which the least recently used make room on the device (S-LoRA, arXiv 2311.03285)."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from experts.local.lora import LoraWeights
from experts.local.sites import HostPart, Site


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A registered adapter in host memory. Another one under its name leaves it as it is, for those who use it."""

    name: str
    parts: Mapping[str, HostPart]  # site -> its part

    @property
    def rank(self) -> int:
        return max(part.rank for part in self.parts.values())

    @property
    def bytes(self) -> int:
        return sum(part.a.nbytes + part.b.nbytes for part in self.parts.values())


class AdapterPool:
    """Which adapters are on the device, each in a slot of all sites. Not thread safe: it is its engine's.

    `hits` and `loads` count adapters that a request found there and that had to be copied, `load_s` the time it took.
    """

    def __init__(self, sites: Mapping[str, Site], slots: int) -> None:
        self.slots = slots
        self.hits = self.loads = 0
        self.load_s = 0.0
        self._sites = sites
        self._place: OrderedDict[Adapter, int] = OrderedDict()  # the least recently used first
        self._free = list(range(slots))
        self._pins: Counter[Adapter] = Counter()

    @property
    def resident(self) -> int:
        """How many adapters are on the device."""
        return len(self._place)

    def slot(self, adapter: Adapter) -> int:
        """Where an acquired adapter is."""
        return self._place[adapter]

    def fits(self, adapters: Iterable[Adapter]) -> bool:
        """Whether there is room for adapters, beside those in use."""
        missing, idle = self._missing_and_idle(dict.fromkeys(adapters))
        return len(missing) <= len(self._free) + len(idle)

    def acquire(self, adapters: Iterable[Adapter]) -> None:
        """Have adapters, which must fit, on the device until they are released.

        Where one cannot be copied, none is held, and those on the device stay as they are.
        """
        wanted = dict.fromkeys(adapters)
        missing, idle = self._missing_and_idle(wanted)
        self.hits += len(wanted) - len(missing)
        for adapter in missing:
            if not self._free:
                self._free.append(self._place.pop(idle.pop(0)))
            self._load(adapter)
        for adapter in wanted:
            self._place.move_to_end(adapter)
            self._pins[adapter] += 1

    def _missing_and_idle(self, wanted: Mapping[Adapter, None]) -> tuple[list[Adapter], list[Adapter]]:
        """Those of `wanted` that are not on the device, and those there that nobody uses or wants."""
        missing = [adapter for adapter in wanted if adapter not in self._place]
        return missing, [adapter for adapter in self._place if adapter not in self._pins and adapter not in wanted]

    def release(self, adapters: Iterable[Adapter]) -> None:
        """Undo one `acquire` of the same adapters."""
        for adapter in dict.fromkeys(adapters):
            self._pins[adapter] -= 1
            if not self._pins[adapter]:
                del self._pins[adapter]

    def forget(self, adapter: Adapter) -> None:
        """Let go of an adapter that nobody can ask for any more; one in use goes when its slot is needed."""
        if adapter in self._place and adapter not in self._pins:
            self._free.append(self._place.pop(adapter))

    def _load(self, adapter: Adapter) -> None:
        started = time.perf_counter()
        slot = self._free[-1]
        for name, site in self._sites.items():
            part = adapter.parts.get(name)
            if part is not None:
                site.reserve(part)
            site.write(slot, part)
        self._place[adapter] = self._free.pop()
        self.loads += 1
        self.load_s += time.perf_counter() - started


def adapter_of(name: str, weights: Mapping[str, LoraWeights], sites: Iterable[Site]) -> Adapter:
    """An adapter from its matrices, by layer, as `read_adapter` gives them."""
    parts = {site.name: site.host_part(weights) for site in sites}
    return Adapter(name, {site: part for site, part in parts.items() if part is not None})
