"""The measurements measure: small ones, on uvicorn; what the figures are is the benchmarks' matter, not a test's."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_service.bench.first_token import measure_first_token
from router_service.bench.proxy import measure_proxy
from router_service.bench.routing import ask_pocket, measure_routing, pocket
from router_service.bench.service import service

pytestmark = pytest.mark.slow


def test_what_a_proxied_request_costs() -> None:
    found = measure_proxy(requests=200, connections=4, ray=False)
    assert {name: found[name] for name in ("host", "requests", "connections")} == {
        "host": "uvicorn",
        "requests": 200,
        "connections": 4,
    }
    assert found["proxied"].keys() - found["direct"].keys() == {"ingress_cpu_ms"}
    assert found["proxied"]["ingress_cpu_ms"] > 0
    for side in ("proxied", "direct"):
        assert found[side]["requests_per_s"] > 0
        assert 0 < found[side]["p50_ms"] < 1000 * 200 / found[side]["requests_per_s"]
        assert found[side]["upstream_cpu_ms"] >= 0


def test_when_the_first_token_comes_and_what_memory_it_takes() -> None:
    found = measure_first_token(clients=2, requests=6, ray=False)
    assert (found["host"], found["clients"], found["requests"]) == ("uvicorn", 2, 6)
    assert found["first_token_ms"]["answers"] == 6
    assert 0 < found["first_token_ms"]["median"] <= found["first_token_ms"]["p90"]
    assert {"router_service", "redis.sock"} <= found["memory_mib_by_process"].keys()
    assert found["memory_mib"] == sum(found["memory_mib_by_process"].values()) > 50


def test_auto_is_right_on_fresh_questions_at_a_third_of_the_generalists_cost(tmp_path: Path) -> None:
    """The condition is 90% of 500, which `bench routing` measures; 100 questions are noisier, so 85% here."""
    questions = pocket("sample", "--seed", "2026", "--n", "100")
    with service(tmp_path, options=("--no-ray",)) as running:
        auto = measure_routing(running.url, seed=2026, n=100, kind="one", connections=16, alone=False)["auto"]
        generalist = ask_pocket(running.url, "pocket-generalist", questions, connections=16)
    assert auto["right"] >= 0.85
    assert auto["cost_usd"] <= generalist["cost_usd"] / 3
    assert generalist["right"] < auto["right"]
