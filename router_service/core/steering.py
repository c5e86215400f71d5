"""Gates that are told, request by request, which adapters suit its task: GLIDER's global half before the engine.

A saved mixture with a router beside its gate (`router-service train glider`) is steered: a request to its entry, or to
its base as `BASE+gate:NAME`, gets the bias that `routers.guide` makes of its text, unless it brings a `gate_bias` of
its own. The writer is called as any other expert is for the request: on its account, and within its ceilings and time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experts.expert import ExpertRequest
from experts.fleet import Fleet, MixtureSource
from experts.mixtures import is_mixture, parse_mixture
from routers.artefact import ARTEFACT_FILE
from routers.contracts import Call
from routers.errors import InvalidRequestError
from routers.guide import Guide
from routers.query import query_from_body
from routers.registry import load_router

ROUTER_FOLDER = "router"


@dataclass(frozen=True, slots=True)
class Steering:
    """The guides of the gates that an expert may be asked for. `own` is its own gate, where it is one."""

    guides: Mapping[str, Guide]
    own: str | None = None

    def guide(self, body: Mapping[str, Any]) -> Guide | None:
        """That of the gate that a body asks for. Raises what the expert would raise for a name that is none."""
        model = body.get("model")
        gate = parse_mixture(str(model)).gate if self.own is None and is_mixture(model) else self.own
        return self.guides.get(gate or "")

    async def told(self, request: ExpertRequest, call: Call) -> ExpertRequest:
        """The request with the bias of its task; `call` asks the writer."""
        guide = self.guide(request.body)
        if guide is None or request.body.get("gate_bias") is not None:
            return request
        try:
            query = query_from_body(request.endpoint, request.body)
        except InvalidRequestError:
            return request  # the expert says what is wrong with it
        guidance = await guide(query, call)
        return replace(request, body={**request.body, "gate_bias": guidance.gate_bias})


def read_steering(fleet: Fleet) -> dict[str, Steering]:
    """The steering of each expert that has a guided gate, by name. Raises `RouterConfigError` for what is no router."""
    found, by_base = dict[str, Steering](), dict[str, dict[str, Guide]]()
    for entry in fleet.experts:
        if entry.mixture and (guide := _guide(entry.mixture)):
            found[entry.name] = Steering({entry.name: guide}, own=entry.name)
            names = entry.name, Path(entry.mixture.gate or "").name
            by_base.setdefault(entry.mixture.base, {}).update(dict.fromkeys(names, guide))
    return found | {base: Steering(guides) for base, guides in by_base.items()}


def _guide(mixture: MixtureSource) -> Guide | None:
    """That of a mixture with a router beside its gate."""
    folder = Path(mixture.gate or "") / ROUTER_FOLDER
    if mixture.gate is None or not (folder / ARTEFACT_FILE).is_file():
        return None
    return Guide(load_router(folder), writer=mixture.writer)
