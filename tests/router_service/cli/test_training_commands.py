"""`collect`, `export` and promotion against the real application with a real Redis; only the experts are fakes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from experts.errors import ExpertRequestError, ExpertTimeoutError
from experts.expert import Usage
from router_service.cli.ask import ServiceAsk
from router_service.cli.collect import collect, export
from router_service.cli.console import CommandError
from router_service.cli.promote import put_in_service
from routers.errors import RouterConfigError
from routers.policy import RouterChoice
from routers.registry import AnyRouter, load_router
from tests.router_service.fakes import FakeExpert, RedisProcess, card
from tests.router_service.serving import Running, best_router, eventually, serving
from training.collect import AskError
from training.errors import CollectError
from training.observations import load_table
from training.train_router import TrainSpec, train

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _environment(redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    monkeypatch.delenv("ROUTER_API_KEY", raising=False)


def prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"id": f"p{i}", "query": f"What is {i} and {4 - i}?", "answer": "four", "task": "sums"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def run_collect(running: Running, folder: Path, **options: Any) -> None:
    given = {"prompts": prompts(folder), "out_folder": folder / "table", "url": running.url, "grader": "contains"}
    await asyncio.to_thread(collect, **{**given, **options})


async def test_collect_writes_a_table_that_trains_a_router(
    redis_server: RedisProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = Usage(input_tokens=100, output_tokens=10)
    right, wrong = FakeExpert("right", ("It is four",), usage=usage), FakeExpert("wrong", ("five",), usage=usage)
    async with serving(redis_server, right, wrong) as running:
        await run_collect(running, tmp_path, as_json=True, test_share=0.5)
        said = json.loads(capsys.readouterr().out)
        await run_collect(running, tmp_path)
    assert [request.body["max_tokens"] for request in right.requests] == [1024] * 6  # once each, in two runs
    assert [(row["expert"], row["graded"], row["quality"]) for row in said["experts"]] == [
        ("right", 6, 1.0),
        ("wrong", 6, 0.0),
    ]
    assert said["spent_usd"] == pytest.approx(12 * card("right").cost(usage))
    table = load_table(tmp_path / "table")
    assert [one.name for one in table.cards] == ["right", "wrong"]
    assert len(table.train) + len(table.test) == 6
    assert table.train.cost_usd == pytest.approx(np.full((len(table.train), 2), card("right").cost(usage)))
    assert (table.train.latency_s > 0).all()
    train(TrainSpec(router="best", observations=tmp_path / "table", out=tmp_path / "best"))


async def test_collect_asks_the_experts_that_were_named_and_reports_what_failed(
    redis_server: RedisProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = FakeExpert("good"), FakeExpert("other")
    bad = FakeExpert("bad", error=ExpertRequestError("too long a prompt"))
    async with serving(redis_server, good, bad, other) as running:
        await run_collect(running, tmp_path, expert=["good", "bad"])
        with pytest.raises(CommandError, match="no expert 'nobody'; it has good, bad, other"):
            await run_collect(running, tmp_path, expert=["nobody"])
        with pytest.raises(CommandError, match="grader 'vibes' is not one of exact"):
            await run_collect(running, tmp_path, grader="vibes")
    assert not other.requests
    assert len(bad.requests) == 6
    assert "too long a prompt" in capsys.readouterr().err
    assert [one.name for one in load_table(tmp_path / "table").cards] == ["good", "bad"]


async def test_collect_keeps_to_its_ceiling(redis_server: RedisProcess, tmp_path: Path) -> None:
    expert = FakeExpert("one", ("four",), usage=Usage(input_tokens=300, output_tokens=64))
    async with serving(redis_server, expert) as running:
        await run_collect(running, tmp_path, max_cost=0.0012, max_tokens=64, concurrency=3)
    spent = len(expert.requests) * card("one").cost(expert.usage)
    assert 1 <= len(expert.requests) < 6
    assert spent <= 0.0012


async def test_a_judge_grades(redis_server: RedisProcess, tmp_path: Path) -> None:
    expert, judge = FakeExpert("one"), FakeExpert("judge", ('{"score": 7}',))
    async with serving(redis_server, expert, judge) as running:
        await run_collect(running, tmp_path, expert=["one"], grader="judge", judge="judge", test_share=0.0)
    assert load_table(tmp_path / "table").train.quality.tolist() == [[pytest.approx(0.7)]] * 6


async def test_what_the_service_answers_is_told_apart(redis_server: RedisProcess) -> None:
    slow = FakeExpert("slow", error=ExpertTimeoutError("it took too long"))
    broken = FakeExpert("broken", error=ExpertRequestError("no such parameter"))
    messages = [{"role": "user", "content": "hi"}]
    environment = {"ROUTER_API_KEYS": "me:secret"}
    async with serving(redis_server, slow, broken, environment=environment) as running:
        async with httpx.AsyncClient(base_url=running.url, headers={"authorization": "Bearer secret"}) as client:
            ask = ServiceAsk(client)
            with pytest.raises(AskError, match="took too long") as timed_out:
                await ask(card("slow"), messages, 5, 0.0)
            with pytest.raises(AskError, match="no such parameter") as refused:
                await ask(card("broken"), messages, 5, 0.0)
        with pytest.raises(CollectError, match="refuses us, status 401"):
            await ServiceAsk(running.client)(card("slow"), messages, 5, 0.0)
    async with httpx.AsyncClient(base_url=running.url) as client:
        with pytest.raises(CollectError, match="no service answers"):
            await ServiceAsk(client)(card("slow"), messages, 5, 0.0)
    assert (timed_out.value.retryable, timed_out.value.billed) == (True, True)
    assert (refused.value.retryable, refused.value.billed) == (False, False)


async def test_export_joins_the_ledger_with_the_last_feedback(
    redis_server: RedisProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = FakeExpert("one")
    async with serving(redis_server, expert, environment={"ROUTER_LEDGER_TEXT": "true"}) as running:
        answers = [(await running.chat(text=f"question {i}")).json()["id"] for i in range(3)]
        for answer, rating in [(answers[0], "down"), (answers[0], "up"), (answers[1], 0.25)]:
            response = await running.client.post("/v1/feedback", json={"id": answer, "rating": rating})
            assert response.status_code == 200
        await running.stream(count=3)
        await asyncio.to_thread(export, out_folder=tmp_path / "table", test_share=0.0, url=running.url, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rows": 2, "left_out": {"not rated": 1}}
    table = load_table(tmp_path / "table").train
    assert dict(zip(table.texts, table.quality[:, 0].tolist(), strict=True)) == {"question 0": 1.0, "question 1": 0.25}
    assert (table.output_tokens == expert.usage.output_tokens).all()


def refuse(_: RouterChoice, promoted: Path | None) -> AnyRouter:
    """What loads routers in a service that can read no artefact."""
    if promoted:
        raise RouterConfigError(f"no router in {promoted}")
    return best_router("first", "first")


async def test_promotion_waits_until_the_service_answers_from_the_artefact(
    redis_server: RedisProcess, tmp_path: Path
) -> None:
    best_router("second", "first", "second").save(tmp_path / "best")
    async with serving(redis_server, FakeExpert("first"), FakeExpert("second")) as running:
        before = (await running.chat()).headers["x-router-expert"]
        await asyncio.to_thread(put_in_service, running.url, "best", tmp_path / "best", timeout_s=30)
        after = (await running.chat()).headers["x-router-expert"]
    assert (before, after) == ("first", "second")


async def test_a_service_without_a_router_answers_by_name_and_takes_its_first_one_over(
    redis_server: RedisProcess, tmp_path: Path
) -> None:
    def load(_: RouterChoice, promoted: Path | None) -> AnyRouter:
        if promoted is None:
            raise RouterConfigError("no artefact yet")
        return load_router(promoted)

    best_router("first", "first").save(tmp_path / "best")
    async with serving(redis_server, FakeExpert("first"), load=load, ready=False) as running:

        async def waits() -> bool:
            return "no artefact yet" in await running.readiness()

        await eventually(waits)
        assert [(await running.chat(model)).status_code for model in ("first", "auto")] == [200, 503]
        await asyncio.to_thread(put_in_service, running.url, "best", tmp_path / "best", timeout_s=30)
        assert (await running.chat()).status_code == 200


async def test_a_promotion_that_fails_says_why_and_changes_nothing(redis_server: RedisProcess, tmp_path: Path) -> None:
    folder = tmp_path / "best"
    best_router("first", "first").save(folder)
    async with serving(redis_server, FakeExpert("first"), load=refuse) as running:
        with pytest.raises(RouterConfigError, match="cannot be read"):
            await asyncio.to_thread(put_in_service, running.url, "best", tmp_path, timeout_s=30)
        with pytest.raises(CommandError, match="no policy of the service uses the router 'knn'; in use are best"):
            await asyncio.to_thread(put_in_service, running.url, "knn", folder, timeout_s=30)
        with pytest.raises(CommandError, match=r"keeps the router that it has.*no router in"):
            await asyncio.to_thread(put_in_service, running.url, "best", folder, timeout_s=30)
        assert (await running.chat()).status_code == 200
