"""`/v1/adapters`: adapters on the models and encoders in service, added and removed while it runs.

POST    {"name", "base", "path", "revision"?, any field of the card}; `path` is an absolute folder, an fsspec URL or a
        name on the hub, where alone there are revisions
GET     those that were added
DELETE  /v1/adapters/NAME
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import ValidationError

from experts.cards import ExpertCard
from experts.fleet import FleetEntry
from router_service.core.service import Service
from router_service.errors import BadRequestError
from router_service.http.connection import Connection
from router_service.state.adapters import Registered

_SOURCE: Final = frozenset({"base", "path", "revision"})
_FIELDS: Final = _SOURCE | set(ExpertCard.model_fields) - {"kind"}


async def add_adapter(service: Service, connection: Connection) -> None:
    """Load an adapter and route to it from now on; with `replace`, in the place of one that was added."""
    service.admission.authenticate_admin(connection.header(b"authorization"))
    body = await connection.read_object(service.settings.max_body_bytes)
    replacing = body.pop("replace", False)
    if not isinstance(replacing, bool):
        raise BadRequestError("'replace' must be true or false", param="replace")
    with service.gate:
        one = await service.adapters.add(_entry(body, service), replacing=replacing)
    await connection.send_json({**_described(one), "policies": service.may_choose(one.entry.name)}, status=201)


async def list_adapters(service: Service, connection: Connection) -> None:
    """Say which were added, and what is wrong with those that cannot be loaded."""
    service.admission.authenticate(connection.header(b"authorization"))
    faults = service.adapters.faults
    taken = service.adapters.taken
    data = [{**_described(one), "fault": faults.get(name)} for name, one in taken.items()]
    data += [{"object": "adapter", "name": name, "fault": faults[name]} for name in faults if name not in taken]
    await connection.send_json({"object": "list", "data": data})


async def remove_adapter(service: Service, connection: Connection, name: str) -> None:
    """Take an adapter out of use."""
    service.admission.authenticate_admin(connection.header(b"authorization"))
    with service.gate:
        await service.adapters.remove(name)
    await connection.send_json({"object": "adapter", "name": name, "deleted": True})


def _entry(body: dict[str, Any], service: Service) -> FleetEntry:
    """The body as a fleet file's entry. Raises `BadRequestError`."""
    if unknown := sorted(set(body) - _FIELDS):
        message = f"an adapter has no field {unknown[0][:64]!r}: {', '.join(sorted(_FIELDS))}"
        raise BadRequestError(message, param=unknown[0][:64])
    for name in ("name", "base", "path"):
        if not isinstance(body.get(name), str):
            raise BadRequestError(f"{name!r} must be a text", param=name)
    if body["path"].startswith((".", "~")):
        raise BadRequestError(
            "'path' must be an absolute folder, an fsspec URL (s3://...) or a name on the hub", param="path"
        )
    base = service.cards.get(body["base"])
    if base is None:
        raise BadRequestError(f"there is no expert {body['base'][:128]!r} to be the base", param="base")
    card = {name: value for name, value in body.items() if name not in _SOURCE}
    kind = "embedding" if base.kind == "embedding" else "adapter"
    source = {name: value for name, value in body.items() if name in _SOURCE}
    try:
        return FleetEntry.model_validate({**card, "kind": kind, "adapter": source})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])).removeprefix("adapter.")
        raise BadRequestError(f"{where}: {first['msg']}", param=where or None) from error


def _described(one: Registered) -> dict[str, Any]:
    card = one.entry.card.model_dump(mode="json")
    return {"object": "adapter", "name": one.entry.name, **one.source.model_dump(), "added_at": one.at, "expert": card}
