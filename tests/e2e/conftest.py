"""One real service for all these tests: Ray Serve, private Redis, the pocket fleet, another service to proxy to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import redis
import yaml
from openai import OpenAI

from experts.fleet import POCKET_FLEET
from router_service.bench.service import Running, service, upstream, wait_for, write_fleet, write_policies

LOCAL, OTHER_LOCAL = "pocket-base", "pocket-generalist"
REMOTES = ("fast", "slow", "endless", "dying", "broken")
POLICIES = {
    "auto": {LOCAL: 0.9, "fast": 0.5},
    "remote-first": {"dying": 0.9, "fast": 0.5},
    "broken-first": {"broken": 0.9, LOCAL: 0.5},
    "doomed-first": {"doomed": 0.9, LOCAL: 0.5},
}
"""Each policy's experts with the quality that its router expects of them: the first one is chosen, the second answers
when it fails."""


@dataclass(frozen=True)
class Stack:
    """The running service with its upstreams, and clients of it. `doomed` is the upstream that a test may kill."""

    service: Running
    upstream: Running
    doomed: Running
    folder: Path
    http: httpx.Client
    openai: OpenAI

    @property
    def redis(self) -> redis.Redis:
        """The service's private Redis."""
        return redis.Redis(unix_socket_path=str(self.folder / "data" / "redis.sock"))

    def chat(self, model: str, text: str = "What is 2 + 3?", **fields: Any) -> httpx.Response:
        """A chat completion with its trace."""
        messages = [{"role": "user", "content": text}]
        body = {"model": model, "messages": messages, "max_tokens": 32, "router": {"trace": True}, **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def ledger(self) -> list[dict[str, Any]]:
        """Every entry of the ledger, oldest first."""
        return ledger_of(self.redis)

    def stats(self, model: str) -> dict[str, int]:
        """What the upstream counted for a model."""
        counts: dict[str, int] = httpx.get(f"{self.upstream.url}/stats", trust_env=False).json().get(model, {})
        return counts


def ledger_of(client: redis.Redis) -> list[dict[str, Any]]:
    """Every entry of the ledger that `client`'s Redis holds."""
    return [orjson.loads(entry[b"entry"]) for _, entry in client.xrange("router:ledger")]


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="e2e-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def second() -> Iterator[Running]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="session")
def doomed() -> Iterator[Running]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="session")
def fleet_file(folder: Path, second: Running, doomed: Running) -> Path:
    remotes = [remote_expert(second, name, name) for name in REMOTES]
    return write_fleet(folder, [*local_experts(), *remotes, remote_expert(doomed, "doomed", "slow")])


@pytest.fixture(scope="session")
def policies(folder: Path, fleet_file: Path) -> Path:
    for name, quality in POLICIES.items():
        write_policies(folder, fleet_file, quality, name=name)
    return folder / "policies"


@pytest.fixture(scope="session")
def stack(folder: Path, second: Running, doomed: Running, fleet_file: Path, policies: Path) -> Iterator[Stack]:
    options = ("--fleet", str(fleet_file), "--policies", str(policies))
    with (
        service(folder, options=options) as first,
        httpx.Client(base_url=first.url, timeout=60.0, trust_env=False) as client,
        OpenAI(base_url=f"{first.url}/v1", api_key="none", max_retries=0) as openai,
    ):
        yield Stack(first, second, doomed, folder, client, openai)


@pytest.fixture(autouse=True)
def ready(stack: Stack) -> None:
    """Each test finds the service as it was, whatever the one before killed."""
    wait_for(f"{stack.service.url}/readyz", stack.service.process)


def local_experts() -> list[dict[str, Any]]:
    """The pocket fleet's entries, with absolute paths."""
    entries: list[dict[str, Any]] = yaml.safe_load(POCKET_FLEET.read_text())["experts"]
    for entry in entries:
        source, field = (entry["local"], "model") if "local" in entry else (entry["adapter"], "path")
        source[field] = os.path.normpath(POCKET_FLEET.parent / source[field])
    return entries


def remote_expert(running: Running, name: str, model: str) -> dict[str, Any]:
    """A remote expert with one behaviour of the upstream, without retries: it is the fallback that is tested."""
    source = {"base_url": f"{running.url}/v1", "model": model, "max_retries": 0}
    return {"name": name, "input_price": 1.0, "output_price": 2.0, "remote": source}
