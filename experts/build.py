"""From a fleet's entries to experts that answer."""

from __future__ import annotations

from collections.abc import Iterable

import httpx

from experts.expert import Expert
from experts.fleet import ExpertGroup, Fleet, FleetEntry


def build_experts(fleet: Fleet) -> dict[str, Expert]:
    """Every expert of a fleet in this process, by name."""
    experts = build_remotes(fleet.proxied)
    for group in fleet.groups:
        experts |= build_group(group)
    return {entry.name: experts[entry.name] for entry in fleet.experts}


def build_group(group: ExpertGroup) -> dict[str, Expert]:
    """The experts that are deployed together: a local model or an encoder with its adapters, or a remote expert.

    Loads and warms up the model, so it takes seconds or more. Raises `ExpertConfigError`.
    """
    if group.head.remote:
        return build_remotes([group.head])
    if group.head.encoder:
        from experts.embedding.expert import build_encoder

        return build_encoder(group)
    if group.head.local and group.head.local.engine == "vllm":
        from experts.local.vllm import build_vllm

        return build_vllm(group)
    from experts.local.expert import build_local

    return build_local(group)


def build_remotes(entries: Iterable[FleetEntry]) -> dict[str, Expert]:
    """Remote experts, by name, that share one connection pool. Raises `ExpertConfigError` where a key is missing."""
    from experts.remote import RemoteExpert
    from experts.shared import Shared
    from experts.transport import AiohttpTransport

    transport = AiohttpTransport()
    shared = Shared[httpx.AsyncBaseTransport](transport, transport.aclose)
    return {entry.name: RemoteExpert(entry, shared) for entry in entries}
