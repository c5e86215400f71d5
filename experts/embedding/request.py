"""OpenAI's embeddings request, as far as an encoder understands it, and OpenAI's answer."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from experts.embedding.encoder import FloatArray
from experts.errors import ExpertRequestError
from experts.expert import Usage

_MOST_TEXTS = 2048
_FORMATS = ("float", "base64")


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts to embed, and how their vectors are to be written."""

    texts: Sequence[str]
    as_base64: bool

    @classmethod
    def parse(cls, body: Mapping[str, Any], dimensions: int) -> EmbeddingRequest:
        """Read a client's body. Raises `ExpertRequestError`."""
        wanted = body.get("dimensions")
        if wanted is not None and wanted != dimensions:
            message = f"dimensions: this expert's vectors have {dimensions}, not {wanted!r}"
            raise ExpertRequestError(message, param="dimensions", code="invalid_value")
        form = body.get("encoding_format") or "float"
        if form not in _FORMATS:
            message = f"encoding_format: {' or '.join(_FORMATS)}, not {form!r}"
            raise ExpertRequestError(message, param="encoding_format", code="invalid_value")
        return cls(texts_of(body), as_base64=form == "base64")


def texts_of(body: Mapping[str, Any]) -> list[str]:
    """The texts of `input`, which is one or several. Raises `ExpertRequestError`."""
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        message = "input: a text or an array of texts; arrays of tokens are another tokenizer's"
        raise ExpertRequestError(message, param="input", code="invalid_type")
    if len(texts) > _MOST_TEXTS:
        message = f"input: {len(texts)} texts are asked for at once, {_MOST_TEXTS} are possible"
        raise ExpertRequestError(message, param="input", code="invalid_value")
    return texts


def reply(name: str, vectors: FloatArray, usage: Usage, *, as_base64: bool, encoder: str) -> bytes:
    """The JSON of an embeddings answer.

    Beside OpenAI's fields every vector has `encoder`, the fingerprint of the encoder in whose space it is.
    """
    tokens = usage.input_tokens
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": _base64(vector) if as_base64 else vector,
            "encoder": encoder,
        }
        for i, vector in enumerate(vectors)
    ]
    answer = {
        "object": "list",
        "data": data,
        "model": name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64(vector: FloatArray) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
