"""Gates that are told, request by request, which adapters suit its task: GLIDER's global half before the engine.

A saved mixture with a router beside its gate (`router-service train glider`) is steered: a request to its entry, or to
its base as `BASE+gate:NAME`, gets the bias that `routers.guide` makes of its text, unless it brings a `gate_bias` of
its own. The writer's calls are the service's own: they are charged to nobody, and fail to the query's own embedding.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

from experts.expert import AdapterHost, Expert, ExpertRequest, Part
from experts.fleet import Fleet, FleetEntry, MixtureSource
from experts.mixtures import is_mixture, parse_mixture
from routers.artefact import ARTEFACT_FILE
from routers.contracts import Call
from routers.errors import InvalidRequestError
from routers.guide import Guide
from routers.query import query_from_body
from routers.registry import load_router

ROUTER_FOLDER = "router"


class SteeredExpert:
    """An expert that answers with gates, each of which has a guide. `own` is its own gate, where it is one."""

    def __init__(self, inner: Expert, guides: Mapping[str, Guide], call: Call, *, own: str | None = None) -> None:
        self.inner = inner
        self._guides, self._call, self._own = guides, call, own

    async def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        """As the expert does, after its gate was told what the request is about."""
        async for part in self.inner.generate(await self._told(request)):
            yield part

    async def embed(self, request: ExpertRequest) -> Part:
        """As the expert does."""
        return await self.inner.embed(request)

    async def healthy(self) -> bool:
        """Whether the expert is."""
        return await self.inner.healthy()

    async def close(self) -> None:
        """Close the expert."""
        await self.inner.close()

    async def _told(self, request: ExpertRequest) -> ExpertRequest:
        guide = self._guides.get(self._gate_of(request) or "")
        if guide is None or "gate_bias" in request.body:
            return request
        try:
            query = query_from_body(request.endpoint, request.body)
        except InvalidRequestError:
            return request  # the expert says what is wrong with it
        guidance = await guide(query, self._call)
        return replace(request, body={**request.body, "gate_bias": guidance.gate_bias})

    def _gate_of(self, request: ExpertRequest) -> str | None:
        """The gate that a request asks for; raises what the expert would raise for a name that is none."""
        model = request.body.get("model")
        if self._own is None and is_mixture(model):
            return parse_mixture(str(model)).gate
        return self._own


class SteeredHost(SteeredExpert):
    """A base whose gates have guides, and which takes adapters while it serves."""

    def __init__(self, inner: Expert, host: AdapterHost, guides: Mapping[str, Guide], call: Call) -> None:
        super().__init__(inner, guides, call)
        self._host = host

    async def load_adapter(self, name: str, path: str, revision: str | None = None) -> None:
        """As the base does."""
        await self._host.load_adapter(name, path, revision)

    async def unload_adapter(self, name: str) -> None:
        """As the base does."""
        await self._host.unload_adapter(name)

    def adapted(self, entry: FleetEntry) -> Expert:
        """As the base does."""
        return self._host.adapted(entry)


def steered(fleet: Fleet, experts: Mapping[str, Expert]) -> dict[str, Expert]:
    """The experts, those with a guided gate in a `SteeredExpert`. Raises `RouterConfigError` for what is no router."""
    result, by_base = dict(experts), dict[str, dict[str, Guide]]()

    async def call(expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
        async for part in experts[expert].generate(request):
            yield part

    for entry in fleet.experts:
        if entry.mixture and (guide := _guide(entry.mixture)):
            result[entry.name] = SteeredExpert(experts[entry.name], {entry.name: guide}, call, own=entry.name)
            names = entry.name, Path(entry.mixture.gate or "").name
            by_base.setdefault(entry.mixture.base, {}).update(dict.fromkeys(names, guide))
    for base, guides in by_base.items():
        inner = experts[base]
        if isinstance(inner, AdapterHost):
            result[base] = SteeredHost(experts[base], inner, guides, call)
        else:
            result[base] = SteeredExpert(inner, guides, call)
    return result


def _guide(mixture: MixtureSource) -> Guide | None:
    """That of a mixture with a router beside its gate."""
    folder = Path(mixture.gate or "") / ROUTER_FOLDER
    if mixture.gate is None or not (folder / ARTEFACT_FILE).is_file():
        return None
    return Guide(load_router(folder), writer=mixture.writer)
