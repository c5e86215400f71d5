"""GLIDER's global half in service: it answers as a router, and `/v1/route` shows each expert's score."""

from __future__ import annotations

from pathlib import Path

import pytest

from routers.glider import GliderRouter
from routers.registry import load_router
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import policy, serving
from tests.training.tables import CARDS, small_table
from training.train_router import TrainSpec, train

pytestmark = pytest.mark.slow

SUM, WORD = "What is 17 plus 25?", "Spell backwards: ponmlkji"


async def test_a_route_shows_the_global_scores(redis_server: RedisProcess, tmp_path: Path) -> None:
    train(TrainSpec(router="glider", observations=small_table(tmp_path / "table", 60), out=tmp_path / "out"))
    router = load_router(tmp_path / "out")
    assert isinstance(router, GliderRouter)
    cards = {card.name: card.model_dump(include={"description", "input_price", "output_price"}) for card in CARDS}
    experts = [FakeExpert(card.name) for card in CARDS]
    used = policy(router={"name": "glider"})
    async with serving(
        redis_server, *experts, policies=[used], cards=cards, load=lambda _, promoted: load_router(tmp_path / "out")
    ) as service:
        for text, expert in ((SUM, "sums"), (WORD, "words")):
            decision = (await service.client.post("/v1/route", json={"prompt": text})).json()
            assert (decision["router"], decision["expert"]) == ("glider", expert)
            (guidance,) = router.guidance([text], [None])
            for found in decision["ranking"]:
                assert 2 * found["quality"] - 1 == pytest.approx(guidance.scores[found["expert"]], abs=1e-5)
            assert (await service.chat(text=text)).headers["x-router-expert"] == expert
