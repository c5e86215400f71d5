"""Adapters that are added while a group runs: every replica of it loads them, and forgets them again."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import yaml

from experts.build import build_group
from experts.errors import ExpertError, ExpertUnavailableError
from experts.expert import Expert, ExpertRequest, Part
from experts.fleet import AdapterSource, Fleet, FleetEntry
from router_service.core.adapters import Adapters
from router_service.errors import BadRequestError, ConflictError
from router_service.serve.applications import ExpertReplica
from router_service.serve.wire import pack_request, unpack_reply
from router_service.state.adapters import register, withdraw
from router_service.state.link import RedisLink
from tests.router_service.retrieving import retriever_fleet
from tests.router_service.serve.asking import handle_expert
from tests.router_service.serving import eventually

pytestmark = pytest.mark.slow

ASKED = ExpertRequest(id="e", endpoint="embeddings", body={"input": "wing flow"})
MANY = 24  # calls, so that each of two replicas gets some


@pytest.fixture(scope="module")
def fleet(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """An encoder with two adapters, deployed with the first of them alone, in two replicas, until these tests end."""
    from ray import serve

    from router_service.serve.applications import ExpertsArgs, experts, experts_app

    folder = tmp_path_factory.mktemp("fleet")
    fleet = retriever_fleet(folder)
    entries = yaml.safe_load((folder / "fleet.yaml").read_text())["experts"][:2]
    entries[0]["resources"] = {"cpus": 0.25, "replicas": 2}
    (folder / "deployed.yaml").write_text(yaml.safe_dump({"experts": entries}))
    application = experts(ExpertsArgs(fleet=folder / "deployed.yaml", group="search"))
    serve.run_many([serve.RunTarget(application, experts_app("search"), None)])
    yield fleet
    serve.delete(experts_app("search"))


async def vectors(expert: Expert) -> list[list[float]]:
    """What many calls at once give."""
    parts = await asyncio.gather(*(expert.embed(ASKED) for _ in range(MANY)))
    return [orjson.loads(part.data)["data"][0]["embedding"] for part in parts]


async def test_every_replica_loads_an_added_adapter_and_forgets_it(fleet: Fleet) -> None:
    link = RedisLink(os.environ["REDIS_URL"])
    assert await link.probe()
    experts: dict[str, Expert] = {"search": handle_expert("search")}

    def enlist(entry: FleetEntry, expert: Expert) -> None:
        experts[entry.name] = expert

    def dismiss(name: str) -> None:
        del experts[name]

    adapters = Adapters(link, experts, enlist=enlist, dismiss=dismiss)
    entry = fleet.experts[2]
    built = build_group(fleet.groups[0])
    expected = (await vectors(built["med"]))[0]
    before = await vectors(experts["search"])
    with pytest.raises(ExpertUnavailableError, match="'med' is not loaded here"):
        await handle_expert("med", "search").embed(ASKED)

    await adapters.add(entry)
    med = experts["med"]
    for found in await vectors(med):
        assert found == pytest.approx(expected, abs=2e-6)
    assert await med.healthy()

    elsewhere = Adapters(link, {"search": experts["search"]}, enlist=enlist, dismiss=dismiss)
    with pytest.raises(ConflictError, match="there is an adapter 'med'"):
        await elsewhere.add(entry.model_copy(update={"adapter": fleet.experts[1].adapter}))
    for found in await vectors(med):
        assert found == pytest.approx(expected, abs=2e-6)

    await adapters.remove("med")
    assert "med" not in experts
    await eventually(lambda: all_refuse(med))
    assert not await med.healthy()
    for found, known in zip(await vectors(experts["search"]), before, strict=True):
        assert found == pytest.approx(known, abs=2e-6)

    wrong = entry.model_copy(update={"adapter": AdapterSource(base="search", path="/nowhere")})
    with pytest.raises(BadRequestError, match="there is no folder '/nowhere'"):
        await adapters.add(wrong)
    for expert in built.values():
        await expert.close()
    await link.close()


class Replica(ExpertReplica):
    """One in this process, which nobody but these tests ends."""

    def __del__(self) -> None:  # type: ignore[override]
        pass

    async def close(self) -> None:
        for expert in self._experts.values():
            await expert.close()

    async def has(self, name: str) -> bool:
        return name in self._experts


async def test_health_and_requests_do_not_wait_for_an_adapter_that_is_slow_to_come(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTER_REDIS_PREFIX", "slow")  # what is added here, the replicas of `fleet` do not see
    source = fleet.experts[2].adapter
    slow = shutil.copytree(source.path if source else "", tmp_path / "slow")
    config = (slow / "adapter_config.json").read_bytes()
    (slow / "adapter_config.json").unlink()
    os.mkfifo(slow / "adapter_config.json")  # whoever reads it waits until it is written
    link = RedisLink(os.environ["REDIS_URL"], prefix="slow")
    assert await link.probe()
    replica = Replica(fleet.groups[0].model_copy(update={"adapters": ()}))
    entry = FleetEntry.model_validate(
        {"name": "slow", "kind": "embedding", "adapter": {"base": "search", "path": str(slow)}}
    )
    assert await register(link, entry)
    try:
        async with asyncio.timeout(60):
            for _ in range(3):
                await replica.check_health()
            assert isinstance(unpack_reply(await replica.embed("search", pack_request(ASKED))), Part)
            assert not await replica.has("slow")
    finally:
        await asyncio.to_thread((slow / "adapter_config.json").write_bytes, config)
    await eventually(lambda: replica.has("slow"))
    assert isinstance(unpack_reply(await replica.embed("slow", pack_request(ASKED))), Part)
    await withdraw(link, "slow")

    async def asked_until_gone() -> bool:
        await replica.check_health()
        return not await replica.has("slow")

    await eventually(asked_until_gone)
    await replica.close()
    await link.close()


async def all_refuse(expert: Expert) -> bool:
    answers = await asyncio.gather(*(expert.embed(ASKED) for _ in range(MANY)), return_exceptions=True)
    return all(isinstance(answer, ExpertError) for answer in answers)
