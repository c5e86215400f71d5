"""Adapters that are added to the running service and removed again."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from experts.build import build_experts
from experts.embedding.adapters import write_encoder
from experts.fleet import Fleet, FleetEntry
from router_service.assembly import assemble
from router_service.cli import app
from router_service.cli.console import CommandError
from router_service.settings import read_settings
from routers.policy import Policy
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.retrieving import AIR, MED, POLICY, retriever_fleet, retrieving, router_of
from tests.router_service.serving import Running, eventually

pytestmark = pytest.mark.slow

TEXTS = [*AIR, *MED]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not on this machine is nowhere."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return retriever_fleet(tmp_path_factory.mktemp("fleet"))


def med(fleet: Fleet, **fields: Any) -> dict[str, Any]:
    """The request that adds the adapter `med`."""
    source = fleet.experts[2].adapter
    return {"name": "med", "base": "search", "path": source.path if source else "", "input_price": 1.0, **fields}


async def embedded(service: Running, model: str = "auto", texts: list[str] = TEXTS) -> list[tuple[str, list[float]]]:
    """Whose the vector of each text is, and the vector."""
    response = await service.client.post("/v1/embeddings", json={"model": model, "input": texts})
    assert response.status_code == 200, response.text
    return [(item.get("expert", model), item["embedding"]) for item in response.json()["data"]]


async def names(service: Running) -> set[str]:
    return {model["id"] for model in (await service.client.get("/v1/models")).json()["data"]}


async def test_an_adapter_is_added_and_removed_and_everything_is_as_before(
    redis_server: RedisProcess, fleet: Fleet
) -> None:
    async with retrieving(redis_server, fleet) as whole:
        expected = await embedded(whole)
    async with retrieving(redis_server, fleet, leave_out=["med"]) as service:
        before = await embedded(service)
        assert "med" not in {expert for expert, _ in before}
        added = await service.client.post("/v1/adapters", json=med(fleet, description="Medicine.", tags=["m"]))
        assert added.status_code == 201
        assert added.json()["expert"]["kind"] == "embedding"
        assert added.json()["expert"]["description"] == "Medicine."
        assert "med" in await names(service)
        assert (await service.client.get("/v1/models/med")).json()["expert"]["tags"] == ["m"]
        assert (await service.client.get("/readyz")).json()["adapters"] == {"med": "loaded"}
        now = await embedded(service)
        assert [expert for expert, _ in now] == [expert for expert, _ in expected] == ["air"] * 3 + ["med"] * 3
        for (_, one), (_, other) in zip(now, expected, strict=True):
            assert one == pytest.approx(other, abs=2e-6)
        gone = await service.client.delete("/v1/adapters/med")
        assert gone.json() == {"object": "adapter", "name": "med", "deleted": True}
        assert await embedded(service) == before
        assert "med" not in await names(service)
        named = await service.client.post("/v1/embeddings", json={"model": "med", "input": "x"})
        assert named.status_code == 404


async def test_a_restart_finds_what_was_added_and_says_what_is_lost(
    redis_server: RedisProcess, fleet: Fleet, tmp_path: Path
) -> None:
    copy = shutil.copytree(med(fleet)["path"], tmp_path / "med")
    async with retrieving(redis_server, fleet, leave_out=["med"]) as service:
        assert (await service.client.post("/v1/adapters", json=med(fleet, path=str(copy)))).status_code == 201
        expected = await embedded(service)

    async def there() -> bool:
        return "med" in (await service.client.get("/readyz")).json()["adapters"]

    async with retrieving(redis_server, fleet, leave_out=["med"]) as service:
        await eventually(there)
        assert await embedded(service) == expected
    shutil.rmtree(copy)
    async with retrieving(redis_server, fleet, leave_out=["med"]) as service:
        await eventually(there)
        [listed] = (await service.client.get("/v1/adapters")).json()["data"]
        assert "there is no folder" in listed["fault"]
        assert "med" not in {expert for expert, _ in await embedded(service)}
        assert (await service.client.delete("/v1/adapters/med")).status_code == 200
        assert (await service.client.get("/v1/adapters")).json()["data"] == []


async def test_others_answer_as_ever_while_one_comes_and_goes(redis_server: RedisProcess, fleet: Fleet) -> None:
    async with retrieving(redis_server, fleet, leave_out=["med"]) as service:
        expected = await embedded(service, "air", AIR)
        done = False

        async def ask() -> int:
            count = 0
            while not done:
                for (_, one), (_, other) in zip(await embedded(service, "air", AIR), expected, strict=True):
                    assert one == pytest.approx(other, abs=2e-6)
                await embedded(service)
                count += 1
            return count

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        for _ in range(5):
            assert (await service.client.post("/v1/adapters", json=med(fleet))).status_code == 201
            await embedded(service, "med", MED)
            assert (await service.client.delete("/v1/adapters/med")).status_code == 200
        done = True
        assert min(await asyncio.gather(*asking)) > 0


async def test_what_cannot_be_added_is_refused_and_changes_nothing(
    redis_server: RedisProcess, fleet: Fleet, tmp_path: Path
) -> None:
    other = shutil.copytree(med(fleet)["path"], tmp_path / "other")
    write_encoder(other, "0" * 64)
    async with retrieving(redis_server, fleet, leave_out=["med"]) as service:
        for body, status, said in (
            (med(fleet, path=str(tmp_path / "nowhere")), 400, "there is no folder"),
            (med(fleet, path="./med"), 400, "an absolute folder, an fsspec URL (s3://...) or a name on the hub"),
            (med(fleet, path="memory://nowhere"), 400, "no adapter at 'memory://nowhere'"),
            (med(fleet, path="us/nowhere", revision="v1"), 400, "cannot be had from the hub"),
            (med(fleet, revision="v1"), 400, "revision 'v1' is for a name on the hub"),
            (med(fleet, path=str(tmp_path)), 400, "adapter_config.json cannot be read"),
            (med(fleet, path=str(other)), 400, "it was trained on the encoder 000000000000"),
            (med(fleet, base="nobody"), 400, "no expert 'nobody' to be the base"),
            (med(fleet, base="air"), 400, "'air' is an adapter itself"),
            (med(fleet, base="chat"), 400, "no base 'chat' that takes adapters"),
            (med(fleet, input_price=-1), 400, "input_price"),
            (med(fleet, local={"model": "x"}), 400, "no field 'local'"),
            (med(fleet, name=None), 400, "'name' must be a text"),
            (med(fleet, replace="yes"), 400, "'replace' must be true or false"),
            (med(fleet, name="air", replace=True), 409, "there is an expert 'air'"),
            (med(fleet, name="air"), 409, "there is an expert 'air'"),
        ):
            response = await service.client.post("/v1/adapters", json=body)
            assert (response.status_code, said in response.text) == (status, True), response.text
        assert await names(service) >= {"search", "air"}
        assert "med" not in await names(service)
        gone = await service.client.delete("/v1/adapters/air")
        assert (gone.status_code, "no adapter 'air' was added" in gone.text) == (404, True)


async def test_an_adapter_beside_another_encoder_is_refused(redis_server: RedisProcess, fleet: Fleet) -> None:
    spaces = {"search": "here", "air": "here", "far": "there"}
    far: dict[str, Any] = {"replaced": {"far": FakeExpert("far")}, "spaces": spaces, "leave_out": ["med"]}
    for denied, status, said in (
        (["search", "air"], 400, "choose between 'med' and 'far'"),
        (["search", "air", "far"], 201, '"policies":["embeddings"]'),
    ):
        fields = {"constraints": {"deny": {"names": denied}}}
        async with retrieving(redis_server, fleet, fields=fields, **far) as service:
            response = await service.client.post("/v1/adapters", json=med(fleet))
            assert (response.status_code, said in response.text) == (status, True), response.text
            assert ("med" in await names(service)) == (status == 201)


async def test_a_service_knows_which_experts_of_its_fleet_can_be_compared(
    redis_server: RedisProcess, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, of a service that was put together from its fleet alone."""
    monkeypatch.setattr("router_service.assembly.configure_logging", lambda **_: None)  # it is for a whole process
    source = fleet.experts[0].encoder
    far = FleetEntry.model_validate(
        {"name": "far", "encoder": {"model": source.model if source else "", "pooling": "cls"}}
    )
    served = Fleet(experts=(*fleet.experts[:2], far))
    for denied, status, said in (
        (["search", "air"], 400, "choose between 'med' and 'far'"),
        (["far"], 201, '"policies":["embeddings"]'),
    ):
        constraints = {"deny": {"names": denied}}
        policies = {"embeddings": Policy.model_validate({"name": "embeddings", **POLICY, "constraints": constraints})}
        settings = read_settings({}, redis_url=redis_server.url, data_folder=redis_server.folder)
        application = assemble(settings, served, build_experts(served), policies)
        await application.service.start()
        transport = httpx.ASGITransport(application)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.post("/v1/adapters", json=med(fleet))
            assert (response.status_code, said in response.text) == (status, True), response.text
        await application.service.close()


async def test_an_adapter_of_the_hub_is_added_and_found_again(
    redis_server: RedisProcess, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--us--med"  # as fetching it once would leave it
    for part in ("refs", "snapshots"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "v1").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).symlink_to(med(fleet)["path"])
    async with retrieving(redis_server, fleet) as service:
        expected = await embedded(service, "med")

    async def there() -> bool:
        return "med" in await names(service)

    async with retrieving(redis_server, fleet, leave_out=["med"]) as service:
        added = await service.client.post("/v1/adapters", json=med(fleet, path="us/med", revision="v1"))
        assert (added.status_code, added.json()["revision"]) == (201, "v1")
        assert await embedded(service, "med") == expected
    async with retrieving(redis_server, fleet, leave_out=["med"]) as service:
        await eventually(there)
        assert await embedded(service, "med") == expected


async def test_the_commands_do_the_same(
    redis_server: RedisProcess, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is added is named by the fleet file that a training wrote, beside the router with its pilots."""
    file = Path(med(fleet)["path"]).parent / "fleet.yaml"
    router_of(fleet).save(tmp_path)
    monkeypatch.setenv("REDIS_URL", redis_server.url)

    async def run(*arguments: str | Path) -> str:
        words = [*map(str, arguments), "--url", service.url]
        done = await asyncio.to_thread(CliRunner().invoke, app, words, catch_exceptions=False)
        return done.stdout

    async with retrieving(redis_server, fleet, leave_out=["med"]) as service:
        assert "in service" in await run("promote", tmp_path)
        promoted = (await service.client.get("/readyz")).json()["promotions"]["router_retriever"]
        assert promoted["folder"] == str(tmp_path)
        assert await run("experts", "add", file, "med") == "med answers, on search\n"
        assert {expert for expert, _ in await embedded(service)} == {"air", "med"}
        with pytest.raises(CommandError, match="409: there is an expert 'med'"):
            await run("experts", "add", file, "med")
        expected = await embedded(service)
        await run("experts", "add", file, "med", "--replace")
        assert await embedded(service) == expected
        with pytest.raises(CommandError, match="has no adapter 'search'"):
            await run("experts", "add", file, "search")
        assert await run("experts", "remove", "med") == "med is out of use\n"
        assert "med" not in await names(service)
        with pytest.raises(CommandError, match="404: no adapter 'med' was added"):
            await run("experts", "remove", "med")


async def test_where_there_are_keys_only_an_admins_changes_the_fleet(redis_server: RedisProcess, fleet: Fleet) -> None:
    keys = {"ROUTER_API_KEYS": "root:secret,app:other", "ROUTER_ADMINS": "root"}
    async with retrieving(redis_server, fleet, leave_out=["med"], environment=keys) as service:
        for key, status in (("other", 403), (None, 401), ("secret", 201)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            response = await service.client.post("/v1/adapters", json=med(fleet), headers=headers)
            assert response.status_code == status, response.text
        for key, status in (("other", 403), (None, 401), ("secret", 200)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            response = await service.client.delete("/v1/adapters/med", headers=headers)
            assert response.status_code == status, response.text
