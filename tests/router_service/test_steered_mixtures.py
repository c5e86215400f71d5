"""GLIDER through the engine: every request's gate is told its task, and tasks share a batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from experts.build import build_experts
from experts.errors import ExpertConfigError
from experts.expert import Expert, ExpertRequest, Part
from experts.fleet import Fleet, load_fleet
from router_service.core.steering import read_steering
from routers.glider import GliderRouter
from routers.registry import load_router
from tests.training.glider.pocket_tasks import ADAPTERS, BASE, pocket_tasks
from training.glider.spec import GliderSpec, read_tasks_file
from training.glider.train import train_glider
from training.pocket.grading import sample
from training.pocket.skills import SKILLS

pytestmark = pytest.mark.slow

EIGHT = tuple(SKILLS)[:8]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The pocket base with a steered gate over eight of its specialists."""
    folder = tmp_path_factory.mktemp("steered")
    tasks = read_tasks_file(pocket_tasks(folder, *EIGHT))
    train_glider(GliderSpec(base=str(BASE), adapters=ADAPTERS, file=tasks, out=folder / "skills"))
    experts = [
        {"name": "pocket-base", "local": {"model": str(BASE)}},
        {"name": "pocket-skills", "mixture": {"base": "pocket-base", "gate": str(folder / "skills")}},
    ]
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"experts": experts}))
    return load_fleet(folder / "fleet.yaml")


@pytest.fixture(scope="module")
async def experts(fleet: Fleet) -> AsyncIterator[dict[str, Expert]]:
    built = await asyncio.to_thread(build_experts, fleet)
    yield built
    for expert in built.values():
        await expert.close()


def asks(query: str, **more: Any) -> ExpertRequest:
    body = {"messages": [{"role": "user", "content": query}], "max_tokens": 16, "temperature": 0, **more}
    return ExpertRequest(id="1", endpoint="chat/completions", body=body, timeout_s=300.0)


async def answer(expert: Expert, request: ExpertRequest) -> dict[str, Any]:
    reply: dict[str, Any] = json.loads(b"".join([part.data async for part in expert.generate(request)]))
    return reply


def text_of(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


async def nobody(expert: str, request: ExpertRequest, *, why: str) -> AsyncIterator[Part]:
    raise AssertionError("there is no writer to call")
    yield


def router_of(fleet: Fleet) -> GliderRouter:
    mixture = fleet.experts[1].mixture
    router = load_router(Path(mixture.gate if mixture and mixture.gate else "") / "router")
    assert isinstance(router, GliderRouter)
    return router


async def test_a_batch_of_eight_tasks_gives_each_what_it_gets_alone(fleet: Fleet, experts: dict[str, Expert]) -> None:
    """32 requests with biases of their own through the engine at once: the same tokens, and the same adapters."""
    asked = [q for q in sample(3, 400) if q.skills[0] in EIGHT]
    questions = [q.query for skill in EIGHT for q in [q for q in asked if q.skills[0] == skill][:4]]
    assert len(questions) == 32
    expert, steering = experts["pocket-skills"], read_steering(fleet)["pocket-skills"]
    plain = [asks(query, gate_load=True) for query in questions]
    told = [await steering.told(request, nobody) for request in plain]
    together = await asyncio.gather(*(answer(expert, request) for request in told))
    alone = [await answer(expert, request) for request in told]
    assert [text_of(reply) for reply in together] == [text_of(reply) for reply in alone]
    for one, other in zip(together, alone, strict=True):
        for layer, shares in other["gate_load"]["layers"].items():
            assert one["gate_load"]["layers"][layer] == pytest.approx(shares, abs=1e-4)
    unsteered = await asyncio.gather(*(answer(expert, request) for request in plain))
    changed = [text_of(one) != text_of(other) for one, other in zip(unsteered, together, strict=True)]
    assert sum(changed) > 4


async def test_the_gate_gets_the_bias_of_the_guide_by_every_name(fleet: Fleet, experts: dict[str, Expert]) -> None:
    steering = read_steering(fleet)
    assert steering.keys() == {"pocket-base", "pocket-skills"}
    query = next(q.query for q in sample(5, 50) if q.skills[0] == EIGHT[0])
    (guidance,) = router_of(fleet).guidance([query], [None])
    expected = text_of(await answer(experts["pocket-skills"], asks(query, gate_bias=guidance.gate_bias)))
    for expert, model in (
        ("pocket-skills", "auto"),
        ("pocket-base", "pocket-base+gate:pocket-skills"),
        ("pocket-base", "pocket-base+gate:skills"),
    ):
        told = await steering[expert].told(asks(query, model=model), nobody)
        assert told.body["gate_bias"] == guidance.gate_bias
        assert text_of(await answer(experts[expert], told)) == expected
    own: dict[str, Any]
    for own in ({EIGHT[1]: 50.0}, {}):
        request = asks(query, gate_bias=own)
        assert await steering["pocket-skills"].told(request, nobody) is request
    for model in ("pocket-base", "pocket-base+gate:other", "pocket-base+units"):
        request = asks(query, model=model)
        assert await steering["pocket-base"].told(request, nobody) is request


def test_only_gates_with_a_router_are_steered(fleet: Fleet) -> None:
    assert read_steering(fleet.model_copy(update={"experts": fleet.experts[:1]})) == {}


def test_a_writer_must_be_an_expert(fleet: Fleet, tmp_path: Path) -> None:
    mixture = {"base": "b", "gate": "./g", "writer": "none"}
    experts = [{"name": "b", "local": {"model": str(BASE)}}, {"name": "m", "mixture": mixture}]
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({"experts": experts}))
    with pytest.raises(ExpertConfigError, match="its writer 'none' is no expert of the fleet"):
        load_fleet(tmp_path / "fleet.yaml")
