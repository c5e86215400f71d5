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
from experts.expert import AdapterHost, Expert, ExpertRequest
from experts.fleet import Fleet, load_fleet
from router_service.core.steering import SteeredExpert, steered
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
    train_glider(GliderSpec(base=str(BASE), adapters=ADAPTERS, gate="arrow", file=tasks, out=folder / "skills"))
    experts = [
        {"name": "pocket-base", "local": {"model": str(BASE)}},
        {"name": "pocket-skills", "mixture": {"base": "pocket-base", "gate": str(folder / "skills")}},
    ]
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"experts": experts}))
    return load_fleet(folder / "fleet.yaml")


@pytest.fixture(scope="module")
async def plain(fleet: Fleet) -> AsyncIterator[dict[str, Expert]]:
    experts = await asyncio.to_thread(build_experts, fleet)
    yield experts
    for expert in experts.values():
        await expert.close()


async def answer(expert: Expert, query: str, **more: Any) -> str:
    body = {"messages": [{"role": "user", "content": query}], "max_tokens": 16, "temperature": 0, **more}
    request = ExpertRequest(id="1", endpoint="chat/completions", body=body, timeout_s=300.0)
    data = b"".join([part.data async for part in expert.generate(request)])
    return str(json.loads(data)["choices"][0]["message"]["content"])


def router_of(fleet: Fleet) -> GliderRouter:
    mixture = fleet.experts[1].mixture
    router = load_router(Path(mixture.gate if mixture and mixture.gate else "") / "router")
    assert isinstance(router, GliderRouter)
    return router


async def test_a_batch_of_eight_tasks_gives_each_what_it_gets_alone(fleet: Fleet, plain: dict[str, Expert]) -> None:
    experts = steered(fleet, plain)
    questions = [q.query for q in sample(3, 200) if q.skills[0] in EIGHT][:32]
    together = await asyncio.gather(*(answer(experts["pocket-skills"], query) for query in questions))
    alone = [await answer(experts["pocket-skills"], query) for query in questions]
    assert together == alone
    unsteered = await asyncio.gather(*(answer(plain["pocket-skills"], query) for query in questions))
    assert sum(one != other for one, other in zip(unsteered, together, strict=True)) > 4


async def test_the_gate_gets_the_bias_of_the_guide_by_every_name(fleet: Fleet, plain: dict[str, Expert]) -> None:
    experts = steered(fleet, plain)
    query = next(q.query for q in sample(5, 50) if q.skills[0] == EIGHT[0])
    (guidance,) = router_of(fleet).guidance([query], [None])
    expected = await answer(plain["pocket-skills"], query, gate_bias=guidance.gate_bias)
    assert await answer(experts["pocket-skills"], query) == expected
    for name in ("pocket-skills", "skills"):
        assert await answer(experts["pocket-base"], query, model=f"pocket-base+gate:{name}") == expected
    own = {EIGHT[1]: 50.0}
    assert await answer(experts["pocket-skills"], query, gate_bias=own) == await answer(
        plain["pocket-skills"], query, gate_bias=own
    )
    assert await answer(experts["pocket-base"], query) == await answer(plain["pocket-base"], query)


def test_only_gates_with_a_router_are_steered(fleet: Fleet, plain: dict[str, Expert], tmp_path: Path) -> None:
    experts = steered(fleet, plain)
    assert all(isinstance(expert, SteeredExpert) for expert in experts.values())
    assert isinstance(experts["pocket-base"], AdapterHost) == isinstance(plain["pocket-base"], AdapterHost) is True
    bare = fleet.model_copy(update={"experts": fleet.experts[:1]})
    assert steered(bare, {"pocket-base": plain["pocket-base"]}) == {"pocket-base": plain["pocket-base"]}


def test_a_writer_must_be_an_expert(fleet: Fleet, tmp_path: Path) -> None:
    mixture = {"base": "b", "gate": "./g", "writer": "none"}
    experts = [{"name": "b", "local": {"model": str(BASE)}}, {"name": "m", "mixture": mixture}]
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({"experts": experts}))
    with pytest.raises(ExpertConfigError, match="its writer 'none' is no expert of the fleet"):
        load_fleet(tmp_path / "fleet.yaml")
