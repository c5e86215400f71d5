"""What is set aside of a ceiling for a call, and what is counted of its stream."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from experts.cards import ExpertCard
from experts.errors import ExpertRequestError, ExpertUnavailableError
from experts.expert import Endpoint, ExpertRequest
from routers.ceilings import CostCeiling, most_input_tokens, most_output_tokens

CARD = ExpertCard(name="a", input_price=1.0, output_price=2.0, context_length=100_000)
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
FRAME = 32


def asks(body: dict[str, Any], endpoint: Endpoint = "chat/completions") -> ExpertRequest:
    return ExpertRequest(id="1", endpoint=endpoint, body=body)


def content(*parts: dict[str, Any]) -> ExpertRequest:
    return asks({"messages": [{"role": "user", "content": list(parts)}]})


def piece(text: str) -> bytes:
    return orjson.dumps({"id": "x" * 99, "choices": [{"index": 0, "delta": {"content": text}}]})


def test_a_call_has_four_bytes_for_each_token_and_the_next_what_is_left() -> None:
    request = asks({**HELLO, "max_tokens": 500})
    reads = 1e-6 * most_input_tokens(request, 100_000)
    ceiling = CostCeiling(2 * reads + 2e-6 * (700 * 4 + 2 * FRAME) + 1e-9)
    first, bounded = ceiling.grant(CARD, request)
    assert (first.output_bytes, bounded.body["max_tokens"]) == (500 * 4 + FRAME, 500)
    second, bounded = ceiling.grant(CARD, request)
    assert (second.output_bytes, bounded.body["max_tokens"]) == (200 * 4 + FRAME, 200)
    with pytest.raises(ExpertUnavailableError, match="leaves no call of it"):
        ceiling.grant(CARD, request)
    ceiling.settle(first, 0.0)
    assert ceiling.grant(CARD, request)[1].body["max_tokens"] == 500


def test_a_stream_of_longer_tokens_goes_on_while_there_is_money() -> None:
    request = asks({**HELLO, "max_tokens": 10})
    ceiling = CostCeiling(1e-6 * most_input_tokens(request, 100_000) + 2e-6 * 200)
    grant, _ = ceiling.grant(CARD, request)
    assert grant.output_bytes == 72
    assert ceiling.take(grant, CARD, piece("x" * 72))
    assert ceiling.take(grant, CARD, piece("y" * 127))
    assert not ceiling.take(grant, CARD, piece("zz"))
    ceiling.settle(grant, grant.usd)
    assert ceiling.left == pytest.approx(2e-6)


def test_what_is_not_known_to_be_unused_is_spent_and_a_claim_is_bounded() -> None:
    ceiling = CostCeiling(1.0)
    for told, spent in ((None, 1.0), (1e9, 1.0), (0.25e-3, None)):
        grant, _ = ceiling.grant(CARD, asks({**HELLO, "max_tokens": 100}))
        before = ceiling.left + grant.usd
        ceiling.settle(grant, told)
        assert ceiling.left == pytest.approx(before - (grant.usd * spent if spent else told or 0))


@pytest.mark.parametrize("bound", [-5, 0, True, 1.5, "7"])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "n", "best_of"])
def test_a_bound_that_is_none_is_refused(field: str, bound: Any) -> None:
    ceiling = CostCeiling(1.0)
    with pytest.raises(ExpertRequestError, match=f"'{field}' must be a whole number"):
        ceiling.grant(CARD, asks({**HELLO, field: bound}))
    assert ceiling.left == 1.0


def test_every_bound_is_told_the_expert_and_the_least_counts() -> None:
    request = asks({**HELLO, "max_tokens": 50, "max_completion_tokens": 80})
    _, bounded = CostCeiling(1.0).grant(CARD, request)
    assert (bounded.body["max_tokens"], bounded.body["max_completion_tokens"]) == (50, 50)
    _, bounded = CostCeiling(1.0).grant(CARD, asks({**HELLO, "max_completion_tokens": 80, "max_tokens": None}))
    assert (bounded.body["max_tokens"], bounded.body["max_completion_tokens"]) == (None, 80)
    _, bounded = CostCeiling(1.0).grant(CARD, asks({**HELLO, "max_tokens": 10**9}))
    assert bounded.body["max_tokens"] <= 100_000


def test_every_choice_is_paid_for() -> None:
    one, _ = CostCeiling(1.0).grant(CARD, asks({**HELLO, "max_tokens": 10}))
    three, _ = CostCeiling(1.0).grant(CARD, asks({**HELLO, "max_tokens": 10, "n": 2, "best_of": 3}))
    assert three.output_bytes == 3 * one.output_bytes
    prompts = asks({"prompt": ["a", "b"], "max_tokens": 10, "n": 2}, "completions")
    assert CostCeiling(1.0).grant(CARD, prompts)[0].output_bytes == 4 * one.output_bytes
    tokens = asks({"prompt": [1, 2, 3], "max_tokens": 10}, "completions")
    assert CostCeiling(1.0).grant(CARD, tokens)[0].output_bytes == one.output_bytes


def test_all_that_is_read_is_counted() -> None:
    def reads(request: ExpertRequest, context: int = 100_000) -> int:
        return most_input_tokens(request, context)

    plain, long = reads(asks(HELLO)), "é" * 1000
    assert reads(asks({"messages": [{"role": "user", "content": long}]})) > 2000
    for field in ("functions", "tools", "response_format", "prediction", "anything"):
        assert reads(asks({**HELLO, field: [{"name": long}]})) > plain + 2000
    assert reads(asks({"input": ["a" * 500, "b" * 500]}, "embeddings")) > 1000
    picture = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    inline = {"type": "image_url", "image_url": {"url": "data:" + "x" * 400_000}}
    assert 50_000 < reads(content({"type": "text", "text": "what?"}, picture)) < 51_000
    assert 50_000 < reads(content({"type": "text", "text": "what?"}, inline)) < 51_000
    assert reads(content(picture, inline), 10_000) == 10_000  # no more than fits
    assert reads(content({"type": "input_audio", "input_audio": {"data": "x"}})) == 100_000


def test_embeddings_are_set_aside() -> None:
    request = asks({"input": "x" * 1000}, "embeddings")
    ceiling = CostCeiling(0.0015)
    grant, same = ceiling.grant(CARD, request)
    assert same is request
    assert 0.001 < grant.usd < 0.0015
    with pytest.raises(ExpertUnavailableError, match="leaves no call"):
        ceiling.grant(CARD, request)


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        (piece("four"), 4),
        (piece(""), 1),
        (b"not json", 8),
        (b"[1, 2]", 6),
        (b'{"choices": "text"}', 11),
        (b'{"choices": [{"index": 12345, "logprobs": {"content": []}, "text": "four"}]}', 4),
        (b'{"choices": [], "usage": {"completion_tokens": 12345}}', 1),
        (b'{"choices": ["four"]}', 4),
        (b'{"choices": [{"delta": {"role": "assistant", "reasoning": "hm", "tool_calls": [{"id": "abc"}]}}]}', 5),
    ],
)
def test_a_byte_is_a_token_of_what_a_piece_says(data: bytes, tokens: int) -> None:
    assert most_output_tokens(data) == tokens
