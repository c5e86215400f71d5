"""What an instance chooses for itself, so that several fit on one machine."""

from __future__ import annotations

import socket
from pathlib import Path

from pydantic import SecretStr

from router_service.serve.environment import (
    free_block,
    free_ports,
    port_is_free,
    serve_environment,
    service_environment,
)
from router_service.settings import Settings, read_settings


def test_two_instances_share_nothing() -> None:
    first, second = (serve_environment(Settings(), Path(f"/tmp/{name}")) for name in "ab")
    alike = {name for name in first if first[name] == second[name] and ("PORT" in name or "PATH" in name)}
    assert not {name for name in alike if not name.startswith("RAY_SERVE_DIRECT_INGRESS")}
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


def test_the_ports_of_an_instance_differ() -> None:
    assert len(set(free_ports(20))) == 20
    assert len(free_block()) == 99


def test_a_port_that_is_taken_is_not_free() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
    assert port_is_free("127.0.0.1", port)


def test_a_replica_reads_the_settings_of_the_command_line(tmp_path: Path) -> None:
    settings = Settings(
        host="::1", port=8123, redis_url=SecretStr("unix:///r.sock"), data_folder=tmp_path, shutdown_grace_s=3.0
    )
    environment = {"ROUTER_SHUTDOWN_GRACE_S": "3", **service_environment(settings)}
    assert read_settings(environment) == settings
