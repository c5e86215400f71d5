"""Replies to searches: live, recorded, replayed, failed."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from experts.errors import ExpertUnavailableError
from experts.expert import ExpertRequest, Part, Usage
from routers.strategies.router_r1.protocol import NO_REPLY
from training.errors import TrainJobError
from training.router_r1.environment import Environment, Renamed, Search


class Echo:
    """Says the query again, once `together` calls are under way."""

    def __init__(self, together: int = 1) -> None:
        self.together, self.calls, self.all_there = together, 0, asyncio.Event()

    async def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        self.calls += 1
        if self.calls >= self.together:
            self.all_there.set()
        await self.all_there.wait()
        text = request.body["messages"][0]["content"]
        if text == "fail":
            raise ExpertUnavailableError("down")
        choice = {"index": 0, "delta": {"content": f"{text}!"}, "finish_reason": "stop"}
        yield Part(json.dumps({"choices": [choice]}).encode())
        yield Part(b"", Usage(3, 2))

    async def embed(self, request: ExpertRequest) -> Part:
        raise NotImplementedError

    async def healthy(self) -> bool:
        return True

    async def close(self) -> None:
        pass


def test_calls_of_all_rollouts_are_concurrent_and_the_same_is_asked_once() -> None:
    echo = Echo(together=5)
    environment = Environment({"echo": echo})
    searches = [Search("echo", str(n % 5)) for n in range(15)]
    replies = environment.replies(searches)
    environment.close()
    assert [reply.text for reply in replies] == [f"{n % 5}!" for n in range(15)]
    assert echo.calls == 5
    assert replies[0].output_tokens == 2


def test_what_was_recorded_is_replayed_with_no_fleet(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    live = Environment({"echo": Echo()}, path)
    first = live.replies([Search("echo", "a"), Search("echo", "b"), Search("echo", "fail")])
    live.close()
    replayed = Environment(None, path)
    again = replayed.replies([Search("echo", "a"), Search("echo", "b"), Search("echo", "never")])
    replayed.close()
    assert again[:2] == first[:2]
    assert (again[2].text, again[2].failed) == (NO_REPLY, True)
    assert first[2].failed
    assert len(path.read_text().splitlines()) == 2


def test_an_expert_that_the_fleet_lacks_gives_no_reply() -> None:
    environment = Environment({"echo": Echo()})
    assert environment.replies([Search("other", "a")])[0].text == NO_REPLY
    environment.close()


def test_an_expert_is_asked_under_another_name() -> None:
    environment = Environment({"echo": Echo()})
    found = Renamed(environment, {"voice": "echo"}).replies([Search("voice", "a"), Search("echo", "b")])
    environment.close()
    assert [one.text for one in found] == ["a!", "b!"]


def test_a_line_that_was_cut_off_is_left_out_and_any_other_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    whole = json.dumps({"expert": "e", "query": "q", "text": "t", "input_tokens": 1, "output_tokens": 1})
    path.write_text(f"{whole}\n{whole[:20]}")
    environment = Environment(None, path)
    assert environment.replies([Search("e", "q")])[0].text == "t"
    environment.close()
    live = Environment({"echo": Echo()}, path)
    live.replies([Search("echo", "a")])
    live.close()
    assert len(path.read_text().splitlines()) == 2
    Environment(None, path).close()
    path.write_text(f"{whole[:20]}\n{whole}\n")
    with pytest.raises(TrainJobError, match="line 1 is no recorded reply"):
        Environment(None, path)
