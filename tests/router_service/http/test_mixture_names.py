"""Mixtures by name over HTTP: a real model with adapters on its engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from transformers import AutoModelForCausalLM

from experts.build import build_experts
from experts.fleet import load_fleet
from experts.mixing import install_mixture, read_adapters
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
    model = AutoModelForCausalLM.from_pretrained(base)
    adapters = read_adapters({name: folder / name for name in ("one", "two")}, model)
    install_mixture(model, adapters, "arrow", {"k": 2}).save(folder / "both")
    experts.append({"name": "gated", "context_length": 512, "mixture": {"base": "base", "gate": "./both"}})
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


async def test_an_answer_tells_the_load_of_its_gate(redis_server: RedisProcess, tmp_path: Path) -> None:
    async with mixing(redis_server, tmp_path) as service:
        asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "gate_bias": {"one": None}}
        for model in ("base+gate:both", "base+gate:gated", "gated"):
            plain, told = [(await service.chat(model, **asked, **more)).json() for more in ({}, {"gate_load": True})]
            assert told["choices"] == plain["choices"]
            assert (
                told["gate_load"]["tokens"] >= told["usage"]["prompt_tokens"] + told["usage"]["completion_tokens"] - 1
            )
            assert len(told["gate_load"]["layers"]) == 6  # three kinds of layers in each of two blocks
            assert all(shares == {"two": 1.0} for shares in told["gate_load"]["layers"].values())
            assert "gate_load" not in plain
            _, events = await service.events(model, **asked, gate_load=True)
            assert events[-1] == "[DONE]"
            assert orjson.loads(events[-2])["gate_load"] == told["gate_load"]
            assert not any("gate_load" in event for event in events[:-2])
        for model, value in (
            ("base", True),
            ("one", True),
            ("base+one", True),
            ("auto", True),
            ("good", True),
            ("gated", 1),
        ):
            refused = await service.chat(model, gate_load=value)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "gate_load"), model
        free = await service.chat("auto", gate_load=False)
        assert free.status_code == 200
