"""GLIDER's global half in service: as a router, and as what tells gates the tasks; its writer's calls are paid."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experts.errors import ExpertUnavailableError
from router_service.cli import app
from router_service.core.steering import Steering
from routers.glider import GliderRouter
from routers.guide import Guide
from routers.registry import load_router
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import Running, eventually, policy, serving
from tests.training.tables import CARDS, small_table
from training.train_router import TrainSpec, train

pytestmark = pytest.mark.slow

SUM, WORD = "What is 17 plus 25?", "Spell backwards: ponmlkji"
GATED = "base+gate:skills"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glider")
    train(TrainSpec(router="glider", observations=small_table(folder / "table", 60), out=folder / "out"))
    return folder / "out"


def router_of(folder: Path) -> GliderRouter:
    router = load_router(folder)
    assert isinstance(router, GliderRouter)
    return router


async def test_a_route_shows_the_global_scores(redis_server: RedisProcess, trained: Path) -> None:
    router = router_of(trained)
    cards = {card.name: card.model_dump(include={"description", "input_price", "output_price"}) for card in CARDS}
    experts = [FakeExpert(card.name) for card in CARDS]
    used = policy(router={"name": "glider"})
    async with serving(
        redis_server, *experts, policies=[used], cards=cards, load=lambda _, promoted: load_router(trained)
    ) as service:
        for text, expert in ((SUM, "sums"), (WORD, "words")):
            decision = (await service.client.post("/v1/route", json={"prompt": text})).json()
            assert (decision["router"], decision["expert"]) == ("glider", expert)
            (guidance,) = router.guidance([text], [None])
            for found in decision["ranking"]:
                assert 2 * found["quality"] - 1 == pytest.approx(guidance.scores[found["expert"]], abs=1e-5)
            assert (await service.chat(text=text)).headers["x-router-expert"] == expert


@asynccontextmanager
async def guided(
    redis: RedisProcess, trained: Path, writer: FakeExpert | None = None, **more: Any
) -> AsyncIterator[Running]:
    """A base that may be asked for a gate, an entry of the fleet for that gate, and a writer for both."""
    writer = writer or FakeExpert("writer", ("Answers", " sums."))
    guide = Guide(router_of(trained), writer=writer.name)
    steering = {"base": Steering({"skills": guide}), "skills": Steering({"skills": guide}, own="skills")}
    cards = {"base": {"kind": "local"}, "skills": {"kind": "adapter"}, "writer": {"input_price": 50.0}}
    experts = FakeExpert("base"), FakeExpert("skills"), writer
    async with serving(redis, *experts, cards=cards, steering=steering, **more) as service:
        yield service


async def test_a_writers_call_is_paid_by_the_request_that_it_is_for(redis_server: RedisProcess, trained: Path) -> None:
    async with guided(redis_server, trained) as service:
        answer = await service.chat(GATED, SUM, router={"trace": True})
        (guidance,) = router_of(trained).guidance([SUM], ["Answers sums."])
        (asked,) = service.experts["base"].requests
        assert asked.body["gate_bias"] == pytest.approx(guidance.gate_bias)
        (wrote,) = service.experts["writer"].requests
        assert SUM in wrote.body["messages"][0]["content"]
        assert wrote.tenant == asked.tenant
        own, beside = answer.json()["router"]["calls"]
        assert (own["expert"], beside["expert"], beside["beside"]) == ("base", "writer", True)
        assert "beside" not in own
        assert beside["cost_usd"] == pytest.approx((10 * 50 + 2 * 2) / 1e6)  # as the writer's card says
        assert own["cost_usd"] == pytest.approx((10 + 3 * 2) / 1e6)
        both = pytest.approx(own["cost_usd"] + beside["cost_usd"])
        assert float(answer.headers["x-router-cost-usd"]) == both
        assert (answer.headers["x-router-expert"], answer.headers["x-router-attempts"]) == ("base", "2")
        again = await service.chat(GATED, SUM)
        assert float(again.headers["x-router-cost-usd"]) == pytest.approx(own["cost_usd"])  # it is known
        first, second = await service.stream(count=2)
        assert (first["cost_usd"], first["expert"], len(first["calls"])) == (both, "base", 2)
        assert len(second["calls"]) == 1
        metrics = (await service.client.get("/metrics")).text
        assert 'router_expert_calls_total{expert="writer",outcome="ok"} 1.0' in metrics


async def test_callers_with_the_same_question_pay_for_one_instruction(
    redis_server: RedisProcess, trained: Path
) -> None:
    writer = FakeExpert("writer", ("Answers", " sums."), pause_s=0.05)
    async with guided(redis_server, trained, writer) as service:
        await asyncio.gather(*(service.chat(GATED, SUM) for _ in range(5)))
        entries = await service.stream(count=5)
        assert sorted(len(entry["calls"]) for entry in entries) == [1, 1, 1, 1, 2]
        bodies = [request.body["gate_bias"] for request in service.experts["base"].requests]
        assert all(body == bodies[0] for body in bodies)


@pytest.mark.parametrize("ceilings", [{"calls": 1}, {"cost_usd": 0.01}], ids=str)
async def test_an_answer_has_the_ceilings_before_its_instruction(
    redis_server: RedisProcess, trained: Path, ceilings: dict[str, Any]
) -> None:
    """The writer is too dear, or one call too many: the query stands for its task, and the answer comes."""
    served = policy(constraints={"allow": {"names": ["skills"]}}, ceilings=ceilings)
    async with guided(redis_server, trained, policies=[served], good="skills") as service:
        answer = await service.chat(text=SUM, max_tokens=16)
        assert (answer.status_code, answer.headers["x-router-expert"]) == (200, "skills")
        assert not service.experts["writer"].requests
        (guidance,) = router_of(trained).guidance([SUM], [None])
        assert service.experts["skills"].requests[0].body["gate_bias"] == pytest.approx(guidance.gate_bias)
        (entry,) = await service.stream(count=1)
        assert entry["cost_usd"] <= ceilings.get("cost_usd", 1)


async def test_within_the_ceilings_a_policys_expert_has_its_instruction(
    redis_server: RedisProcess, trained: Path
) -> None:
    served = policy(constraints={"allow": {"names": ["skills"]}}, ceilings={"calls": 2, "cost_usd": 1.0})
    async with guided(redis_server, trained, policies=[served], good="skills") as service:
        answer = await service.chat(text=SUM, max_tokens=16)
        assert (answer.headers["x-router-expert"], answer.headers["x-router-attempts"]) == ("skills", "2")
        assert len(service.experts["writer"].requests) == 1


async def test_a_writer_that_fails_fails_no_answer(redis_server: RedisProcess, trained: Path) -> None:
    dead = FakeExpert("writer", error=ExpertUnavailableError("connection lost"))
    async with guided(redis_server, trained, dead) as service:
        answer = await service.chat(GATED, SUM)
        assert answer.status_code == 200
        (entry,) = await service.stream(count=1)
        assert (entry["expert"], entry["error"]) == ("base", None)
        assert "connection lost" in entry["calls"][1]["error"]


async def test_a_budget_has_the_writers_call_set_aside(redis_server: RedisProcess, trained: Path) -> None:
    """What the writer may cost counts while it writes, and what it did cost afterwards."""
    environment = {"ROUTER_API_KEYS": "me:secret", "ROUTER_LIMITS": '{"me": {"usd_per_day": 0.001}}'}
    writer = FakeExpert("writer", ("Answers", " sums."), pause_s=0.5)
    async with guided(redis_server, trained, writer, environment=environment) as service:
        service.client.headers["authorization"] = "Bearer secret"
        first = asyncio.create_task(service.chat(GATED, SUM, max_tokens=16))
        await eventually(lambda: asyncio.sleep(0, bool(writer.requests)))
        refused = await service.chat("base", SUM, max_tokens=16)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
        assert (await first).status_code == 200
        await service.stream(count=2)
        assert (await service.chat("base", SUM, max_tokens=16)).status_code == 200


@pytest.mark.parametrize(("model", "expert"), [(GATED, "base"), ("skills", "skills")])
async def test_a_route_shows_what_a_gate_is_told(
    redis_server: RedisProcess, trained: Path, model: str, expert: str
) -> None:
    router = router_of(trained)
    async with guided(redis_server, trained) as service:
        body = {"model": model, "messages": [{"role": "user", "content": SUM}]}
        told = (await service.client.post("/v1/route", json=body)).json()
        (guidance,) = router.guidance([SUM], [None])
        assert (told["object"], told["expert"], told["source"]) == ("router.guidance", expert, "query")
        assert told["scores"] == pytest.approx(guidance.scores)
        assert told["gate_bias"] == pytest.approx(guidance.gate_bias)
        assert "'writer' was not asked" in told["why"]
        assert not any(one.requests for one in service.experts.values())
        await service.chat(model, SUM)
        told = (await service.client.post("/v1/route", json=body)).json()
        (guidance,) = router.guidance([SUM], ["Answers sums."])
        assert (told["source"], told["instruction"]) == ("instruction", "Answers sums.")
        assert told["scores"] == pytest.approx(guidance.scores)
        arguments = ["route", "--url", service.url, "-m", model, SUM]
        shown = await asyncio.to_thread(CliRunner().invoke, app, arguments, env={"COLUMNS": "160"})
        assert shown.exit_code == 0, shown.output
        for name, score in told["scores"].items():
            assert any(name in line and f"{score:.3f}" in line for line in shown.output.splitlines())
        assert "by the instruction: Answers sums." in shown.output
        refused = await service.client.post("/v1/route", json={**body, "model": "base+gate:other"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")


async def test_nothing_but_the_words_of_a_request_reaches_gate_and_writer(
    redis_server: RedisProcess, trained: Path
) -> None:
    """Wherever a client, or a data set's runner, may put a label beside the question."""
    labels: list[dict[str, Any]] = [
        {"user": "words"},
        {"metadata": {"task": "words", "session_id": "words"}},
        {"task": "words", "label": "words", "tags": ["words"]},
        {"headers": {"x-session-id": "words", "x-request-id": "words"}},
    ]
    async with guided(redis_server, trained) as service:
        for fields in ({}, *labels):
            guide = service.application.service.lanes["base"].steering.guides["skills"]  # type: ignore[union-attr]
            guide._written.clear()
            assert (await service.chat(GATED, SUM, **fields)).status_code == 200
        biases = [request.body["gate_bias"] for request in service.experts["base"].requests]
        written = [request.body for request in service.experts["writer"].requests]
        assert len(biases) == len(written) == 5
        assert all(bias == biases[0] for bias in biases)
        assert all(body == written[0] for body in written)
