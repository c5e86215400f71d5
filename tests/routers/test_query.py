"""From bodies to queries: what is condensed, what is needed, what is refused, and that nothing else raises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.errors import InvalidRequestError
from routers.query import query_from_body

USER = {"role": "user", "content": "What day is it?"}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": list(messages), **fields}


def text_of(*messages: Any) -> str:
    return query_from_body("chat/completions", chat(*messages)).text


def test_one_question_is_routed_on_as_it_is() -> None:
    query = query_from_body("chat/completions", chat(USER))
    assert query.text == "What day is it?"
    assert query.messages == [USER]
    assert query.needs_modalities == {"text"}
    assert not query.needs_features
    assert query.session is None
    assert query.max_output_tokens is None
    assert query.input_tokens == 8  # 15 characters, and what a message costs beside its words


def test_a_conversation_begins_with_the_last_question() -> None:
    text = text_of(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Spain?"},
    )
    assert text == "And of Spain?\n\nParis.\n\nCapital of France?\n\nBe brief."


def test_tools_and_null_content() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    text = text_of(
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "18 degrees"},
    )
    assert text == 'Weather in Rome?\n\n18 degrees\n\nweather({"city": "Rome"})'


def test_parts_are_joined_and_their_modalities_needed() -> None:
    parts = [
        {"type": "text", "text": "What is on"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "text", "text": "these?"},
    ]
    query = query_from_body("chat/completions", chat({"role": "user", "content": parts}))
    assert query.text == "What is on\nthese?"
    assert query.needs_modalities == {"text", "image", "audio"}
    assert 1600 < query.input_tokens < 1700  # not the 25,000 that the picture's letters would be
    file = chat({"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]})
    assert query_from_body("chat/completions", file).needs_modalities == {"text", "file"}


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tools"}),
        ({"tools": []}, set()),
        ({"functions": [{"name": "f"}]}, {"tools"}),
        ({"response_format": {"type": "json_object"}}, {"json"}),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, {"json"}),
        ({"response_format": {"type": "text"}}, set()),
        ({"response_format": "odd"}, set()),
        ({"logprobs": True}, {"logprobs"}),
        ({"logprobs": False}, set()),
        ({"logprobs": None}, set()),
    ],
)
def test_features_needed(fields: dict[str, Any], needs: set[str]) -> None:
    assert query_from_body("chat/completions", chat(USER, **fields)).needs_features == needs


def test_completions_take_any_form_of_prompt() -> None:
    def query(prompt: Any) -> tuple[str, int]:
        found = query_from_body("completions", {"prompt": prompt, "logprobs": 0})
        assert found.needs_features == {"logprobs"}
        return found.text, found.input_tokens

    assert query("Once upon") == ("Once upon", 3)
    assert query(["Once", "upon"]) == ("Once\n\nupon", 2)
    assert query([1, 2, 3]) == ("", 3)
    assert query([[1, 2], [3]]) == ("", 3)


def test_embeddings_cost_no_output() -> None:
    query = query_from_body("embeddings", {"input": ["a", "b"]})
    assert (query.endpoint, query.text, query.max_output_tokens) == ("embeddings", "a\n\nb", 0)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": True}, None),
        ({"max_tokens": "5"}, None),
        ({"max_tokens": -1}, None),
    ],
)
def test_the_caller_s_limit(fields: dict[str, Any], limit: int | None) -> None:
    assert query_from_body("chat/completions", chat(USER, **fields)).max_output_tokens == limit


@pytest.mark.parametrize(
    ("fields", "given_session", "session"),
    [
        ({}, None, None),
        ({"user": "u"}, None, "u"),
        ({"user": "u", "metadata": {"session_id": "s"}}, None, "s"),
        ({"user": "u", "metadata": {"session_id": "s"}}, "header", "header"),
        ({"user": 3, "metadata": "odd"}, None, None),
    ],
)
def test_session(fields: dict[str, Any], given_session: str | None, session: str | None) -> None:
    assert query_from_body("chat/completions", chat(USER, **fields), session=given_session).session == session


@pytest.mark.parametrize(
    ("endpoint", "body", "param", "code"),
    [
        ("chat/completions", {}, "messages", "missing_required_parameter"),
        ("chat/completions", {"messages": "hi"}, "messages", "invalid_type"),
        ("chat/completions", {"messages": None}, "messages", "invalid_type"),
        ("chat/completions", {"messages": []}, "messages", "empty_array"),
        ("chat/completions", {"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ("chat/completions", {"messages": [USER, {"content": "x"}]}, "messages[1].role", "missing_required_parameter"),
        ("completions", {}, "prompt", "missing_required_parameter"),
        ("completions", {"prompt": []}, "prompt", "empty_array"),
        ("completions", {"prompt": {"a": 1}}, "prompt", "invalid_type"),
        ("completions", {"prompt": ["a", 1]}, "prompt", "invalid_type"),
        ("completions", {"prompt": [1, True]}, "prompt", "invalid_type"),
        ("embeddings", {"input": None}, "input", "missing_required_parameter"),
    ],
)
def test_what_openai_refuses_is_refused(endpoint: Any, body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        query_from_body(endpoint, body)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert param in str(caught.value)


def test_a_long_conversation_is_cut_not_its_question() -> None:
    turns = [{"role": "user" if i % 2 else "assistant", "content": "x" * 5000} for i in range(100)]
    query = query_from_body("chat/completions", chat(*turns, {"role": "user", "content": "The question?"}))
    assert query.text.startswith("The question?\n\nx")
    assert len(query.text) <= 16_384
    assert query.input_tokens > 125_000


def test_deep_nesting_is_no_way_to_break_it() -> None:
    deep: Any = "end"
    for _ in range(5000):
        deep = [deep]
    assert query_from_body("chat/completions", chat(USER, tools=deep)).needs_features == {"tools"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
odd_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "odd"])},
    optional={"content": json_values | st.lists(json_values, max_size=3), "tool_calls": json_values},
)


@given(
    messages=st.lists(odd_messages, min_size=1, max_size=4),
    fields=st.dictionaries(
        st.sampled_from(["tools", "response_format", "logprobs", "max_tokens", "user", "metadata", "functions", "x"]),
        json_values,
    ),
)
def test_odd_shapes_pass(messages: list[dict[str, Any]], fields: dict[str, Any]) -> None:
    query = query_from_body("chat/completions", chat(*messages, **fields))
    assert isinstance(query.text, str)
    assert query.input_tokens >= 4 * len(messages)


def test_every_answer_that_is_asked_for_counts() -> None:
    assert query_from_body("completions", {"prompt": ["a", "b"], "n": 3}).choices == 6
    assert query_from_body("completions", {"prompt": "a", "n": 2, "best_of": 4}).choices == 4
    assert query_from_body("chat/completions", {"messages": [{"role": "user", "content": "a"}]}).choices == 1
