"""Embeddings and search over HTTP: a real encoder with adapters, the router between them, an index on disk."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from experts.build import build_experts
from experts.cards import ExpertCard
from experts.embedding.encoder import EncoderFiles
from experts.embedding.index import Document, DocumentIndex
from experts.errors import ExpertRequestError, ExpertTimeoutError, ExpertUnavailableError
from experts.expert import Expert, ExpertRequest, Part
from experts.fleet import Fleet, FleetEntry
from router_service.assembly import check_policy
from routers.embedder import Embedder
from routers.errors import RouterConfigError
from routers.policy import Constraints, Policy
from tests.router_service.fakes import FakeExpert, RedisProcess
from tests.router_service.retrieving import AIR, MED, POLICY, encoder_of, retriever_fleet, retrieving
from tests.router_service.serving import eventually

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return retriever_fleet(tmp_path_factory.mktemp("fleet"))


async def test_each_text_goes_to_its_own_expert_and_the_answer_says_which(
    redis_server: RedisProcess, fleet: Fleet
) -> None:
    texts = [MED[0], AIR[0], MED[1]]
    async with retrieving(redis_server, fleet) as service:
        response = await service.client.post("/v1/embeddings", json={"model": "auto", "input": texts})
        answer = response.json()
        assert [item["expert"] for item in answer["data"]] == ["med", "air", "med"]
        assert [item["index"] for item in answer["data"]] == [0, 1, 2]
        assert answer["usage"] == {"prompt_tokens": 4 + 5 + 5, "total_tokens": 14}
        assert response.headers["x-router-expert"] == "med, air"
        assert response.headers["x-router-policy"] == "embeddings"
        assert response.headers["x-router-router"] == "router_retriever"
        assert float(response.headers["x-router-cost-usd"]) == pytest.approx(14e-6)
        for item, text in zip(answer["data"], texts, strict=True):
            named = await service.client.post("/v1/embeddings", json={"model": item["expert"], "input": text})
            np.testing.assert_allclose(named.json()["data"][0]["embedding"], item["embedding"], atol=2e-6)
        entry = (await service.stream(count=4))[0]
        assert entry["routed"] == ["med", "air", "med"]
        assert entry["decision"]["ranking"][0]["expert"] == "med"
        calls = {call["expert"]: (call["input_tokens"], call["why"]) for call in entry["calls"]}
        assert calls == {
            "med": (9, "the router chose it for 2 of 3 texts"),
            "air": (5, "the router chose it for 1 of 3 texts"),
        }


async def test_openais_client_reads_it(redis_server: RedisProcess, fleet: Fleet) -> None:
    async with retrieving(redis_server, fleet) as service:
        client = openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none")
        routed = await client.embeddings.create(model="auto", input=[AIR[1], MED[2]])  # asks for base64
        plain = await client.embeddings.create(model="auto", input=[AIR[1], MED[2]], encoding_format="float")
        for one, other in zip(routed.data, plain.data, strict=True):
            np.testing.assert_allclose(one.embedding, other.embedding, atol=2e-6)
            assert np.linalg.norm(one.embedding) == pytest.approx(1, abs=1e-5)
        await client.close()


async def test_where_an_expert_cannot_answer_the_next_of_the_ranking_does(
    redis_server: RedisProcess, fleet: Fleet
) -> None:
    class DownExpert(FakeExpert):
        async def embed(self, request: ExpertRequest) -> Part:
            raise ExpertUnavailableError("down")

    async with retrieving(redis_server, fleet, replaced={"med": DownExpert("med")}) as service:
        response = await service.client.post("/v1/embeddings", json={"model": "auto", "input": [MED[0], AIR[0]]})
        assert response.status_code == 200
        assert [item["expert"] for item in response.json()["data"]][1] == "air"
        assert response.json()["data"][0]["expert"] in ("search", "air")


class SlowExpert(FakeExpert):
    """Answers never, and says so when its time is up. `stopped` once its call was cancelled."""

    stopped = False

    async def embed(self, request: ExpertRequest) -> Part:
        try:
            await asyncio.sleep(request.timeout_s)
        except asyncio.CancelledError:
            self.stopped = True
            raise
        raise ExpertTimeoutError("late")


async def test_an_expert_that_is_late_is_given_up_after_the_policys_time_for_an_attempt(
    redis_server: RedisProcess, fleet: Fleet
) -> None:
    slow = SlowExpert("med")
    limits = {"fallbacks": {"attempt_timeout_s": 0.2}}
    async with retrieving(redis_server, fleet, replaced={"med": slow}, fields=limits) as service:
        response = await service.client.post("/v1/embeddings", json={"model": "auto", "input": [MED[0], AIR[0]]})
        assert response.status_code == 200
        assert response.json()["data"][0]["expert"] in ("search", "air")
        calls = (await service.stream(count=1))[0]["calls"]
        assert "late" in next(call["error"] for call in calls if call["expert"] == "med")


@pytest.mark.parametrize("model", ["auto", "med"])
async def test_a_client_that_hangs_up_stops_its_experts(redis_server: RedisProcess, fleet: Fleet, model: str) -> None:
    slow = SlowExpert("med")

    async def stopped() -> bool:
        return slow.stopped

    async with retrieving(redis_server, fleet, replaced={"med": slow}) as service:
        with pytest.raises(httpx.ReadTimeout):
            await service.client.post("/v1/embeddings", json={"model": model, "input": MED[0]}, timeout=0.5)
        await eventually(stopped)
        (entry,) = await service.stream(count=1)
        assert (entry["status"], entry["calls"][0]["error"]) == (499, "cut off")


async def test_where_a_request_is_at_fault_no_other_call_is_left_running(
    redis_server: RedisProcess, fleet: Fleet
) -> None:
    class RefusingExpert(FakeExpert):
        async def embed(self, request: ExpertRequest) -> Part:
            raise ExpertRequestError("no such thing")

    slow = SlowExpert("med")
    replaced: dict[str, Expert] = {"med": slow, "air": RefusingExpert("air")}
    async with retrieving(redis_server, fleet, replaced=replaced) as service:
        response = await service.client.post("/v1/embeddings", json={"model": "auto", "input": [MED[0], AIR[0]]})
        assert response.status_code == 400
        assert slow.stopped


async def test_a_search_by_another_encoder_is_refused(redis_server: RedisProcess, fleet: Fleet, tmp_path: Path) -> None:
    """Though its vectors are as long as the index's; and so is one that does not say what it is."""
    config = encoder_of(fleet).model_copy(update={"max_tokens": 16})
    files = EncoderFiles.find(config)
    index = DocumentIndex(tmp_path, dimensions=files.dimensions, encoder=files.fingerprint.hex())
    index.add([Document(f"air/{i}", text) for i, text in enumerate(AIR)], Embedder(config).embed(AIR))
    silent = FakeExpert("silent")
    async with retrieving(redis_server, fleet, index=tmp_path, replaced={"silent": silent}) as service:
        for model, said in (
            ("search", f"'search' cannot search this index: its vectors are of the encoder {fingerprint(fleet)[:12]}"),
            ("auto", f"'med' cannot search this index: its vectors are of the encoder {fingerprint(fleet)[:12]}"),
            ("silent", "'silent' cannot search this index: its vectors do not say of which encoder they are"),
        ):
            response = await service.client.post("/v1/search", json={"model": model, "query": MED[0]})
            assert response.status_code == 400
            assert said in response.json()["error"]["message"]
            assert index.encoder[:12] in response.json()["error"]["message"]


def fingerprint(fleet: Fleet) -> str:
    return EncoderFiles.find(encoder_of(fleet)).fingerprint.hex()


async def test_a_text_that_breaks_the_encoder_fails_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_experts(fleet)
    runtime = built["search"]._shared.resource  # type: ignore[attr-defined]
    tokenize = runtime.encoder.tokenize

    def breaking(texts: list[str]) -> list[list[int]]:
        if "breaks" in texts:
            raise ValueError("it breaks")
        return tokenize(texts)  # type: ignore[no-any-return]

    def ask(text: str) -> ExpertRequest:
        return ExpertRequest(id="e", endpoint="embeddings", body={"input": text})

    monkeypatch.setattr(runtime.encoder, "tokenize", breaking)
    held = runtime._thread.submit(time.sleep, 0.1)  # so that they wait, and are one batch
    answers = await asyncio.gather(
        *(built[name].embed(ask(text)) for name, text in (("search", "wing"), ("air", "breaks"), ("med", "cell"))),
        return_exceptions=True,
    )
    held.result()
    assert [type(answer) for answer in answers] == [Part, ExpertUnavailableError, Part]
    assert "it breaks" in str(answers[1])
    for expert in built.values():
        await expert.close()


def test_a_policy_of_two_encoders_is_refused(fleet: Fleet) -> None:
    """What it answers one request with could not be compared."""
    other = FleetEntry.model_validate({"name": "other", "encoder": {"model": "hub/other"}})
    two = Fleet(experts=(*fleet.experts, other))
    loaded = Policy.model_validate({"name": "embeddings", **POLICY})
    check_policy(loaded, fleet)
    with pytest.raises(RouterConfigError, match="'med' and 'other' are of different encoders"):
        check_policy(loaded, two)
    for constraints in ({"deny": {"names": ["other"]}}, {"allow": {"names": ["other"]}}):
        check_policy(loaded.model_copy(update={"constraints": Constraints.model_validate(constraints)}), two)


async def test_what_is_wrong_is_said(redis_server: RedisProcess, fleet: Fleet) -> None:
    async with retrieving(redis_server, fleet) as service:
        for body, status, what in [
            ({"model": "auto", "input": [[1, 2, 3]]}, 400, "arrays of tokens are another tokenizer's"),
            ({"model": "auto", "input": []}, 400, "must not be empty"),
            ({"model": "med", "input": "x", "dimensions": 7}, 400, "vectors have 32, not 7"),
            ({"model": "med", "input": "x", "encoding_format": "hex"}, 400, "float or base64"),
            ({"model": "auto:auto", "input": "x"}, 400, "serves generation"),
            ({"model": "chat", "input": "x"}, 400, "does not serve embeddings"),
        ]:
            response = await service.client.post("/v1/embeddings", json=body)
            assert (response.status_code, what in response.json()["error"]["message"]) == (status, True), response.text
        response = await service.chat("auto:embeddings")
        assert "serves embeddings" in response.json()["error"]["message"]
        response = await service.client.post("/v1/search", json={"query": "x"})
        assert response.status_code == 404
        assert "ROUTER_INDEX" in response.json()["error"]["message"]


async def test_search_finds_documents_also_those_added_meanwhile(
    redis_server: RedisProcess, fleet: Fleet, tmp_path: Path
) -> None:
    config = encoder_of(fleet)
    embedder, files = Embedder(config), EncoderFiles.find(config)
    index = DocumentIndex(tmp_path, dimensions=files.dimensions, encoder=files.fingerprint.hex())
    index.add([Document(f"air/{i}", text) for i, text in enumerate(AIR)], embedder.embed(AIR))
    async with retrieving(redis_server, fleet, index=tmp_path) as service:
        body = {"model": "search", "query": [AIR[1], MED[0]], "top_k": 2}
        response = await service.client.post("/v1/search", json=body)
        first, second = response.json()["data"]
        assert (first["hits"][0]["id"], first["hits"][0]["text"]) == ("air/1", AIR[1])
        assert first["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
        assert len(second["hits"]) == 2
        index.add([Document(f"med/{i}", text) for i, text in enumerate(MED)], embedder.embed(MED))
        response = await service.client.post("/v1/search", json=body)
        assert response.json()["data"][1]["hits"][0]["id"] == "med/0"
        routed = await service.client.post("/v1/search", json={"query": [MED[0], AIR[0]], "router": {"trace": True}})
        assert [result["expert"] for result in routed.json()["data"]] == ["med", "air"]
        assert routed.json()["router"]["endpoint"] == "search"
        assert routed.json()["usage"]["prompt_tokens"] == 9
        ledger = await service.stream(count=3)
        assert [entry["endpoint"] for entry in ledger] == ["search"] * 3
        for wrong in (
            {"query": []},
            {"query": "x", "top_k": 0},
            {"query": "x", "k": 3},
            {"query": " "},
            {"query": ["x"] * 11, "top_k": 1000},
        ):
            assert (await service.client.post("/v1/search", json=wrong)).status_code == 400


def test_a_fleet_says_what_its_entries_are(fleet: Fleet) -> None:
    assert [card.kind for card in fleet.cards] == ["embedding"] * 3
    assert [group.name for group in fleet.groups] == ["search"]
    assert all(isinstance(card, ExpertCard) for card in fleet.cards)
