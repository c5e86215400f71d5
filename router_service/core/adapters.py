"""Adapters that come and go while the service runs.

Which there are is written in Redis (`router_service.state.adapters`), so that all processes have the same and a restart
finds them again: the ingress, which then routes to them, and the replicas that host their bases. Each brings what it
has in line with that, every now and then and when it is asked for an adapter that it does not know.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from experts.errors import ExpertConfigError, ExpertError
from experts.expert import AdapterHost, Expert
from experts.fleet import FleetEntry
from router_service.errors import BadRequestError, ConflictError, ModelNotFoundError, StateError
from router_service.state.adapters import Registered, register, registered, replace, withdraw
from router_service.state.link import RedisLink

logger = logging.getLogger(__name__)

_POLL_S = 1.0


class Adapters:
    """The added adapters of the bases among `experts`; `enlist` and `dismiss` take each into use and out of it.

    `check` raises `ExpertConfigError` for one that must not come into use, however well it loads.

    `faults` says of those that could not be loaded why.
    """

    def __init__(
        self,
        link: RedisLink,
        experts: Mapping[str, Expert],
        *,
        enlist: Callable[[FleetEntry, Expert], None],
        dismiss: Callable[[str], None],
        check: Callable[[FleetEntry], None] = lambda _: None,
    ) -> None:
        self.faults: dict[str, str] = {}
        self.taken: dict[str, Registered] = {}
        self._link = link
        self._experts = experts
        self._enlist = enlist
        self._dismiss = dismiss
        self._check = check
        self._in_use: dict[str, Expert] = {}
        self._lock = asyncio.Lock()

    async def add(self, entry: FleetEntry, *, replacing: bool = False) -> Registered:
        """Register an adapter and load it, which checks it: what fails is withdrawn. When this returns, it answers.

        `replacing` lets it take the place of one of its name that was added to the same base: that one answers until
        the new one is loaded, and goes on where it fails.

        Raises `ConflictError` where the name is taken, `BadRequestError` for what cannot be loaded, `StateError`.
        """
        async with self._lock:
            old = self.taken.get(entry.name) if replacing else None
            if entry.name in self._experts and (old is None or entry.name not in self._in_use):
                raise ConflictError(f"there is an expert {entry.name!r}", param="name")
            if old is not None and not _in_place(old, Registered(entry, old.at)):
                raise ConflictError(f"adapter {entry.name!r} is on {old.source.base!r}: remove it first", param="base")
            one = await self._register(entry, old)
            try:
                expert = await self._load(entry)
            except Exception as error:
                with suppress(StateError):
                    await (withdraw(self._link, entry.name) if old is None else replace(self._link, old))
                if isinstance(error, ExpertConfigError):
                    raise BadRequestError(str(error), param="path") from error
                raise
            await self._take(one, expert)
            return one

    async def _register(self, entry: FleetEntry, old: Registered | None) -> Registered:
        """Before a byte is loaded: the name is ours, or another's."""
        if old is not None:
            one = Registered(entry, time.time())
            await replace(self._link, one)
            return one
        registered_now = await register(self._link, entry)
        if registered_now is None:
            raise ConflictError(f"there is an adapter {entry.name!r}, on another base perhaps", param="name")
        return registered_now

    async def remove(self, name: str) -> None:
        """Take an adapter out of use, here and in all other processes. Raises `ModelNotFoundError`, `StateError`."""
        if not await withdraw(self._link, name):
            known = ", ".join(map(repr, self.taken)) or "none"
            raise ModelNotFoundError(f"no adapter {name[:128]!r} was added to the running service; added: {known}")
        await self.sync()

    async def sync(self) -> None:
        """Have what is registered, and nothing else. Raises `StateError`."""
        async with self._lock:
            wanted, unreadable = await registered(self._link)
            for name in [name for name, one in self.taken.items() if not _in_place(one, wanted.get(name))]:
                one = self.taken.pop(name)
                self.faults.pop(name, None)
                if (expert := self._in_use.pop(name, None)) is not None:
                    self._dismiss(name)
                    await self._unload(one.entry)
                    await expert.close()
                    logger.info("adapter %r is out of use", name)
            for name in unreadable.keys() - self.faults.keys():
                logger.error("adapter %r: %s", name, unreadable[name])
            self.faults = {name: why for name, why in self.faults.items() if name in self.taken} | unreadable
            for name, one in wanted.items():
                if self.taken.get(name) != one and one.source.base in self._experts:
                    await self._take_over(one)

    async def watch(self) -> None:
        """Keep in line with what is registered; runs until cancelled."""
        while True:
            with suppress(StateError):
                await self.sync()
            await asyncio.sleep(_POLL_S)

    async def _take_over(self, one: Registered) -> None:
        """Load what another process added, or put in the place of another, which answers meanwhile.

        What is wrong with it stays so; what is away may come back.
        """
        name = one.entry.name
        try:
            if name in self._experts and name not in self._in_use:
                raise ExpertConfigError(f"the fleet has an expert {name!r} already")
            await self._take(one, await self._load(one.entry))
        except ExpertConfigError as error:
            self.taken[name], self.faults[name] = one, str(error)
            logger.error("adapter %r cannot be loaded: %s", name, error)
        except ExpertError as error:
            logger.warning("adapter %r cannot be loaded yet: %s", name, error)
        except Exception as error:  # whatever is wrong with one must not keep the others away
            self.taken[name], self.faults[name] = one, f"{type(error).__name__}: {error}"
            logger.exception("adapter %r cannot be loaded", name)

    async def _take(self, one: Registered, expert: Expert) -> None:
        name = one.entry.name
        old = self._in_use.get(name)
        if old is not None:
            self._dismiss(name)
        self.taken[name], self._in_use[name] = one, expert
        self.faults.pop(name, None)
        self._enlist(one.entry, expert)
        logger.info("adapter %r is in use, from %r", name, one.source.path)
        if old is not None:
            await old.close()

    async def _load(self, entry: FleetEntry) -> Expert:
        """Raises `ExpertConfigError`, or another `ExpertError` where the base cannot be asked now."""
        self._check(entry)
        source = entry.adapter
        host = self._experts.get(source.base) if source else None
        if source is None or not isinstance(host, AdapterHost):
            raise ExpertConfigError(f"there is no base {source.base if source else ''!r} that takes adapters")
        await host.load_adapter(entry.name, source.path, source.revision)
        return host.adapted(entry)

    async def _unload(self, entry: FleetEntry) -> None:
        host = self._experts.get(entry.adapter.base) if entry.adapter else None
        if isinstance(host, AdapterHost):
            with suppress(ExpertError):
                await host.unload_adapter(entry.name)


def _in_place(one: Registered, wanted: Registered | None) -> bool:
    """Whether what is registered is this adapter, or another that may take its place while it answers."""
    if wanted is None:
        return False
    return (one.source.base, one.entry.kind) == (wanted.source.base, wanted.entry.kind)
