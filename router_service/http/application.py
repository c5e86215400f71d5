"""The ASGI application: finds the route, and turns whatever goes wrong into OpenAI's error body."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from experts.expert import Endpoint
from router_service.core.failures import FAILURES, to_request_error
from router_service.core.service import Service
from router_service.errors import ForbiddenOriginError, MethodNotAllowedError, NotFoundError, RequestError
from router_service.http.adapters import add_adapter, list_adapters, remove_adapter
from router_service.http.answers import answer
from router_service.http.connection import ClientGoneError, Connection, Receive, Scope, Send
from router_service.http.pages import ModelList, show_decision, show_metrics, show_status, take_feedback
from router_service.http.search import search

logger = logging.getLogger(__name__)

Handler = Callable[[Connection], Awaitable[None]]

_ENDPOINTS: Final[tuple[Endpoint, ...]] = ("chat/completions", "completions", "embeddings")
_MODEL = "/v1/models/"
_ADAPTER = "/v1/adapters/"


class InternalError(RequestError):
    """A fault of the service itself: the client learns nothing of it, the log everything."""


class Application:
    """Serves one `Service`. Plain ASGI: hosted by Ray Serve, uvicorn or any other server; needs its lifespan."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._models = ModelList(service)
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/models": {"GET": self._list_models},
            "/v1/route": {"POST": partial(show_decision, service)},
            "/v1/search": {"POST": partial(search, service)},
            "/v1/adapters": {"GET": partial(list_adapters, service), "POST": partial(add_adapter, service)},
            "/v1/feedback": {"POST": partial(take_feedback, service)},
            "/healthz": {"GET": self._be_alive},
            "/readyz": {"GET": partial(show_status, service)},
            "/metrics": {"GET": partial(show_metrics, service)},
        }
        for endpoint in _ENDPOINTS:
            self._routes[f"/v1/{endpoint}"] = {"POST": partial(answer, service, endpoint=endpoint)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI 3)."""
        if scope["type"] == "http":
            await self._respond(Connection(scope, receive, send))
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _respond(self, connection: Connection) -> None:
        try:
            handler = self._find(connection)
            await handler(connection)
        except FAILURES as error:
            told = to_request_error(error)
            self.service.metrics.count_other(self._label(connection.path), told.http_status)
            await connection.fail(told)
        except ClientGoneError:
            return
        except Exception:
            logger.exception("a request failed")
            self.service.metrics.count_other(self._label(connection.path), 500)
            await connection.fail(InternalError("the service failed; its log says why", code="internal_error"))

    def _find(self, connection: Connection) -> Handler:
        path = connection.path
        methods = self._routes.get(path)
        if methods is None and path.startswith(_MODEL):
            methods = {"GET": self._show_model}
        if methods is None and path.startswith(_ADAPTER):
            methods = {"DELETE": partial(remove_adapter, self.service, name=path.removeprefix(_ADAPTER))}
        if methods is None:
            raise NotFoundError(f"there is no route {path[:128]!r}")
        if connection.method not in methods:
            allowed = ", ".join(methods)
            raise MethodNotAllowedError(f"{path[:128]!r} takes {allowed}", headers={"allow": allowed})
        if connection.header(b"origin") and not self.service.settings.key_digests:
            raise ForbiddenOriginError("web pages may use this service only with an API key")
        return methods[connection.method]

    def _label(self, path: str) -> str:
        return path.removeprefix("/v1/") if path in self._routes else "other"

    async def _list_models(self, connection: Connection) -> None:
        self.service.admission.authenticate(connection.header(b"authorization"))
        await connection.send_json(self._models.all())

    async def _show_model(self, connection: Connection) -> None:
        self.service.admission.authenticate(connection.header(b"authorization"))
        await connection.send_json(self._models.one(connection.path.removeprefix(_MODEL)))

    async def _be_alive(self, connection: Connection) -> None:
        await connection.send_json({"status": "ok"})

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan: the service starts and closes with its server."""
        await receive()
        await self.service.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.service.close()
        await send({"type": "lifespan.shutdown.complete"})
