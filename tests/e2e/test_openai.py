"""The official OpenAI client, unchanged, against the service."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.conftest import LOCAL, OTHER_LOCAL, Stack
from tests.e2e.waiting import eventually

pytestmark = pytest.mark.slow

QUESTION: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]


def test_chat(stack: Stack) -> None:
    answer = stack.openai.chat.completions.create(model=LOCAL, messages=QUESTION, max_tokens=16)
    assert answer.object == "chat.completion"
    assert answer.model == LOCAL
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streaming_chat_says_what_plain_chat_says(stack: Stack) -> None:
    asked: dict[str, Any] = {"model": OTHER_LOCAL, "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    plain = stack.openai.chat.completions.create(**asked)
    chunks = list(stack.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert len(chunks) > 2
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage == plain.usage


def test_completions(stack: Stack) -> None:
    answer = stack.openai.completions.create(model=LOCAL, prompt="2 + 3 =", max_tokens=4)
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 4


def test_auto_names_the_expert_that_answered(stack: Stack) -> None:
    raw = stack.openai.chat.completions.with_raw_response.create(model="auto", messages=QUESTION, max_tokens=16)
    assert raw.parse().model == raw.headers["x-router-expert"] == LOCAL
    assert raw.headers["x-router-policy"] == "auto"
    assert float(raw.headers["x-router-cost-usd"]) > 0


def test_models(stack: Stack) -> None:
    models = {model.id for model in stack.openai.models.list()}
    assert {"auto", "auto:remote-first", LOCAL, "fast"} <= models
    assert stack.openai.models.retrieve(LOCAL).id == LOCAL


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"model": "no-such"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "one two " * 9000}]},
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
        ),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools", "unsupported_parameter"),
    ],
)
def test_errors_have_status_and_body(
    stack: Stack, fields: dict[str, Any], error: type[openai.APIStatusError], param: str | None, code: str
) -> None:
    with pytest.raises(error) as caught:
        stack.openai.chat.completions.create(**{"model": LOCAL, "messages": QUESTION, **fields})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert "Traceback" not in caught.value.response.text


def test_bad_json(stack: Stack) -> None:
    headers = {"content-type": "application/json"}
    response = stack.http.post("/v1/chat/completions", content=b'{"model": ', headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_json")
    assert "Traceback" not in response.text


def test_a_request_is_followed_by_the_id_it_came_with_or_gets_one(stack: Stack) -> None:
    body = {"model": LOCAL, "messages": QUESTION}
    ids = [
        stack.http.post("/v1/chat/completions", json=body, headers=headers).headers.get_list("x-request-id")
        for headers in ({"x-request-id": "mine"}, {})
    ]
    assert ids[0] == ["mine"]
    assert len(ids[1]) == 1
    eventually(lambda: {"mine", ids[1][0]} <= {entry["request_id"] for entry in stack.ledger()})
