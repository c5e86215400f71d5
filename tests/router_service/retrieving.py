"""A service that embeds and searches: a real encoder with adapters, and the router between them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experts.build import build_experts
from experts.embedding.encoder import EmbedderConfig
from experts.expert import Expert
from experts.fleet import Fleet, load_fleet
from routers.contracts import Observations
from routers.embedder import Embedder
from routers.policy import Policy
from routers.registry import AnyRouter, create_router
from tests.experts.embedding.encoders import save_encoder, save_lora
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.serving import Running, best_router, policy, serving

AIR, MED = ["wing flow shock", "flow wing noise", "shock wing"], ["blood cell", "cell blood lung", "lung blood"]
POLICY = {"serves": "embeddings", "router": {"name": "router_retriever"}, "objective": {"quality": 1, "cost": 0}}


def retriever_fleet(folder: Path) -> Fleet:
    """A tiny encoder with an adapter for each of two domains."""
    encoder = save_encoder(folder / "encoder")
    experts = [{"name": "search", "encoder": {"model": "./encoder"}, "input_price": 1.0}]
    for seed, name in enumerate(("air", "med")):
        save_lora(encoder, folder / name, seed=seed)
        experts.append({"name": name, "adapter": {"base": "search", "path": f"./{name}"}, "input_price": 1.0})
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"experts": experts}))
    return load_fleet(folder / "fleet.yaml")


def encoder_of(fleet: Fleet) -> EmbedderConfig:
    source = fleet.experts[0].encoder
    return EmbedderConfig(model=source.model if source else "")


def router_of(fleet: Fleet) -> AnyRouter:
    texts, nothing = [*AIR, *MED], np.full((6, 3), np.nan, np.float32)
    quality = np.array([[0.2, 0.9, 0.1]] * 3 + [[0.2, 0.1, 0.9]] * 3, np.float32)
    table = Observations(
        ids=texts,
        texts=texts,
        tasks=["air"] * 3 + ["med"] * 3,
        cards=fleet.cards,
        quality=quality,
        cost_usd=np.zeros_like(quality),
        input_tokens=nothing,
        output_tokens=nothing,
        latency_s=nothing,
    )
    config = encoder_of(fleet)
    return create_router("router_retriever", {"embedder": config}, embedder=Embedder(config)).fit(table)


@asynccontextmanager
async def retrieving(
    redis: RedisProcess,
    fleet: Fleet,
    *,
    index: Path | None = None,
    replaced: dict[str, Expert] | None = None,
    fields: dict[str, Any] | None = None,
    leave_out: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    spaces: Mapping[str, str] | None = None,
) -> AsyncIterator[Running]:
    """The fleet's experts beside one that chats, with the policies `auto` and `embeddings`."""
    served = Fleet(experts=tuple(entry for entry in fleet.experts if entry.name not in leave_out))
    built = {**build_experts(served), **(replaced or {})}
    for name, expert in built.items():
        expert.name = name  # type: ignore[attr-defined]  # as the fakes have it
    known = {card.name: {"kind": card.kind, "input_price": card.input_price} for card in fleet.cards}
    cards = {name: known.get(name, {"kind": "embedding"}) for name in built}
    async with serving(
        redis,
        FakeExpert("chat"),
        *built.values(),  # type: ignore[arg-type]
        cards=cards,
        policies=(policy(), Policy.model_validate({"name": "embeddings", **POLICY, **(fields or {})})),
        load=lambda choice, _: router_of(fleet) if choice.name == "router_retriever" else best_router("chat", "chat"),
        spaces=spaces,
        environment={**(environment or {}), **({"ROUTER_INDEX": str(index)} if index else {})},
    ) as running:
        yield running
