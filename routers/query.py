"""From a client's JSON body to the `Query` that is routed on.

What OpenAI would refuse is refused here with its fields; everything else, however odd, passes: the expert judges it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experts.cards import Feature, Modality
from experts.expert import Endpoint
from routers.contracts import Query
from routers.errors import InvalidRequestError

_CHARS_PER_TOKEN = 4
_TOKENS_PER_MEDIUM = 800  # an image at high detail is 765 tokens at OpenAI's; sound and files are of that order
_TOKENS_PER_MESSAGE = 4  # role and separators
_MOST_TEXT = 16_384  # characters: the beginning that an embedder could ever look at
_MOST_CONTEXT_TURN = 1_000
_MOST_DEPTH = 64
_INSTRUCTING = ("system", "developer")
_MEDIA: Mapping[str, Modality] = {
    "image_url": "image", "image": "image", "input_image": "image",
    "input_audio": "audio", "audio": "audio",
    "file": "file", "input_file": "file",
}  # fmt: skip


def query_from_body(
    endpoint: Endpoint, body: Mapping[str, Any], *, session: str | None = None, tags: frozenset[str] = frozenset()
) -> Query:
    """Condense `body` into what routing needs of it. `session` (from a header, say) goes before the body's own.

    A conversation's text begins with the user's last message, so that one question alone is routed on as it is; the
    turns before it follow, newest first, then the instructions of system and developer. Raises `InvalidRequestError`.
    """
    if endpoint == "chat/completions":
        messages = _messages(body)
        text, tokens, texts = _conversation_text(messages), _conversation_tokens(messages) + _tool_tokens(body), 1
    else:
        messages = []
        text, tokens, texts = _texts(body, "prompt" if endpoint == "completions" else "input")
    return Query(
        endpoint=endpoint,
        text=text[:_MOST_TEXT],
        messages=messages,
        session=session or _session(body),
        tags=tags,
        needs_features=frozenset(_features(body)),
        needs_modalities=frozenset({"text", *_modalities(messages)}),
        input_tokens=tokens,
        max_output_tokens=0 if endpoint == "embeddings" else _max_output_tokens(body),
        choices=texts * _choices(body),
    )


# Chat


def _messages(body: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if "messages" not in body:
        raise InvalidRequestError("Missing required parameter: 'messages'.", "messages", "missing_required_parameter")
    messages = body["messages"]
    if not isinstance(messages, list):
        kind = type(messages).__name__
        raise InvalidRequestError(f"'messages' must be an array of objects, not {kind}.", "messages", "invalid_type")
    if not messages:
        raise InvalidRequestError("'messages' must have at least one message.", "messages", "empty_array")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            at = f"messages[{i}]"
            raise InvalidRequestError(f"{at!r} must be an object, not {type(message).__name__}.", at, "invalid_type")
        if not isinstance(message.get("role"), str):
            at = f"messages[{i}].role"
            raise InvalidRequestError(f"{at!r} must be a string such as 'user'.", at, "missing_required_parameter")
    return messages


def _conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    asked = _last_question(messages)
    instructions = [m for m in messages if m["role"] in _INSTRUCTING and m is not asked]
    turns = [m for m in reversed(messages) if m["role"] not in _INSTRUCTING and m is not asked]
    context = [_message_text(message)[:_MOST_CONTEXT_TURN] for message in (*turns, *instructions)]
    return "\n\n".join(text for text in (_message_text(asked), *context) if text)


def _last_question(messages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The user's last message that has text; else the last of anyone's that has."""
    with_text = [message for message in messages if _message_text(message)] or messages
    return next((m for m in reversed(with_text) if m["role"] == "user"), with_text[-1])


def _message_text(message: Mapping[str, Any]) -> str:
    """The message's words, and the calls of tools that it makes."""
    content = message.get("content")
    if isinstance(content, str) and "tool_calls" not in message:
        return content
    words = [content] if isinstance(content, str) else [_part_text(part) for part in _list(content)]
    calls = [_call_text(call) for call in _list(message.get("tool_calls"))]
    return "\n".join(text for text in (*words, *calls) if text)


def _part_text(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else ""


def _call_text(call: Any) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return ""
    return f"{function.get('name')}({function.get('arguments')})"


def _conversation_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    words = sum(_tokens(_message_text(message)) + _TOKENS_PER_MESSAGE for message in messages)
    return words + _TOKENS_PER_MEDIUM * len(list(_modalities(messages)))


def _tool_tokens(body: Mapping[str, Any]) -> int:
    """The tools and the schema that the expert is told of."""
    told = sum(_chars(body[field]) for field in ("tools", "functions", "response_format") if body.get(field))
    return -(-told // _CHARS_PER_TOKEN)


def _modalities(messages: Sequence[Mapping[str, Any]]) -> Iterator[Modality]:
    for message in messages:
        for part in _list(message.get("content")):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in _MEDIA:
                yield _MEDIA[kind]


# Completions and embeddings


def _texts(body: Mapping[str, Any], field: str) -> tuple[str, int, int]:
    """Text, tokens and number of: a string, several strings, or tokens that the client has made."""
    given = body.get(field)
    if given is None:
        message = f"Missing required parameter: {field!r}."
        raise InvalidRequestError(message, field, "missing_required_parameter")
    items = given if isinstance(given, list) else [given]
    if not items:
        raise InvalidRequestError(f"{field!r} must not be empty.", field, "empty_array")
    if all(isinstance(item, str) for item in items):
        return "\n\n".join(items), sum(map(_tokens, items)), len(items)
    lists = items if all(isinstance(item, list) for item in items) else [items]
    if not all(isinstance(token, int) and not isinstance(token, bool) for tokens in lists for token in tokens):
        message = f"{field!r} must be a string, an array of strings, or one or more arrays of tokens."
        raise InvalidRequestError(message, field, "invalid_type")
    return "", sum(map(len, lists)), len(lists)


# What every body may have


def _features(body: Mapping[str, Any]) -> Iterator[Feature]:
    if (body.get("tools") and body.get("tool_choice") != "none") or body.get("functions"):
        yield "tools"
    wanted = body.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") in ("json_object", "json_schema"):
        yield "json"
    logprobs = body.get("logprobs")
    if logprobs is not None and logprobs is not False:  # true for chats; a number, 0 too, for completions
        yield "logprobs"


def _max_output_tokens(body: Mapping[str, Any]) -> int | None:
    for field in ("max_completion_tokens", "max_tokens"):
        limit = body.get(field)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            return limit
    return None


def _choices(body: Mapping[str, Any]) -> int:
    """How many answers are made for each prompt: `n`, or of completions `best_of`, of which `n` are chosen."""
    counts = [body.get("n"), body.get("best_of")]
    return max([count for count in counts if isinstance(count, int) and not isinstance(count, bool)], default=1)


def _session(body: Mapping[str, Any]) -> str | None:
    """`metadata.session_id`, else `user`."""
    metadata = body.get("metadata")
    named = metadata.get("session_id") if isinstance(metadata, dict) else None
    return next((value for value in (named, body.get("user")) if isinstance(value, str) and value), None)


def _tokens(text: str) -> int:
    return -(-len(text) // _CHARS_PER_TOKEN)


def _chars(value: Any, depth: int = 0) -> int:
    """About as many characters as `value` has as JSON; what is nested deeper than any schema counts nothing."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, dict | list):
        return _CHARS_PER_TOKEN
    if depth == _MOST_DEPTH:
        return 0
    keys, items = (value.keys(), value.values()) if isinstance(value, dict) else ((), value)
    return sum(map(len, keys)) + sum(_chars(item, depth + 1) for item in items)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
