"""The index in service: texts become vectors by an exchange like any other, vectors become documents here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from experts.embedding.index import DocumentIndex, Hit
from router_service.errors import BadRequestError


class SearchIndex:
    """An index of documents that is searched in a thread. What `router-service index` changes is found at once."""

    def __init__(self, folder: Path) -> None:
        self._index = DocumentIndex(folder)

    async def answer(self, embedded: bytes, count: int) -> bytes:
        """The JSON of a search's answer, from that of the queries' embeddings.

        Raises `BadRequestError` where a vector is of another encoder than the documents'.
        """
        answer = orjson.loads(embedded)
        items, model = answer["data"], answer["model"]
        for item in items:
            if item.get("encoder") != self._index.encoder:
                raise BadRequestError(self._of_another(item.get("expert", model), item.get("encoder")), param="model")
        queries = np.array([item["embedding"] for item in items], np.float32)
        found = await asyncio.to_thread(self._index.search, queries, count)
        data = [
            {
                "object": "search_result",
                "index": place,
                "expert": item.get("expert", answer["model"]),
                "hits": _hits(hits),
            }
            for place, (item, hits) in enumerate(zip(items, found, strict=True))
        ]
        return orjson.dumps({"object": "list", "data": data, "model": model, "usage": answer["usage"]})

    def _of_another(self, expert: str, encoder: object) -> str:
        """Why an expert cannot search here: two encoders' vectors may be as long, but mean different things."""
        said = f"are of the encoder {str(encoder)[:12]}" if encoder else "do not say of which encoder they are"
        return (
            f"expert {expert!r} cannot search this index: its vectors {said}, the index's are of "
            f"{self._index.encoder[:12]} (weights, tokenizer, max_tokens and pooling must be the same)"
        )

    def close(self) -> None:
        """Close its files."""
        self._index.close()


def _hits(hits: list[Hit]) -> list[dict[str, Any]]:
    return [
        {"id": hit.document.id, "score": hit.score, "title": hit.document.title, "text": hit.document.text}
        for hit in hits
    ]
