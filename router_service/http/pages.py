"""The routes that no expert answers: models, decisions, feedback, health and metrics."""

from __future__ import annotations

import time
from typing import Any

from experts.expert import Endpoint
from router_service.core.exchange import decide
from router_service.core.service import DEFAULT_POLICY, Service
from router_service.core.trace import decision_to_json
from router_service.errors import BadRequestError, ModelNotFoundError
from router_service.http.connection import Connection
from router_service.http.validation import check_body, take_options
from router_service.state.ledger import FEEDBACK
from routers.guide import Guide
from routers.query import query_from_body

_THUMBS = {"up": 1.0, "down": 0.0}
_MAX_ID = 128
_MAX_COMMENT = 4096


class ModelList:
    """Experts and policies in the shape of OpenAI's model list."""

    def __init__(self, service: Service) -> None:
        self._created = int(time.time())
        self._service = service

    def all(self) -> dict[str, Any]:
        """The list."""
        return {"object": "list", "data": list(self._models().values())}

    def one(self, name: str) -> dict[str, Any]:
        """One model. Raises `ModelNotFoundError`."""
        models = self._models()
        if name not in models:
            raise ModelNotFoundError(f"there is no model {name[:128]!r}", param="model")
        return models[name]

    def _models(self) -> dict[str, dict[str, Any]]:
        """By name, as they are now: adapters come and go."""
        models: dict[str, dict[str, Any]] = {}
        for name, plan in self._service.plans.items():
            model = DEFAULT_POLICY if name == DEFAULT_POLICY else f"{DEFAULT_POLICY}:{name}"
            models[model] = self._model(model, "policy", {"description": plan.policy.description})
        for name, card in self._service.cards.items():
            models[name] = self._model(name, "expert", card.model_dump(mode="json"))
        return models

    def _model(self, name: str, kind: str, details: dict[str, Any]) -> dict[str, Any]:
        owner = {"object": "model", "created": self._created, "owned_by": "router-service"}
        return {"id": name, **owner, "kind": kind, kind: details}


async def show_decision(service: Service, connection: Connection) -> None:
    """Say what would be done with a chat completion, or what a gate would be told, without asking any expert."""
    key = service.admission.authenticate(connection.header(b"authorization"))
    body = await connection.read_object(service.settings.max_body_bytes)
    with service.gate:
        body.setdefault("model", DEFAULT_POLICY)
        options = take_options(body, connection)
        check_body(body)
        plan, expert = service.resolve(body["model"])
        decides = plan or _guide(service, expert or "", body)
        await service.admission.admit(key, tokens=0, cost_usd=0.0)
        query = query_from_body(_endpoint(body), body, session=options.session)
        if isinstance(decides, Guide):
            guidance = await decides(query)
            told = {"object": "router.guidance", "expert": expert, **guidance.to_json()}
        else:
            decision = await decide(service, decides, query, key)
            told = {"object": "router.decision", "expert": decision.expert, **decision_to_json(decision)}
    await connection.send_json(told)


def _guide(service: Service, expert: str, body: dict[str, Any]) -> Guide:
    """That of the gate that an expert is asked for. Raises `BadRequestError` where it has none."""
    steering = service.lanes[expert].steering
    guide = steering and steering.guide(body)
    if not guide:
        message = f"{expert!r} is an expert, so there is nothing to decide: name a policy, 'auto' or 'auto:NAME'"
        raise BadRequestError(f"{message}, or a gate with a router beside it", param="model")
    return guide


def _endpoint(body: dict[str, Any]) -> Endpoint:
    return "completions" if "prompt" in body else "chat/completions"


async def take_feedback(service: Service, connection: Connection) -> None:
    """Keep a rating of an answer; 200 says that it will not be lost."""
    key = service.admission.authenticate(connection.header(b"authorization"))
    body = await connection.read_object(service.settings.max_body_bytes)
    with service.gate:
        value = _read_feedback(body)
        await service.admission.admit(key, tokens=0, cost_usd=0.0)
        await service.ledger.commit(FEEDBACK, {**value, "key": key, "at": time.time()})
    await connection.send_json({"object": "router.feedback", **value})


def _read_feedback(body: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(body) - {"id", "rating", "comment"}):
        raise BadRequestError(f"feedback has no field {unknown[0][:64]!r}: id, rating, comment", param=unknown[0][:64])
    answer_id, rating, comment = body.get("id"), body.get("rating"), body.get("comment")
    if not isinstance(answer_id, str) or not 0 < len(answer_id) <= _MAX_ID:
        raise BadRequestError("'id' must be the id of an answer", param="id")
    if isinstance(rating, str):
        rating = _THUMBS.get(rating)
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not 0 <= rating <= 1:
        raise BadRequestError("'rating' must be a number from 0 to 1, or 'up' or 'down'", param="rating")
    if comment is not None and not (isinstance(comment, str) and len(comment) <= _MAX_COMMENT):
        raise BadRequestError(f"'comment' must be text of at most {_MAX_COMMENT} characters", param="comment")
    return {"id": answer_id, "rating": float(rating), "comment": comment}


async def show_status(service: Service, connection: Connection) -> None:
    """Whether the service can do what it was configured to do."""
    status = service.status()
    await connection.send_json(status, status=200 if status["ready"] else 503)


async def show_metrics(service: Service, connection: Connection) -> None:
    """Prometheus' metrics, for those with a key where there are keys."""
    service.admission.authenticate(connection.header(b"authorization"))
    content_type = (b"content-type", service.metrics.content_type.encode())
    await connection.send_body(service.render_metrics(), headers=(content_type,))
