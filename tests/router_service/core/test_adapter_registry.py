"""Which adapters a process has, against what is registered: a real encoder, a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import orjson
import pytest
import redis

from experts.build import build_experts
from experts.embedding.expert import EmbeddingExpert
from experts.expert import Expert, ExpertRequest
from experts.fleet import AdapterSource, Fleet, FleetEntry
from router_service.core.adapters import Adapters
from router_service.errors import BadRequestError, ConflictError
from router_service.state.adapters import Registered, registered, replace
from router_service.state.link import RedisLink
from tests.router_service.fakes import RedisProcess
from tests.router_service.retrieving import retriever_fleet

ASKED = ExpertRequest(id="e", endpoint="embeddings", body={"input": "wing flow"})


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return retriever_fleet(tmp_path_factory.mktemp("fleet"))


class Process:
    """A process that hosts the encoder alone."""

    def __init__(self, link: RedisLink, fleet: Fleet) -> None:
        self.experts: dict[str, Expert] = build_experts(Fleet(experts=fleet.experts[:1]))
        self.adapters = Adapters(link, self.experts, enlist=self.enlist, dismiss=self.dismiss)

    def enlist(self, entry: FleetEntry, expert: Expert) -> None:
        self.experts[entry.name] = expert

    def dismiss(self, name: str) -> None:
        del self.experts[name]

    @property
    def loaded(self) -> list[str]:
        search = self.experts["search"]
        assert isinstance(search, EmbeddingExpert)
        return search._shared.resource.encoder.names


@asynccontextmanager
async def processes(
    server: RedisProcess, fleet: Fleet, count: int = 1
) -> AsyncIterator[tuple[RedisLink, list[Process]]]:
    link = RedisLink(server.url)
    assert await link.probe()
    found = [Process(link, fleet) for _ in range(count)]
    yield link, found
    for process in found:
        for expert in process.experts.values():
            await expert.close()
    await link.close()


async def vector(process: Process, name: str) -> list[float]:
    answer = orjson.loads((await process.experts[name].embed(ASKED)).data)
    return list(answer["data"][0]["embedding"])


def on(entry: FleetEntry, source: AdapterSource | None) -> FleetEntry:
    return entry.model_copy(update={"adapter": source})


async def test_a_name_that_is_taken_elsewhere_keeps_its_weights(redis_server: RedisProcess, fleet: Fleet) -> None:
    _, air, med = fleet.experts
    async with processes(redis_server, fleet, 2) as (_, (one, other)):
        await one.adapters.add(med)
        await other.adapters.sync()
        expected = await vector(other, "med")
        known = other.experts.pop("med")  # as in a process that has not heard of it yet
        with pytest.raises(ConflictError, match="there is an adapter 'med'"):
            await other.adapters.add(on(med, air.adapter))
        other.experts["med"] = known
        assert other.loaded == ["med"]
        for process in (one, other):
            np.testing.assert_allclose(await vector(process, "med"), expected, atol=2e-6)


async def test_what_cannot_be_loaded_is_not_registered(redis_server: RedisProcess, fleet: Fleet) -> None:
    med = fleet.experts[2]
    async with processes(redis_server, fleet) as (link, [process]):
        with pytest.raises(BadRequestError, match="there is no folder '/nowhere'"):
            await process.adapters.add(on(med, AdapterSource(base="search", path="/nowhere")))
        assert await registered(link) == ({}, {})
        assert process.loaded == []
        await process.adapters.add(med)
        assert process.loaded == ["med"]


async def test_one_takes_the_place_of_another_in_every_process(redis_server: RedisProcess, fleet: Fleet) -> None:
    _, air, med = fleet.experts
    async with processes(redis_server, fleet, 2) as (link, (one, other)):
        await one.adapters.add(on(med, air.adapter), replacing=True)  # of nothing, so far
        await other.adapters.sync()
        as_air = await vector(other, "med")
        with pytest.raises(ConflictError, match="there is an expert 'med'"):
            await one.adapters.add(med)
        await one.adapters.add(med, replacing=True)
        as_med = await vector(one, "med")
        assert np.abs(np.subtract(as_air, as_med)).max() > 0.01
        np.testing.assert_allclose(await vector(other, "med"), as_air, atol=2e-6)
        await other.adapters.sync()
        np.testing.assert_allclose(await vector(other, "med"), as_med, atol=2e-6)
        for name, source in (("search", med.adapter), ("med", AdapterSource(base="chat", path="/x"))):
            with pytest.raises(ConflictError):
                await one.adapters.add(on(med.model_copy(update={"name": name}), source), replacing=True)
        await other.adapters.remove("med")
        await one.adapters.sync()
        assert (one.loaded, other.loaded, await registered(link)) == ([], [], ({}, {}))


async def test_a_replacement_that_cannot_be_loaded_leaves_the_old_one_in_use(
    redis_server: RedisProcess, fleet: Fleet
) -> None:
    med = fleet.experts[2]
    wrong = on(med, AdapterSource(base="search", path="/nowhere"))
    async with processes(redis_server, fleet, 2) as (link, (one, other)):
        first = await one.adapters.add(med)
        await other.adapters.sync()
        expected = await vector(one, "med")
        with pytest.raises(BadRequestError, match="there is no folder '/nowhere'"):
            await one.adapters.add(wrong, replacing=True)
        assert (await registered(link))[0] == {"med": first}
        await replace(link, Registered(wrong, first.at + 1))  # as another process sees it before it is taken back
        await other.adapters.sync()
        assert "no folder" in other.adapters.faults["med"]
        await replace(link, first)
        for process in (one, other):
            np.testing.assert_allclose(await vector(process, "med"), expected, atol=2e-6)
            await process.adapters.sync()
            assert process.adapters.faults == {}
            np.testing.assert_allclose(await vector(process, "med"), expected, atol=2e-6)
        await replace(link, Registered(wrong, first.at + 2))
        await other.adapters.sync()
        await other.adapters.remove("med")
        assert (other.loaded, "med" in other.experts) == ([], False)


@pytest.mark.parametrize(
    "row",
    [
        b"{",
        b"[]",
        b"7",
        b'{"entry": {}, "at": 1}',
        b'{"entry": {"name": "bad", "remote": {"base_url": "http://x", "model": "m"}}, "at": 1}',
        b'{"entry": {"name": "other", "adapter": {"base": "search", "path": "/x"}}, "at": 1}',
        b'{"entry": {"name": "bad", "adapter": {"base": "search", "path": "/x"}}, "at": null}',
        b'{"entry": {"name": "bad", "adapter": {"base": "search", "path": "/x"}, "of_a_later_version": 1}, "at": 1}',
    ],
)
async def test_a_row_that_cannot_be_read_keeps_no_other_away(
    redis_server: RedisProcess, fleet: Fleet, row: bytes
) -> None:
    async with processes(redis_server, fleet, 2) as (link, [one, other]):
        client = redis.Redis.from_url(redis_server.url)
        client.hset(link.key("adapters"), "bad", row)
        await one.adapters.add(fleet.experts[2])
        await other.adapters.sync()
        assert "med" in other.experts
        assert "its registration cannot be read" in other.adapters.faults["bad"]
        await other.adapters.remove("bad")
        assert other.adapters.faults == {}
        client.hset(link.key("adapters"), "med", row)
        await other.adapters.sync()
        assert other.loaded == []
        assert list(other.adapters.faults) == ["med"]
        client.close()
