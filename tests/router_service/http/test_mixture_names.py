"""Mixtures by name over HTTP: a real model with adapters on its engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from experts.build import build_experts
from experts.fleet import load_fleet
from tests.experts.models import save_adapter, save_model
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import Running, serving

pytestmark = pytest.mark.slow


@asynccontextmanager
async def mixing(redis: RedisProcess, folder: Path) -> AsyncIterator[Running]:
    base = save_model(folder / "base")
    experts = [{"name": "base", "context_length": 512, "local": {"model": "./base"}}]
    for seed, name in enumerate(("one", "two")):
        save_adapter(base, folder / name, seed=seed)
        experts.append({"name": name, "context_length": 512, "adapter": {"base": "base", "path": f"./{name}"}})
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"experts": experts}))
    fleet = load_fleet(folder / "fleet.yaml")
    built = build_experts(fleet)
    for name, expert in built.items():
        expert.name = name  # type: ignore[attr-defined]  # as the fakes have it
    cards = {card.name: {"kind": card.kind, "context_length": 512} for card in fleet.cards}
    async with serving(redis, FakeExpert("good"), *built.values(), cards=cards) as running:  # type: ignore[arg-type]
        yield running


async def test_mixtures_are_asked_for_by_name(redis_server: RedisProcess, tmp_path: Path) -> None:
    async with mixing(redis_server, tmp_path) as service:
        names = ["base", "one", "base+one", "base+two:0.5", "base+one:0.7+two:0.3"]
        replies = await asyncio.gather(*(service.chat(name, max_tokens=12, temperature=0) for name in names))
        assert [reply.status_code for reply in replies] == [200] * 5
        texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
        assert texts[1] == texts[2]
        assert len(set(texts)) == 4
        for name, status, word in (
            ("base+nobody", 404, "nobody"),
            ("nobody+one", 404, "there are base"),
            ("one+two", 404, "there are base"),
            ("base+one:nan", 400, "finite"),
            ("base+", 400, "BASE"),
        ):
            reply = await service.chat(name)
            assert (reply.status_code, reply.json()["error"]["param"]) == (status, "model"), name
            assert word in reply.json()["error"]["message"]
        metrics = (await service.client.get("/metrics")).text
        assert 'router_engine_queue_seconds_count{expert="base"} 4.0' in metrics
        assert 'router_engine_batch_size_count{expert="one"} 1.0' in metrics
        adapters = [line for line in metrics.splitlines() if line.startswith("router_engine_adapters_total")]
        assert sum(float(line.rpartition(" ")[2]) for line in adapters) == 5
