"""What runs the service elsewhere: each file is valid, and speaks of what the code has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from experts.fleet import POCKET_FLEET, load_fleet
from router_service.core.trace import CallRecord, Trace
from router_service.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.fixture(scope="module")
def serve_config() -> Any:
    return load("serve/pocket.yaml")


def test_the_serve_config_deploys_every_group_of_the_pocket_fleet(serve_config: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    from router_service.serve.applications import INGRESS, ExpertsArgs, IngressArgs, experts_app

    schema = ServeDeploySchema.model_validate(serve_config)
    applications = {application.name: application for application in schema.applications}
    groups = [group.name for group in load_fleet(POCKET_FLEET).groups]
    assert set(applications) == {INGRESS, *map(experts_app, groups)}
    assert [ExpertsArgs(**applications[experts_app(group)].args).group for group in groups] == groups
    assert IngressArgs(**applications[INGRESS].args).fleet == POCKET_FLEET
    assert applications[INGRESS].route_prefix == "/"


def test_kuberay_deploys_what_the_serve_config_does(serve_config: Any) -> None:
    service = load("kuberay/rayservice.yaml")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == serve_config
    workers = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    environment = {item["name"]: item["value"] for item in workers["env"]}
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    metrics = Metrics()
    trace = Trace(id="a", request_id="a", at=0.0, key="k", endpoint="completions", model="auto", stream=True)
    trace.cache, trace.decision_s, trace.first_part_s = "miss", 0.1, 0.1
    metrics.count_answer(trace)
    metrics.count_call(CallRecord("expert", "why"))
    metrics.set_expert_up("expert", True)
    there = set(re.findall(r"^(router_\w+?)(?:\{| )", metrics.render().decode(), re.MULTILINE))
    panels = json.loads((DEPLOY / "grafana" / "router.json").read_text())["panels"]
    asked = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"router_\w+", target["expr"])
    }
    assert asked
    assert asked <= there


def test_compose_builds_the_dockerfile_that_there_is() -> None:
    build = load("docker/compose.yaml")["services"]["router"]["build"]
    root = (DEPLOY / "docker" / build["context"]).resolve()
    dockerfile = (root / build["dockerfile"]).read_text()
    copied = re.findall(r"^COPY (\S+)", dockerfile, re.MULTILINE)
    assert all((root / path).exists() for path in copied)
    assert 'ENTRYPOINT ["router-service", "serve"]' in dockerfile
