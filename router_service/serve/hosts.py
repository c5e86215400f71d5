"""Starts and ends the service: on Ray Serve, or on uvicorn with every expert in the same process."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from experts.fleet import Fleet
from router_service.errors import ServiceError, SettingsError
from router_service.serve.environment import serve_environment, service_environment
from router_service.settings import Settings

if TYPE_CHECKING:
    import uvicorn

_ATTEMPTS = 3
_POLL_S = 0.1

_OBJECT_STORE_BYTES = 80 << 20
"""Nothing of ours goes through Ray's object store, which may not be smaller."""


class HostError(ServiceError):
    """The service could not be started, or stopped by itself."""


class Host(Protocol):
    """Where the application runs."""

    def start(self) -> None:
        """Begin to start it; returns when it is under way. Raises `ServiceError`."""

    def check(self) -> None:
        """Raises `HostError` if it failed for good."""

    def stop(self) -> None:
        """Let requests under way end, then end it."""


class ServeHost:
    """A Ray cluster of this machine's own, or the one that `RAY_ADDRESS` names, with the Serve applications on it."""

    def __init__(self, settings: Settings, fleet: Fleet, fleet_file: Path, policies: Path | None) -> None:
        self._settings = settings
        self._fleet = fleet
        self._fleet_file = fleet_file.resolve()
        self._policies = policies.resolve() if policies else None
        self._owned = not os.environ.get("RAY_ADDRESS")
        # Ray and HAProxy keep unix sockets in it, whose paths may have a hundred bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
        self._clean = False

    def start(self) -> None:
        """Start Ray, then Serve, then have the applications deployed."""
        os.environ.update(service_environment(self._settings))
        if self._owned:
            for name, value in serve_environment(self._settings, self.folder).items():
                os.environ.setdefault(name, value)
        import ray

        self._start_ray()
        check_gpus(self._fleet, ray.cluster_resources().get("GPU", 0.0))
        try:
            self._deploy()
        except ray.exceptions.RayError as error:
            raise HostError(f"Serve cannot be started: {_gist(error)} (logs: {self.logs})") from error
        self._clean = True

    def check(self) -> None:
        """Raises `HostError` with Serve's message if an application cannot be deployed."""
        from ray import serve

        for name, application in serve.status().applications.items():
            if application.status == "DEPLOY_FAILED":
                self._clean = False
                raise HostError(f"{name!r} cannot be deployed: {application.message} (logs: {self.logs})")

    @property
    def logs(self) -> Path:
        """Where Ray and Serve write their logs."""
        return self.folder / "ray" / "session_latest" / "logs"

    def stop(self) -> None:
        """Drain the ingress while the experts still answer it, then end them, then what was started here."""
        import ray

        from router_service.serve.applications import INGRESS, experts_app

        if ray.is_initialized():
            self._delete(INGRESS)
            self._delete(*(experts_app(group.name) for group in self._fleet.groups))
            ray.shutdown()
        if self._clean:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _delete(self, *names: str) -> None:
        """Have Serve end applications, and wait for it: Serve's own waiting gives up after a minute."""
        from ray import serve
        from ray.exceptions import RayError

        from router_service.serve.applications import CLOSING_S

        deadline = time.monotonic() + self._settings.shutdown_grace_s + 2 * CLOSING_S
        with contextlib.suppress(RayError):  # a cluster that is gone has no applications
            for name in names:
                serve.delete(name, _blocking=False)
            while time.monotonic() < deadline and not serve.status().applications.keys().isdisjoint(names):
                time.sleep(_POLL_S)

    def _start_ray(self) -> None:
        """Start Ray, or connect to it. Its agents have fifteen seconds, which a cold machine may need twice."""
        import ray

        for attempt in range(1, _ATTEMPTS + 1):
            try:
                ray.init(**self._cluster())
                return
            except Exception as error:  # Ray raises bare exceptions
                ray.shutdown()
                if attempt == _ATTEMPTS:
                    raise HostError(f"Ray cannot be started: {_gist(error)} (logs: {self.logs})") from error

    def _cluster(self) -> dict[str, object]:
        if not self._owned:
            return {"logging_level": logging.WARNING}
        return {
            # CPUs are counted, not enforced: a small machine serves a fleet that asks for more, if slower.
            "num_cpus": max(os.cpu_count() or 1, most_cpus(self._fleet)),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "log_to_driver": False,
            "logging_level": logging.WARNING,
            "_temp_dir": str(self.folder / "ray"),
        }

    def _deploy(self) -> None:
        from ray import serve
        from ray.serve.config import HTTPOptions

        logging.getLogger("ray.serve").setLevel(logging.WARNING)

        from router_service.serve.applications import INGRESS, ExpertsArgs, IngressArgs, experts, experts_app, ingress

        serve.start(http_options=HTTPOptions(host=self._settings.host, port=self._settings.port))
        targets = [
            serve.RunTarget(
                experts(ExpertsArgs(fleet=self._fleet_file, group=group.name)), experts_app(group.name), None
            )
            for group in self._fleet.groups
        ]
        served = IngressArgs(fleet=self._fleet_file, policies=self._policies)
        targets.append(serve.RunTarget(ingress(served), INGRESS, "/"))
        serve.run_many(targets, wait_for_applications_running=False)


class UvicornHost:
    """The application and all its experts in this process, without Ray."""

    def __init__(self, settings: Settings, fleet: Fleet, policies: Path | None) -> None:
        self._settings = settings
        self._fleet = fleet
        self._policies = policies
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load the experts and start the server in a thread, since signals belong to the main one."""
        import uvicorn

        from experts.build import build_experts
        from router_service.assembly import assemble, read_policies

        policies = read_policies(self._policies, self._fleet)
        application = assemble(self._settings, self._fleet, build_experts(self._fleet), policies)
        config = uvicorn.Config(
            application,
            host=self._settings.host,
            port=self._settings.port,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=ceil(self._settings.shutdown_grace_s),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="uvicorn")
        self._thread.start()

    def check(self) -> None:
        """Raises `HostError` if the server has ended."""
        if self._thread and not self._thread.is_alive():
            raise HostError("the HTTP server ended by itself; its log says why")

    def stop(self) -> None:
        """Let requests under way end, then the server."""
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join()


def most_cpus(fleet: Fleet) -> int:
    """CPUs that a fleet asks for with every group at its most replicas."""
    return ceil(sum(group.resources.bounds[1] * group.resources.cpus for group in fleet.groups))


def check_gpus(fleet: Fleet, there: float) -> None:
    """Raise `SettingsError` if `there` GPUs are too few for every group at its fewest replicas, or for one of any."""
    asked = [group.resources for group in fleet.groups]
    needed = max([sum(each.bounds[0] * each.gpus for each in asked), *(each.gpus for each in asked)])
    if needed > there:
        raise SettingsError(f"the fleet asks for {needed:g} GPUs, and the cluster has {there:g}")


def _gist(error: Exception) -> str:
    """The last line of what Ray says, which comes after the traces of every process that it passed through."""
    return str(error).strip().splitlines()[-1]
