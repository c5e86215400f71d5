"""What Ray and Ray Serve read from the environment when they start, chosen so that several services fit on one machine.

Every value gives way to one that is set already.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from router_service.settings import Settings

_PORT_BLOCKS = range(20_000, 32_000, 100)
"""Below the ports that Linux gives to outgoing connections."""


def serve_environment(settings: Settings, folder: Path) -> dict[str, str]:
    """Variables for a Ray that serves `settings` and keeps its sockets in `folder`.

    The folder's path may have 25 bytes: HAProxy takes sockets of 97, and Serve puts a node's id of 56 into them.
    """
    stats, metrics, fallback_http, fallback_grpc = (str(port) for port in free_ports(4))
    http, grpc = free_block(), free_block()
    return {
        # The throughput that was measured needs both: HAProxy before the replicas, and user code on the replica's loop.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "ha" / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "ha" / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "ha" / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder / "ha"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "ha" / "server-state"),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback_http,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": fallback_grpc,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http.stop),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc.stop),
        # How long a replica waits for load balancers beyond our own HAProxy, which there are none of by default.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(settings.max_body_bytes + (1 << 20)),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Replicas are no background work: Ray would run them at niceness 15.
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # A proxy that needs longer on a busy machine is not killed for it.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # Workers are started for the deployments alone.
        "RAY_prestart_worker_first_driver": "0",
    }


def service_environment(settings: Settings) -> dict[str, str]:
    """Variables by which a replica reads the same settings: what the command line changed, as absolute paths."""
    values = {
        "ROUTER_HOST": settings.host,
        "PORT": str(settings.port),
        "ROUTER_DATA_FOLDER": str(settings.data_folder.expanduser().resolve()),
    }
    if settings.index:
        values["ROUTER_INDEX"] = str(settings.index.expanduser().resolve())
    return values | ({"REDIS_URL": settings.redis_url.get_secret_value()} if settings.redis_url else {})


def free_ports(count: int) -> list[int]:
    """`count` ports of the loopback interface that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def free_block() -> range:
    """A hundred ports for replicas to choose from, which the services on this machine hardly ever share."""
    while not port_is_free("127.0.0.1", start := secrets.choice(_PORT_BLOCKS)):
        continue
    return range(start, start + 99)


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host.strip("[]"), port))
        except OSError:
            return False
        return True
