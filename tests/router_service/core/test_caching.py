"""What is kept, under what name, and what counts as a whole answer."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_service.core.caching import digest_of, is_complete, is_deterministic, reissue


def chunk(index: int = 0, finish: str | None = None) -> bytes:
    return orjson.dumps({"id": "a", "choices": [{"index": index, "delta": {}, "finish_reason": finish}]})


@pytest.mark.parametrize(
    ("pieces", "complete"),
    [
        ([chunk(), chunk(finish="stop")], True),
        ([chunk()], False),
        ([], False),
        ([chunk(0, "stop"), chunk(1)], False),
        ([chunk(0, "stop"), chunk(1, "length")], True),
        ([chunk(finish="stop"), b'{"choices":[],"usage":{}}'], True),
        ([chunk(finish="stop"), b'{"error":{}}'], False),
        ([b'{"object":"list","data":[]}'], True),
    ],
)
def test_a_whole_answer_has_an_end_for_every_choice(pieces: list[bytes], complete: bool) -> None:
    assert is_complete(pieces) is complete


@pytest.mark.parametrize(
    ("body", "deterministic"),
    [({"temperature": 0}, True), ({"temperature": 0.0}, True), ({"seed": 0}, True), ({"temperature": 1}, False)],
)
def test_only_what_is_asked_to_be_the_same_is_kept(body: dict[str, Any], deterministic: bool) -> None:
    assert is_deterministic("chat/completions", body) is deterministic


@given(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(-9, 9), st.text(max_size=5), st.none()), max_size=5))
def test_the_name_of_an_answer_depends_on_all_that_shapes_it_and_not_on_order(body: dict[str, Any]) -> None:
    name = digest_of("k", "chat/completions", body)
    assert name == digest_of("k", "chat/completions", dict(reversed(body.items())))
    assert name == digest_of("k", "chat/completions", {**body, "user": "someone"})
    assert name != digest_of("other", "chat/completions", body)
    assert name != digest_of("k", "completions", body)
    assert name != digest_of("k", "chat/completions", {**body, "new field": 1})


def test_a_kept_piece_gets_the_new_answers_id() -> None:
    assert orjson.loads(reissue(chunk(), "b"))["id"] == "b"
    assert reissue(b'{"data":[]}', "b") == b'{"data":[]}'
