"""Gates behind handles: a batch of different tasks gets its own bias rows in the replica, over HTTP too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import orjson
import pytest
import yaml

from experts.build import build_group
from experts.expert import Expert, ExpertRequest, Part
from experts.fleet import Fleet, load_fleet
from router_service.core.steering import read_steering
from tests.router_service.fakes import RedisProcess
from tests.router_service.serve.asking import handle_expert, parts_of
from tests.router_service.serving import serving
from tests.training.glider.pocket_tasks import ADAPTERS, BASE, pocket_tasks
from training.glider.spec import GliderSpec, read_tasks_file
from training.glider.train import train_glider
from training.pocket.grading import sample

pytestmark = pytest.mark.slow

TASKS = ("units", "roman", "dates", "text")
GATED = "steered+gate:skills"


@pytest.fixture(scope="module")
def fleet(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The pocket base with a steered gate over four of its specialists, deployed until these tests end."""
    from ray import serve

    from router_service.serve.applications import ExpertsArgs, experts, experts_app

    folder = tmp_path_factory.mktemp("steered")
    tasks = read_tasks_file(pocket_tasks(folder, *TASKS))
    train_glider(GliderSpec(base=str(BASE), adapters=ADAPTERS, gate="arrow", file=tasks, out=folder / "skills"))
    entries = [
        {"name": "steered", "local": {"model": str(BASE)}, "resources": {"cpus": 0.25}},
        {"name": "skilled", "mixture": {"base": "steered", "gate": str(folder / "skills")}},
    ]
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"experts": entries}))
    application = experts(ExpertsArgs(fleet=folder / "fleet.yaml", group="steered"))
    serve.run_many([serve.RunTarget(application, experts_app("steered"), None)])
    yield load_fleet(folder / "fleet.yaml")
    serve.delete(experts_app("steered"))


def questions() -> list[str]:
    """Three of each task, the tasks mixed."""
    asked = [q for q in sample(7, 400) if q.skills[0] in TASKS]
    by_task = [[q.query for q in asked if q.skills[0] == task][:3] for task in TASKS]
    return [query for row in zip(*by_task, strict=True) for query in row]


def asks(query: str) -> ExpertRequest:
    messages = [{"role": "user", "content": query}]
    body = {"model": GATED, "messages": messages, "max_tokens": 16, "temperature": 0, "gate_load": True}
    return ExpertRequest(id="1", endpoint="chat/completions", body=body, timeout_s=300.0)


def told_by(parts: list[Part]) -> tuple[str, dict[str, dict[str, float]]]:
    """The answer's text, and the load of its gate."""
    reply = orjson.loads(b"".join(part.data for part in parts))
    return reply["choices"][0]["message"]["content"], reply["gate_load"]["layers"]


async def nobody(expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
    raise AssertionError("there is no writer to call")
    yield


async def test_a_batch_of_tasks_gets_its_own_bias_rows(fleet: Fleet, redis_server: RedisProcess) -> None:
    near, far = build_group(fleet.groups[0]), handle_expert("steered")
    steering = read_steering(fleet)
    told = [await steering["steered"].told(asks(query), nobody) for query in questions()]
    assert len({orjson.dumps(request.body["gate_bias"]) for request in told}) == len(told)

    async def answer(expert: Expert, request: ExpertRequest) -> tuple[str, dict[str, dict[str, float]]]:
        return told_by(await parts_of(expert, request))

    alone = [await answer(near["steered"], request) for request in told]
    together = await asyncio.gather(*(answer(far, request) for request in told))
    for (text, load), (expected, own) in zip(together, alone, strict=True):
        assert text == expected
        for layer, shares in own.items():
            assert load[layer] == pytest.approx(shares, abs=1e-4)
    for expert in near.values():
        await expert.close()

    far.name = "steered"  # type: ignore[attr-defined]  # as the fakes have it
    async with serving(redis_server, far, cards={"steered": {"kind": "local"}}, steering=steering) as service:  # type: ignore[arg-type]
        replies = await asyncio.gather(
            *(service.chat(GATED, query, max_tokens=16, temperature=0, gate_load=True) for query in questions())
        )
        for reply, (text, load) in zip(replies, together, strict=True):
            body = reply.json()
            assert body["choices"][0]["message"]["content"] == text
            assert body["gate_load"]["layers"].keys() == load.keys()
        routed = await service.client.post("/v1/route", json={"model": GATED, "prompt": questions()[0]})
        assert routed.json()["scores"].keys() == set(TASKS)
