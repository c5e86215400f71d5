"""Who is next: tenants share an engine evenly, and so do the adapters of a tenant.

A virtual token counter (arXiv 2401.00588): whoever has been served the fewest tokens comes first, and who comes back
from a pause starts level with those who waited meanwhile. Counting what was really generated, as it is generated, needs
no guess of how long an answer will be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from experts.local.row import Job

_OVERTAKERS = 32
"""So many may go past one that does not fit yet (its adapters find no slot); then it is waited for."""

_REMEMBERED = 4096

T = TypeVar("T")


class _Shares(Generic[T]):
    """Those who wait, the one that was served least first."""

    def __init__(self) -> None:
        self.waiting: dict[str, T] = {}
        self._served: dict[str, float] = {}
        self._floor = 0.0

    def enter(self, key: str, what: T) -> T:
        """Begin to wait."""
        floor = min((self._served[other] for other in self.waiting), default=self._floor)
        if len(self._served) > _REMEMBERED:
            self._served = {other: self._served[other] for other in self.waiting}
        self._served[key] = max(self._served.get(key, 0.0), floor)
        self.waiting[key] = what
        return what

    def leave(self, key: str) -> None:
        """Wait for nothing any more."""
        self._floor = self._served[key]
        del self.waiting[key]

    def charge(self, key: str, tokens: float) -> None:
        """Count tokens that `key` was served."""
        if key in self._served:
            self._served[key] += tokens

    def __iter__(self) -> Iterator[tuple[str, T]]:
        return iter([(key, self.waiting[key]) for key in sorted(self.waiting, key=self._served.__getitem__)])


class _Tenant:
    def __init__(self) -> None:
        self.flows: _Shares[deque[Job]] = _Shares()

    def __len__(self) -> int:
        return sum(map(len, self.flows.waiting.values()))


class FairQueue:
    """Jobs that wait, in queues by tenant and adapter. Not thread safe."""

    def __init__(self) -> None:
        self._tenants: _Shares[_Tenant] = _Shares()

    def __len__(self) -> int:
        return sum(map(len, self._tenants.waiting.values()))

    def push(self, job: Job) -> None:
        """Let a job wait."""
        name, label = job.flow
        tenants = self._tenants
        tenant = tenants.waiting.get(name) or tenants.enter(name, _Tenant())
        flow = tenant.flows.waiting.get(label)
        (tenant.flows.enter(label, deque()) if flow is None else flow).append(job)

    def pop(self, fits: Callable[[Job], bool]) -> Job | None:
        """The next job that fits; None where there is none, or where one that does not was overtaken often enough."""
        blocked: list[Job] = []
        for _, tenant in self._tenants:
            for _, flow in tenant.flows:
                job = flow[0]
                if job.cancelled or fits(job):
                    for other in blocked:
                        other.overtaken += 1
                    self.remove(job)
                    return job
                if job.overtaken >= _OVERTAKERS:
                    return None
                blocked.append(job)
        return None

    def charge(self, flow: tuple[str, str], tokens: float) -> None:
        """Count tokens that were read or made for a tenant's adapter."""
        name, label = flow
        self._tenants.charge(name, tokens)
        if (tenant := self._tenants.waiting.get(name)) is not None:
            tenant.flows.charge(label, tokens)

    def remove(self, job: Job) -> None:
        """Take out a job that waits."""
        name, label = job.flow
        tenant = self._tenants.waiting[name]
        flow = tenant.flows.waiting[label]
        flow.remove(job)
        if not flow:
            tenant.flows.leave(label)
        if not tenant.flows.waiting:
            self._tenants.leave(name)

    def drop_cancelled(self) -> None:
        """Take out the jobs that nobody waits for any more."""
        for job in [job for job in self if job.cancelled]:
            self.remove(job)

    def displaced_by(self, tenant: str) -> Job | None:
        """The newest job of whoever has the most waiting, where that is more than `tenant` would have."""
        own = self._tenants.waiting.get(tenant)
        _, most = max(self._tenants.waiting.items(), key=lambda item: len(item[1]))
        if len(most) <= (len(own) if own else 0) + 1:
            return None
        return max(most.flows.waiting.values(), key=len)[-1]

    def __iter__(self) -> Iterator[Job]:
        return iter([job for _, tenant in self._tenants for _, flow in tenant.flows for job in flow])
