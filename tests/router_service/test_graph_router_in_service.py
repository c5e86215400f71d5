"""GraphRouter in service: trained as the command trains, promoted while requests run, explained by its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_service.state.pointer import promote
from routers.contracts import Query
from routers.registry import load_router
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import Running, eventually, policy, serving
from tests.training.tables import CARDS, small_table
from training.train_router import TrainSpec, train

pytestmark = pytest.mark.slow

SUM, WORD = "What is 17 plus 25?", "Spell backwards: ponmlkji"


async def test_a_promoted_graph_router_answers_and_explains(redis_server: RedisProcess, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    table = small_table(tmp_path / "table", 150)
    for out, router in ((first, "best"), (second, "graph_router")):
        train(TrainSpec(router=router, observations=table, out=out))
    used = policy(router={"name": "graph_router"})
    cards = {card.name: card.model_dump(include={"description", "input_price", "output_price"}) for card in CARDS}
    experts = [FakeExpert(card.name) for card in CARDS]

    async with serving(
        redis_server, *experts, policies=[used], cards=cards, load=lambda _, promoted: load_router(promoted or first)
    ) as service:
        assert await chosen(service, SUM) == await chosen(service, WORD)  # the best single expert
        await promote(service.application.service.link, "graph_router", second)

        async def told_apart() -> bool:
            return (await chosen(service, SUM), await chosen(service, WORD)) == ("sums", "words")

        await eventually(told_apart)
        decision = (await service.client.post("/v1/route", json={"prompt": SUM})).json()
        expected = load_router(second).estimate([Query(text=SUM)], CARDS)
        assert (decision["router"], decision["expert"]) == ("graph_router", "sums")
        assert "estimated quality" in decision["reason"]
        numbers = {found["expert"]: found for found in decision["ranking"]}
        for place, card in enumerate(CARDS):
            assert numbers[card.name]["quality"] == pytest.approx(expected.quality[0, place], abs=1e-5)
            assert expected.uncertainty is not None
            assert numbers[card.name]["uncertainty"] == pytest.approx(expected.uncertainty[0, place], abs=1e-5)
            assert 0 < numbers[card.name]["cost_usd"] < 1e-3


async def chosen(service: Running, text: str) -> str:
    """Who answers."""
    response = await service.chat(text=text)
    assert response.status_code == 200
    return response.headers["x-router-expert"]
