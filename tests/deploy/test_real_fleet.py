"""The fleet of real models: valid, and run dry with a tiny random Qwen2 and a second service for what cannot be had."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from experts.build import build_experts
from experts.expert import Endpoint, Expert, ExpertRequest, Part
from experts.fleet import POCKET_FLEET, load_fleet
from router_service.assembly import SHIPPED_POLICIES, read_policies
from router_service.bench.service import Running, upstream, write_fleet
from routers.policy import load_policies
from tests.experts.models import save_adapter, save_model

REAL_FLEET = POCKET_FLEET.parent / "real.yaml"
REAL_POLICIES = SHIPPED_POLICIES / "real"
CARDS = {card.name: card for card in load_fleet(REAL_FLEET).cards}
GENERATING = [name for name, card in CARDS.items() if card.kind != "embedding"]
EMBEDDING = [name for name, card in CARDS.items() if card.kind == "embedding"]


@pytest.fixture(scope="module")
def second() -> Iterator[Running]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="module")
def dry_fleet(second: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped file with its hub names exchanged for folders and its addresses for the second service's."""
    folder = tmp_path_factory.mktemp("real")
    model = save_model(folder / "qwen", "qwen2")
    entries: list[dict[str, Any]] = yaml.safe_load(REAL_FLEET.read_text())["experts"]
    for number, entry in enumerate(entries):
        if "remote" in entry:
            entry["remote"]["base_url"] = f"{second.url}/v1"
            continue
        source, field = (entry["local"], "model") if "local" in entry else (entry["adapter"], "path")
        source[field] = str(model if "local" in entry else save_adapter(model, folder / f"lora-{number}", seed=number))
        source.pop("revision", None)
        entry["context_length"] = 512
    return write_fleet(folder, entries)


@pytest.fixture(scope="module")
async def experts(dry_fleet: Path) -> AsyncIterator[dict[str, Expert]]:
    fleet = load_fleet(dry_fleet)
    with pytest.MonkeyPatch.context() as patch:
        for key in {entry.remote.api_key_env for entry in fleet.experts if entry.remote} - {None}:
            patch.setenv(str(key), "sk-test")
        built = build_experts(fleet)
    yield built
    for expert in built.values():
        await expert.close()


def ask(endpoint: Endpoint, **body: Any) -> ExpertRequest:
    return ExpertRequest(id="req-1", endpoint=endpoint, body=body)


def chat(**body: Any) -> ExpertRequest:
    messages = [{"role": "user", "content": "SELECT"}]
    return ask("chat/completions", messages=messages, max_tokens=8, temperature=0, **body)


async def parts_of(expert: Expert, request: ExpertRequest) -> list[Part]:
    return [part async for part in expert.generate(request)]


def test_it_is_valid_and_has_every_kind() -> None:
    fleet = load_fleet(REAL_FLEET)
    assert {card.kind for card in fleet.cards} == {"local", "adapter", "remote", "embedding"}
    assert [len(group.adapters) for group in fleet.groups] == [2]
    assert all(entry.adapter.path.count("/") == 1 for entry in fleet.groups[0].adapters if entry.adapter)  # hub names


def test_its_policy_fits_it_and_is_apart_from_those_of_the_pocket_fleet() -> None:
    assert list(read_policies(REAL_POLICIES, load_fleet(REAL_FLEET))) == ["auto"]
    pocket = load_policies(SHIPPED_POLICIES)
    assert {policy.router.artefact for policy in pocket.values()} == {SHIPPED_POLICIES.parent / "routers/pocket-knn"}


@pytest.mark.parametrize("name", GENERATING)
async def test_every_expert_answers_a_chat(experts: dict[str, Expert], name: str) -> None:
    [part] = await parts_of(experts[name], chat())
    assert json.loads(part.data)["choices"][0]["message"]["content"]
    assert part.usage
    assert part.usage.output_tokens > 0
    assert await experts[name].healthy()


@pytest.mark.parametrize("name", GENERATING)
async def test_every_expert_streams_what_it_answers(experts: dict[str, Expert], name: str) -> None:
    [whole] = await parts_of(experts[name], chat())
    parts = await parts_of(experts[name], chat(stream=True))
    chunks = [json.loads(part.data) for part in parts if part.data]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == json.loads(whole.data)["choices"][0]["message"]["content"]
    assert len(chunks) > 2
    assert parts[-1].usage == whole.usage


@pytest.mark.parametrize("name", EMBEDDING)
async def test_every_embedding_model_embeds(experts: dict[str, Expert], name: str) -> None:
    part = await experts[name].embed(ask("embeddings", input=["one", "two"]))
    assert [row["index"] for row in json.loads(part.data)["data"]] == [0, 1]
    assert part.usage
    assert part.usage.input_tokens == 2
    assert await experts[name].healthy()


async def test_the_adapters_answer_each_in_its_own_way(experts: dict[str, Expert]) -> None:
    names = [name for name, card in CARDS.items() if card.kind in ("local", "adapter")]
    answers = [await parts_of(experts[name], chat()) for name in names]
    assert len({json.loads(part.data)["choices"][0]["message"]["content"] for [part] in answers}) == 3
