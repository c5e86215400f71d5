"""The bench of strategies: every model is asked every question once, also over two runs; figures are of the answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from router_service.bench.strategies import measure_strategies
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import policy, serving

pytestmark = pytest.mark.slow


async def test_a_run_that_was_stopped_goes_on(redis_server: RedisProcess, tmp_path: Path) -> None:
    experts = [FakeExpert(name, ("85",)) for name in "abc"]
    voting = policy(strategy={"name": "vote", "options": {"voters": 3}})
    async with serving(redis_server, *experts, policies=[voting]) as service:

        async def run(models: list[str]) -> dict[str, object]:
            return await asyncio.to_thread(
                measure_strategies,
                service.url, models, tmp_path, seed=1, one=4, two=2, connections=2, against="a",
            )  # fmt: skip

        await run(["a"])
        asked = len(experts[0].requests)
        found = await run(["auto", "a"])
        again = await run(["auto", "a"])
    assert asked == 6
    assert sum(len(expert.requests) for expert in experts) <= 6 + 3 * 6
    assert found == again
    models = found["models"]
    assert isinstance(models, dict)
    assert set(models) == {"auto", "a"}
    assert 2 <= models["auto"]["calls"] <= 3
    assert models["auto"]["share_of_cost"] > 1.5
    assert models["a"]["difference"]["auto"]["value"] == 0
    assert 0 <= models["a"]["right"]["value"] <= 1
