"""Which answers may be kept, under what name, and how a kept answer is given out again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from experts.expert import Endpoint

_NOT_PART_OF_THE_QUESTION = frozenset({"user", "metadata", "store"})


def is_deterministic(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Whether the same request is meant to have the same answer."""
    return endpoint == "embeddings" or body.get("temperature") == 0 or body.get("seed") is not None


def digest_of(key: str, endpoint: Endpoint, body: Mapping[str, Any]) -> str:
    """The name of an answer: the key's name (tenants share nothing), the endpoint, and all that shapes the answer."""
    question = {name: value for name, value in body.items() if name not in _NOT_PART_OF_THE_QUESTION}
    data = orjson.dumps([key, endpoint, question], option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def is_complete(pieces: Sequence[bytes]) -> bool:
    """Whether the pieces are a whole answer: no error, and every choice has its end."""
    ended: dict[int, bool] = {}
    for piece in map(orjson.loads, pieces):
        if "error" in piece:
            return False
        if "data" in piece:  # embeddings
            return True
        for choice in piece.get("choices", ()):
            index = choice.get("index", 0)
            ended[index] = ended.get(index, False) or choice.get("finish_reason") is not None
    return bool(ended) and all(ended.values())


def reissue(piece: bytes, answer_id: str) -> bytes:
    """A kept piece as part of another answer."""
    value = orjson.loads(piece)
    if "id" in value:
        value["id"] = answer_id
    return orjson.dumps(value)
