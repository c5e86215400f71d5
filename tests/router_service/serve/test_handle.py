"""Experts behind handles: the same answers, errors and cancellation as in one process; what a replica's death does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import cast

import psutil
import pytest

from experts.build import build_group
from experts.errors import ExpertRequestError, ExpertUnavailableError
from experts.expert import ExpertRequest, Part
from experts.fleet import load_fleet
from router_service.serve.handle import HandleExpert
from tests.router_service.serve.asking import eventually, handle_expert, parts_of, request, text_of
from tests.router_service.serving import eventually as until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


async def test_answers_are_those_of_the_same_expert_in_one_process(fleet_file: Path) -> None:
    near = build_group(load_fleet(fleet_file).groups[0])
    texts = {}
    for name in ("one", "one-adapted"):
        far = await parts_of(handle_expert(name, "one"), request(stream=True))
        here = await parts_of(near[name], request(stream=True))
        assert text_of(far) == text_of(here)
        assert far[-1].usage == here[-1].usage
        assert len(far) > 2
        texts[name] = text_of(far)
    assert texts["one"] != texts["one-adapted"]
    for expert in near.values():
        await expert.close()


async def test_errors_cross_with_their_fields() -> None:
    expert = handle_expert("one")
    with pytest.raises(ExpertRequestError) as caught:
        await parts_of(expert, request(messages=[{"role": "user", "content": "x" * 600}]))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    with pytest.raises(ExpertRequestError) as caught:
        await expert.embed(ExpertRequest(id="e", endpoint="embeddings", body={"input": "a"}))
    assert caught.value.code == "unsupported_endpoint"
    assert await expert.healthy()


async def test_closing_the_iterator_stops_the_generation_in_the_replica() -> None:
    expert = handle_expert("one")
    parts = cast("AsyncIterator[Part]", expert.generate(request(480, stream=True)))
    async with aclosing(parts):  # type: ignore[type-var]
        await anext(parts)
        with pytest.raises(ExpertUnavailableError, match="requests waiting"):
            await parts_of(expert, request())  # the only place is taken
    assert await eventually(expert, 2.0)


async def test_a_cancelled_caller_stops_the_generation_in_the_replica() -> None:
    expert = handle_expert("one")
    begun = asyncio.Event()

    async def ask() -> None:
        async for _ in expert.generate(request(480, stream=True)):
            begun.set()

    task = asyncio.create_task(ask())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await eventually(expert, 2.0)


async def test_a_cancelled_caller_stops_its_embedding_in_the_replica() -> None:
    from ray import serve

    class Endless:
        """Well once a call of it was stopped."""

        def __init__(self) -> None:
            self.begun = self.stopped = False

        async def embed(self, name: str, request: object) -> None:
            self.begun = True
            try:
                await asyncio.sleep(600)
            finally:
                self.stopped = True

        async def healthy(self, name: str) -> bool:
            return self.stopped if name == "stopped" else self.begun

    deployment = serve.deployment(Endless).options(ray_actor_options={"num_cpus": 0})
    handle = serve.run(deployment.bind(), name="endless", route_prefix=None)
    try:
        asked = ExpertRequest(id="e", endpoint="embeddings", body={"input": "a"}, timeout_s=600)
        task = asyncio.create_task(HandleExpert("endless", handle).embed(asked))
        await until(HandleExpert("begun", handle).healthy)
        task.cancel()
        await until(HandleExpert("stopped", handle).healthy)
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        serve.delete("endless")


async def test_resources_are_those_of_the_fleet_file() -> None:
    import ray
    from ray import serve

    applications = serve.status().applications
    assert {name: app.deployments["Experts"].replica_states for name, app in applications.items()} == {
        "experts-one": {"RUNNING": 1},
        "experts-org~two": {"RUNNING": 2},
    }
    assert ray.available_resources()["GPU"] == 0.5
    assert ray.available_resources()["CPU"] == 0.5


async def test_answers_of_a_replica_that_is_killed_are_unavailable_and_the_others_go_on() -> None:
    expert, replica = handle_expert("org/two"), replica_pid("experts-org~two")
    asked = [asyncio.create_task(parts_of(expert, request(480))) for _ in range(48)]  # seconds of work for two replicas
    await asyncio.sleep(0.5)
    os.kill(replica, signal.SIGKILL)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    lost = [answer for answer in answers if isinstance(answer, ExpertUnavailableError)]
    assert any("lost its replica" in str(error) for error in lost)
    assert all(isinstance(answer, list) for answer in answers if answer not in lost)
    assert len(lost) < len(answers)
    assert await eventually(expert)


async def test_without_a_replica_a_request_does_not_wait_for_the_next_one() -> None:
    expert = handle_expert("one")
    os.kill(replica_pid("experts-one"), signal.SIGKILL)
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(ExpertUnavailableError):
        await parts_of(HandleExpert("one", expert._handle, accept_timeout_s=0.2), request())
    assert loop.time() - started < 2.0
    assert await eventually(expert, 240.0)  # Serve may take several health checks to see that its only replica is gone


def replica_pid(application: str) -> int:
    """The process of one of an application's replicas, among those of this test's own Ray."""
    title = f"ray::ServeReplica:{application}:Experts"
    own = psutil.Process().children(recursive=True)
    return next(one.pid for one in own if title in command_of(one))


def command_of(process: psutil.Process) -> str:
    """Its command line; nothing of a process that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
