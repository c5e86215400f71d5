"""The Serve applications: one for each group of experts, and the ingress that serves HTTP and calls them.

Each is an application of its own, so that the ingress can be drained while the experts still answer it, and one group
changed while the others stay. A Serve config names the same builders (`deploy/serve/pocket.yaml`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from experts.build import build_group
from experts.errors import ExpertConfigError, ExpertError, ExpertUnavailableError
from experts.expert import AdapterHost, Expert, Part
from experts.fleet import POCKET_FLEET, ExpertGroup, FleetEntry, Resources, load_fleet
from router_service.core.adapters import Adapters
from router_service.errors import StateError
from router_service.http.connection import REQUEST_ID, Message, Receive, Scope, Send
from router_service.serve.wire import ACCEPTED, Reply, Request, pack_error, pack_part, unpack_request
from router_service.settings import read_settings
from router_service.state.link import RedisLink

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from router_service.http.application import Application as AsgiApplication
    from router_service.serve.handle import HandleExpert

INGRESS = "router"
"""The ingress's application."""

EXPERTS = "Experts"
"""The deployment of every group, each in an application of its own."""
_NO_LIMIT = 1_000_000
_LOGGING = {"enable_access_log": False}
"""The ledger says who asked what; a line for each request would cost as much as routing it."""

CLOSING_S = 15.0
"""What the ingress has beyond the grace of requests under way: Serve kills it then, written or not."""

_HEALTH_PERIOD_S = 5.0
_HEALTH_TIMEOUT_S = 30.0


class IngressArgs(BaseModel):
    """What the ingress serves. Everything else comes from the environment (`router_service.settings`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fleet: Path = POCKET_FLEET
    policies: Path | None = None
    replicas: int = Field(default=1, ge=1)


class ExpertsArgs(BaseModel):
    """One group of a fleet: the local model (with its adapters), or the remote expert, of that name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fleet: Path = POCKET_FLEET
    group: str


class ExpertReplica:
    """Hosts the experts of one group; `wire` says what comes in and what goes out."""

    def __init__(self, group: ExpertGroup) -> None:
        self._experts = build_group(group)
        self._restartable = group.head.local is not None
        self._adapters = _added_adapters(self._experts)
        self._taking_over: asyncio.Task[bool] | None = None

    async def generate(self, name: str, request: Request) -> AsyncIterator[Reply]:
        """The reply of the expert `name`, part by part, after the word that it is in work."""
        yield ACCEPTED
        try:
            expert = await self._expert(name)
            parts = cast("AsyncGenerator[Part]", expert.generate(unpack_request(request)))
            async with aclosing(parts):
                async for part in parts:
                    yield pack_part(part)
        except ExpertError as error:
            yield pack_error(error)

    async def embed(self, name: str, request: Request) -> Reply:
        """The embeddings, or the error, of the expert `name`."""
        try:
            return pack_part(await (await self._expert(name)).embed(unpack_request(request)))
        except ExpertError as error:
            return pack_error(error)

    async def load_adapter(self, base: str, name: str) -> Reply:
        """Have the adapter `name`, which is registered, or say what is wrong with it."""
        try:
            if not isinstance(self._experts[base], AdapterHost):
                raise ExpertConfigError(f"expert {base!r} takes no adapters while it runs")
            if not await self._take_over():
                raise ExpertUnavailableError("what is registered cannot be read now", retry_after_s=1.0)
            if self._adapters and (fault := self._adapters[1].faults.get(name)):
                raise ExpertConfigError(fault)
            await self._expert(name)
        except ExpertError as error:
            return pack_error(error)
        return ACCEPTED

    async def healthy(self, name: str) -> bool:
        """Whether the expert `name` could answer now."""
        try:
            return await (await self._expert(name)).healthy()
        except ExpertError:
            return False

    async def check_health(self) -> None:
        """Serve's question. A local model that is not healthy gets a new replica; a remote one is as well off here.

        It comes every few seconds, and is when adapters that were added, replaced or removed are seen to: beside it,
        since to fetch one may take longer than Serve waits for an answer.
        """
        if self._taking_over is None or self._taking_over.done():
            if self._taking_over is not None:
                self._taking_over.result()  # raises what went wrong there
            self._taking_over = asyncio.create_task(self._take_over())
        if self._restartable:
            for name, expert in list(self._experts.items()):
                if not await expert.healthy() and self._experts.get(name) is expert:
                    raise RuntimeError(f"expert {name!r} is not healthy")

    async def _expert(self, name: str) -> Expert:
        """The expert `name`; one that is not known may have been added. Raises `ExpertUnavailableError`."""
        if name not in self._experts:
            await self._take_over()
        if name not in self._experts:
            raise ExpertUnavailableError(f"expert {name!r} is not loaded here", retry_after_s=1.0)
        return self._experts[name]

    async def _take_over(self) -> bool:
        """Have the adapters that are registered; whether that can be known now."""
        if self._adapters:
            link, adapters = self._adapters
            if link.up or await link.probe():
                with suppress(StateError):
                    await adapters.sync()
                    return True
        return False

    async def __del__(self) -> None:
        for expert in getattr(self, "_experts", {}).values():
            await expert.close()


def _added_adapters(experts: dict[str, Expert]) -> tuple[RedisLink, Adapters] | None:
    """Where it is written which adapters were added, and what brings `experts` in line with that."""
    settings = read_settings()
    if settings.redis_url is None:
        return None

    def enlist(entry: FleetEntry, expert: Expert) -> None:
        experts[entry.name] = expert

    def dismiss(name: str) -> None:
        del experts[name]

    link = RedisLink(
        settings.redis_url.get_secret_value(), prefix=settings.redis_prefix, timeout_s=settings.redis_timeout_s
    )
    return link, Adapters(link, experts, enlist=enlist, dismiss=dismiss)


def experts(args: ExpertsArgs) -> Application:
    """The application of one group of experts, with the resources that the fleet file gives it."""
    groups = {group.name: group for group in load_fleet(args.fleet).groups}
    if args.group not in groups:
        known = ", ".join(map(repr, groups)) or "none"
        raise ExpertConfigError(f"fleet file {str(args.fleet)!r} deploys no group {args.group!r}; these are: {known}")
    group = groups[args.group]
    deployment = serve.deployment(ExpertReplica).options(
        name=EXPERTS,
        ray_actor_options={"num_cpus": group.resources.cpus, "num_gpus": group.resources.gpus},
        logging_config=_LOGGING,
        max_ongoing_requests=group.resources.max_ongoing_requests,
        max_queued_requests=group.resources.max_ongoing_requests,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=read_settings().shutdown_grace_s,
        **_scale(group.resources),
    )
    return deployment.bind(group)


def ingress(args: IngressArgs) -> Application:
    """The application that serves HTTP: admission, routing, policies, cache, and the calls to remote experts."""
    settings = read_settings()

    def build() -> _OneRequestId:
        return _OneRequestId(_assemble(args))

    deployment = serve.deployment(serve.ingress(build)()).options(
        name="Ingress",
        logging_config=_LOGGING,
        num_replicas=args.replicas,
        ray_actor_options={"num_cpus": 0},
        # The application counts its requests itself and refuses with 429; Serve would refuse with 503.
        max_ongoing_requests=_NO_LIMIT,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.shutdown_grace_s + CLOSING_S,
    )
    return deployment.bind()


def experts_app(group: str) -> str:
    """The name of the application of a group. `~` is in no expert's name, and a `/` would split Serve's log files."""
    return f"experts-{group.replace('/', '~')}"


def _scale(resources: Resources) -> dict[str, Any]:
    scaling = resources.autoscaling
    if scaling is None:
        return {"num_replicas": resources.replicas or 1}
    config = {
        "min_replicas": scaling.min,
        "max_replicas": scaling.max,
        "target_ongoing_requests": scaling.target,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
    }
    return {"autoscaling_config": config}


class _OneRequestId:
    """The application without its `x-request-id`: Serve puts one into every request and echoes it in the answer."""

    def __init__(self, application: AsgiApplication) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != REQUEST_ID]
            await send(message)

        await self._application(scope, receive, send_on)


def _assemble(args: IngressArgs) -> AsgiApplication:
    """The ASGI application in an ingress replica: groups are called over handles, other experts from here."""
    from experts.build import build_remotes
    from router_service.assembly import assemble, read_policies

    fleet = load_fleet(args.fleet)
    built: dict[str, Expert] = dict(build_remotes(fleet.proxied))
    for group in fleet.groups:
        built |= handle_experts(group)
    return assemble(read_settings(), fleet, built, read_policies(args.policies, fleet))


def handle_experts(group: ExpertGroup) -> dict[str, HandleExpert]:
    """The experts of a deployed group, called over its handle."""
    from router_service.serve.handle import ACCEPT_TIMEOUT_S, HandleExpert

    scaling = group.resources.autoscaling
    accept_timeout_s = None if scaling and scaling.min == 0 else ACCEPT_TIMEOUT_S
    handle = serve.get_deployment_handle(EXPERTS, app_name=experts_app(group.name))
    return {entry.name: HandleExpert(entry.name, handle, accept_timeout_s=accept_timeout_s) for entry in group.entries}
