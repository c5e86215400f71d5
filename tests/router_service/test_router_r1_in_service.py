"""`router_r1` in a service that runs: a real policy model and real experts, the trace in the ledger, the ceilings."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from experts.build import build_experts
from experts.expert import Expert, ExpertRequest, Part
from experts.fleet import POCKET_FLEET, Fleet, load_fleet
from routers.policy import Policy
from tests.router_service.fakes import RedisProcess
from tests.router_service.serving import Running, policy, serving
from tests.training.router_r1.by_heart import SKILLS, questions, save_policy

pytestmark = pytest.mark.slow

BASE = "pocket-base"
POLICY_MODEL = "tiny-policy"


class Named:
    """An expert that knows its name."""

    def __init__(self, name: str, expert: Expert) -> None:
        self.name = name
        self._expert = expert

    def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        return self._expert.generate(request)

    async def embed(self, request: ExpertRequest) -> Part:
        return await self._expert.embed(request)

    async def healthy(self) -> bool:
        return await self._expert.healthy()

    async def close(self) -> None:
        await self._expert.close()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The specialists that the questions need, their base, and the policy model that knows their way by heart."""
    folder = tmp_path_factory.mktemp("fleet")
    entries: list[dict[str, Any]] = yaml.safe_load(POCKET_FLEET.read_text())["experts"]
    kept = [one for one in entries if one["name"].removeprefix("pocket-") in {*SKILLS, "base"}]
    for one in kept:
        source, field = (one["local"], "model") if "local" in one else (one["adapter"], "path")
        source[field] = str((POCKET_FLEET.parent / source[field]).resolve())
    model = {
        "name": POLICY_MODEL,
        "routed": False,
        "context_length": 2048,
        "local": {"model": str(save_policy(folder / "policy"))},
    }
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"experts": [*kept, {**model, "output_price": 1}]}))
    return load_fleet(folder / "fleet.yaml")


def r1(**fields: Any) -> Policy:
    options = {"policy": POLICY_MODEL, "turn_tokens": 96}
    deny = {"names": [BASE]}  # no question needs it, so that the policy did not see its card
    return policy("r1", strategy={"name": "router_r1", "options": options}, constraints={"deny": deny}, **fields)


async def ask(
    fleet: Fleet, redis: RedisProcess, policies: list[Policy], *, texts: bool = True, **body: Any
) -> tuple[Any, dict[str, Any]]:
    """The answer to the first two-skill question, and the ledger's entry."""
    built = build_experts(fleet)
    names = [Named(name, expert) for name, expert in built.items()]
    cards = {card.name: card.model_dump(exclude={"name"}) for card in fleet.cards}
    running: Running
    kept = {"ROUTER_LEDGER_TEXT": "1" if texts else "0"}
    async with serving(redis, *names, policies=policies, cards=cards, environment=kept) as running:  # type: ignore[arg-type]
        question = questions()[2]
        answer = await running.chat("auto:r1", question.query, **body)
        return answer, (await running.stream(count=1))[0]


async def test_it_asks_the_fleet_and_answers_with_its_whole_trace_in_the_ledger(
    fleet: Fleet, redis_server: RedisProcess
) -> None:
    answer, entry = await ask(fleet, redis_server, [policy(), r1()])
    question = questions()[2]
    message = answer.json()["choices"][0]["message"]
    assert message["content"] == question.answer
    specialists = [f"pocket-{skill}" for skill in question.skills]
    assert [call["expert"] for call in entry["calls"]] == [
        POLICY_MODEL, specialists[0], POLICY_MODEL, specialists[1], POLICY_MODEL,
    ]  # fmt: skip
    assert entry["calls"][1]["asked"] == question.steps[0].query
    assert entry["calls"][2]["asked"] == f"<information>{question.steps[0].answer}</information>"
    assert question.steps[1].query in message["reasoning_content"]
    assert entry["cost_usd"] == pytest.approx(sum(call["cost_usd"] for call in entry["calls"]))
    assert POLICY_MODEL not in {one["expert"] for one in entry["decision"]["ranking"]}


async def test_no_text_is_in_the_ledger_unless_it_keeps_texts(fleet: Fleet, redis_server: RedisProcess) -> None:
    _, entry = await ask(fleet, redis_server, [policy(), r1()], texts=False)
    assert len(entry["calls"]) == 5
    assert not any(step.query in json.dumps(entry) for step in questions()[2].steps)


async def test_thought_and_answer_are_streamed_apart(fleet: Fleet, redis_server: RedisProcess) -> None:
    answer, _ = await ask(fleet, redis_server, [policy(), r1()], stream=True)
    blocks = [block.removeprefix("data: ") for block in answer.text.split("\n\n") if block]
    assert blocks.pop() == "[DONE]"
    deltas = [choice["delta"] for block in blocks for choice in json.loads(block)["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == questions()[2].answer
    assert questions()[2].steps[0].query in "".join(delta.get("reasoning_content") or "" for delta in deltas)


@pytest.mark.parametrize("ceilings", [{"calls": 3}, {"cost_usd": 2e-3}])
async def test_no_ceiling_is_exceeded(fleet: Fleet, redis_server: RedisProcess, ceilings: dict[str, Any]) -> None:
    _, entry = await ask(fleet, redis_server, [policy(), r1(ceilings=ceilings)])
    assert len(entry["calls"]) <= ceilings.get("calls", 100)
    assert entry["cost_usd"] <= ceilings.get("cost_usd", 1.0)


async def test_a_model_that_is_not_routed_can_be_asked_by_name_and_is_chosen_by_no_policy(
    fleet: Fleet, redis_server: RedisProcess, tmp_path: Path
) -> None:
    built = build_experts(fleet)
    names = [Named(name, expert) for name, expert in built.items()]
    cards = {card.name: card.model_dump(exclude={"name"}) for card in fleet.cards}
    async with serving(redis_server, *names, good=POLICY_MODEL, cards=cards) as running:  # type: ignore[arg-type]
        assert (await running.chat(POLICY_MODEL, "hello", max_tokens=4)).status_code == 200
        routed = await running.chat("auto", "hello", max_tokens=4)
        assert routed.headers["x-router-expert"] != POLICY_MODEL
