"""What a request to a remote expert costs the ingress, beside the same request sent straight to the upstream."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from router_service.bench.load import ask_all
from router_service.bench.processes import cpu_seconds, find
from router_service.bench.service import Running, service, upstream, write_fleet, write_policies

_INGRESS = "ray::ServeReplica:router:Ingress"
_HAPROXY = "haproxy"
_WARM_UP = 300
_BODY = {"model": "fast", "messages": [{"role": "user", "content": "What is six times seven?"}], "temperature": 0}


def measure_proxy(*, requests: int, connections: int, ray: bool) -> dict[str, Any]:
    """Milliseconds of CPU per request, with ledger and metrics on; the service and the upstream are started for it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name, upstream() as second:
        folder = Path(name)
        fleet = write_fleet(folder, [{"name": "fast", "remote": {"base_url": f"{second.url}/v1", "model": "fast"}}])
        policies = write_policies(folder, fleet, {"fast": 1.0})
        options = ("--fleet", str(fleet), "--policies", str(policies), *(() if ray else ("--no-ray",)))
        with service(folder, options=options) as first:
            ingress = find(first.process.pid, _INGRESS) if ray else [first.process.pid]
            proxied = _measure(first, requests, connections, {"ingress": ingress, "upstream": [second.process.pid]})
            direct = _measure(second, requests, connections, {"upstream": [second.process.pid]})
    host = "Ray Serve" if ray else "uvicorn"
    return {"host": host, "requests": requests, "connections": connections, "proxied": proxied, "direct": direct}


def _measure(target: Running, requests: int, connections: int, processes: dict[str, Sequence[int]]) -> dict[str, Any]:
    asyncio.run(ask_all(target.url, [_BODY] * _WARM_UP, connections=connections))
    before = _cpu(processes)
    started = time.perf_counter()
    answers = asyncio.run(ask_all(target.url, [_BODY] * requests, connections=connections))
    seconds = time.perf_counter() - started
    after = _cpu(processes)
    return {
        "requests_per_s": round(requests / seconds, 1),
        "p50_ms": round(1000 * median(answer.total_s for answer in answers), 3),
        **{f"{name}_cpu_ms": round(1000 * (after[name] - before[name]) / requests, 4) for name in processes},
    }


def _cpu(processes: dict[str, Sequence[int]]) -> dict[str, float]:
    return {name: sum(map(cpu_seconds, ids)) for name, ids in processes.items()}
