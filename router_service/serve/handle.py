"""An expert whose replicas run elsewhere in the cluster, called over a Ray Serve handle that is made once and kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from experts.errors import ExpertError, ExpertTimeoutError, ExpertUnavailableError
from experts.expert import ExpertRequest, Part
from experts.fleet import FleetEntry
from router_service.serve.wire import Reply, pack_request, unpack_reply

ACCEPT_TIMEOUT_S = 5.0
"""How long a request may wait for a replica: while one that died is replaced, another expert answers sooner."""

_LOAD_S = 60.0
"""How long a replica may take to load an adapter, which it may have to fetch."""

_MARGIN_S = 1.0
"""What an expert has beyond the request's own timeout to say itself that it is late."""

T = TypeVar("T")


class HandleExpert:
    """Calls the expert `name` on any replica of its group. A replica that dies makes it unavailable.

    `accept_timeout_s` `None` lets a request wait as long as it may, for a group that starts replicas on demand.
    """

    def __init__(
        self, name: str, handle: DeploymentHandle, *, accept_timeout_s: float | None = ACCEPT_TIMEOUT_S
    ) -> None:
        self._name = name
        self._accept_timeout_s = accept_timeout_s
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)
        self._embed = handle.options(method_name="embed")
        self._load_adapter = handle.options(method_name="load_adapter")
        self._healthy = handle.options(method_name="healthy")

    async def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        """Answer part by part; closing the iterator stops the generation in its replica."""
        now = asyncio.get_running_loop().time
        deadline = now() + request.timeout_s + _MARGIN_S
        replies = self._generate.remote(self._name, pack_request(request))
        reply: Reply | None = None
        try:
            reply = await self._within(self._accept_s(request), anext(replies, None), self._not_taken())
            while reply is not None:
                reply = await self._within(deadline - now(), anext(replies, None), self._late())
                if reply is not None:
                    yield unpack_reply(reply)
        finally:
            if reply is not None:
                replies.cancel()

    async def embed(self, request: ExpertRequest) -> Part:
        """Answer an embeddings request."""
        reply = self._embed.remote(self._name, pack_request(request))
        return unpack_reply(await self._within(request.timeout_s + _MARGIN_S, reply, self._late()))

    async def load_adapter(self, name: str, path: str, revision: str | None = None) -> None:
        """Have one replica load an adapter that is registered, which checks it; the others do so when it is needed."""
        reply = self._load_adapter.remote(self._name, name)
        unpack_reply(await self._within(_LOAD_S, reply, self._late()))

    async def unload_adapter(self, name: str) -> None:
        """Nothing is to do: the replicas see soon that it is registered no more."""

    def adapted(self, entry: FleetEntry) -> HandleExpert:
        """The expert that answers through the entry's adapter, on the same replicas."""
        return HandleExpert(entry.name, self._handle, accept_timeout_s=self._accept_timeout_s)

    async def healthy(self) -> bool:
        """Whether a replica says so. The caller bounds the time: where there is no replica, the question waits.

        A group that starts replicas on demand counts as healthy, since the question would start one.
        """
        if self._accept_timeout_s is None:
            return True
        try:
            return bool(await self._healthy.remote(self._name))
        except (RayError, RayServeException):
            return False

    async def close(self) -> None:
        """Nothing is held here: the replicas are the cluster's."""

    async def _within(self, timeout_s: float, answer: Awaitable[T], late: ExpertError) -> T:
        """`answer`, if it comes within `timeout_s`, or `late`. What Ray raises becomes an expert's error."""
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise late from None
        except BackPressureError as error:
            raise ExpertUnavailableError(f"expert {self._name!r} is busy", retry_after_s=1.0) from error
        except (RayError, RayServeException) as error:
            raise ExpertUnavailableError(f"expert {self._name!r} lost its replica: {type(error).__name__}") from error

    def _accept_s(self, request: ExpertRequest) -> float:
        return min(self._accept_timeout_s or request.timeout_s, request.timeout_s)

    def _not_taken(self) -> ExpertUnavailableError:
        return ExpertUnavailableError(f"expert {self._name!r} has no replica that takes a request", retry_after_s=5.0)

    def _late(self) -> ExpertTimeoutError:
        return ExpertTimeoutError(f"expert {self._name!r} did not answer in time")
