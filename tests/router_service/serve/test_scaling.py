"""Groups that scale by load or from zero, on logical GPUs, and a remote expert with a deployment of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.expert import ExpertRequest
from experts.fleet import Fleet, load_fleet
from router_service.bench.service import Running, upstream, write_fleet
from router_service.serve.handle import HandleExpert
from tests.experts.models import save_model
from tests.router_service.serve.asking import parts_of, request, text_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

RESOURCES = {"cpus": 0.1, "gpus": 0.1}
BY_LOAD = {"min": 1, "max": 2, "target": 1, "upscale_delay_s": 0}
FROM_ZERO = {"min": 0, "max": 1}


@pytest.fixture(scope="module")
def second() -> Iterator[Running]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="module")
def scaled_fleet(second: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    save_model(folder / "base")
    local = {"model": "./base", "max_batch": 1}
    return write_fleet(
        folder,
        [
            {"name": "busy", "context_length": 512, "local": local, "resources": {**RESOURCES, "autoscaling": BY_LOAD}},
            {
                "name": "idle",
                "context_length": 512,
                "local": local,
                "resources": {**RESOURCES, "autoscaling": FROM_ZERO},
            },
            {"name": "far", "remote": {"base_url": f"{second.url}/v1", "model": "fast"}, "resources": {"cpus": 0.1}},
            {
                "name": "far-vectors",
                "remote": {"base_url": f"{second.url}/v1", "model": "vectors", "task": "embedding"},
                "resources": {"cpus": 0.1},
            },
        ],
    )


@pytest.fixture(scope="module")
def deployed(cluster: None, scaled_fleet: Path) -> Iterator[Fleet]:
    """The fleet, deployed beside the groups that the cluster has."""
    from ray import serve

    from router_service.serve.applications import ExpertsArgs, experts, experts_app

    fleet = load_fleet(scaled_fleet)
    args = {experts_app(group.name): ExpertsArgs(fleet=scaled_fleet, group=group.name) for group in fleet.groups}
    serve.run_many([serve.RunTarget(experts(each), name, None) for name, each in args.items()])
    yield fleet
    for name in args:
        serve.delete(name, _blocking=False)


@pytest.fixture(scope="module")
async def experts(deployed: Fleet) -> dict[str, HandleExpert]:
    """Its experts, called as the ingress calls them."""
    from router_service.serve.applications import handle_experts

    return {name: expert for group in deployed.groups for name, expert in handle_experts(group).items()}


def running(group: str) -> int:
    """How many replicas of a group there are."""
    from ray import serve

    from router_service.serve.applications import EXPERTS, experts_app

    states = serve.status().applications[experts_app(group)].deployments[EXPERTS].replica_states
    return states.get("RUNNING", 0)


async def test_a_group_grows_under_load(experts: dict[str, HandleExpert]) -> None:
    assert running("busy") == 1

    async def ask_on() -> None:
        while running("busy") < 2:
            await parts_of(experts["busy"], request(400))

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(ask_on())
    assert running("busy") == 2


async def test_a_group_that_rests_at_zero_starts_for_its_first_request(experts: dict[str, HandleExpert]) -> None:
    assert running("idle") == 0
    assert await experts["idle"].healthy()
    assert running("idle") == 0  # the question starts nothing
    parts = await parts_of(experts["idle"], request(stream=True))
    assert text_of(parts)
    assert parts[-1].usage
    assert parts[-1].usage.output_tokens == 8
    assert running("idle") == 1


async def test_a_remote_expert_with_resources_is_called_from_its_own_replica(experts: dict[str, HandleExpert]) -> None:
    assert running("far") == 1
    assert await experts["far"].healthy()
    whole = await parts_of(experts["far"], request())
    streamed = await parts_of(experts["far"], request(stream=True))
    assert b"The answer is 42." in whole[0].data
    assert text_of(streamed) == "The answer is 42."
    assert whole[-1].usage == streamed[-1].usage
    embeddings = ExpertRequest(id="e", endpoint="embeddings", body={"input": "one"})
    assert b'"embedding":[0.6,-0.8]' in (await experts["far-vectors"].embed(embeddings)).data
