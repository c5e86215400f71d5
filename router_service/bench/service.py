"""Starts what is measured: the service and the upstream, as processes of their own that end with the measurement."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import yaml

from experts.fleet import load_fleet
from router_service.cli.console import CommandError
from router_service.serve.environment import free_ports
from routers.contracts import Observations
from routers.registry import create_router

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class Running:
    """A process that answers at `url`."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def upstream() -> Iterator[Running]:
    """The upstream (`router_service.bench.upstream`) on a free port."""
    (port,) = free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "router_service.bench.upstream", "--port", str(port)])
    try:
        wait_for(f"http://127.0.0.1:{port}/stats", process)
        yield Running(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.wait()


@contextmanager
def service(
    folder: Path, *, options: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """`router-service serve` with `options` on a free port; its data and its log are in `folder`."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "router_service", "serve", "--port", str(port), "--data", str(folder / "data")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/readyz", process, log=folder / "log")
            yield Running(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            process.wait(_STOP_TIMEOUT_S)


def wait_for(url: str, process: subprocess.Popen[bytes], *, log: Path | None = None) -> None:
    """Until `url` answers 2xx. Raises `CommandError` with the end of the log if it does not."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.get(url).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
    said = log.read_text(errors="replace")[-2000:] if log else ""
    raise CommandError(f"{url} is not ready: {said}")


def write_fleet(folder: Path, experts: list[dict[str, object]]) -> Path:
    """A fleet file with `experts`."""
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({"experts": experts}))
    return path


def write_policies(folder: Path, fleet: Path, quality: Mapping[str, float], *, name: str = "auto") -> Path:
    """The folder `policies`, with a policy `name` added that allows the experts of `quality`, the best one first.

    Its router is `best`, fitted on one observation of each.
    """
    cards = [card for card in load_fleet(fleet).cards if card.name in quality]
    ones = np.ones((1, len(cards)), np.float32)
    observations = Observations(
        ids=["0"],
        texts=["hello"],
        tasks=[""],
        cards=cards,
        quality=np.array([[quality[card.name] for card in cards]], np.float32),
        cost_usd=1e-6 * ones,
        input_tokens=10 * ones,
        output_tokens=10 * ones,
        latency_s=0.1 * ones,
    )
    create_router("best").fit(observations).save(folder / "artefacts" / name)
    policy = {
        "name": name,
        "objective": {"quality": 1, "cost": 0},
        "router": {"name": "best", "artefact": f"../artefacts/{name}"},
        "constraints": {"allow": {"names": sorted(quality)}},
    }
    policies = folder / "policies"
    policies.mkdir(exist_ok=True)
    (policies / f"{name}.yaml").write_text(yaml.safe_dump(policy))
    return policies
