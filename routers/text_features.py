"""What sentence embeddings do not keep of a text: its length, its shape, and its very words.

Whether a query is a proof, a program, a multiple choice or a table, how long it is and how large its numbers are says
much about which expert gets it right. The counts here are standardised over the train queries; words and pairs of words
are hashed, weighed by tf-idf and projected on the train table's first singular vectors (latent semantic analysis).
"""

from __future__ import annotations

import math
import re
import string
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, cast

import numpy as np

from routers.artefact import AnyArray, Artefact
from routers.contracts import FloatArray

_MOST_CHARS = 2000  # read of a text, so that a decision stays far below a millisecond
_BUCKETS = 4096
_DIRECTIONS = 128
_SHAPE_WEIGHT, _WORD_WEIGHT = 0.5, 1.0  # beside an embedding of length 1

_CAPITALS = string.ascii_uppercase.encode()
_WORD = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+")
_OPTION = re.compile(r"\n\s*\(?[A-E][).:]")
_CODE = re.compile(r"\bdef |\breturn\b|\bimport |#include|=>|\bfunction\b")


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Turns texts into float32 [B, S + 128]: S counts, then words. Fitted on the train texts.

    `centre` and `scale` [S] standardise the counts; `projection` [4096, D] takes hashed words, tf-idf included, to at
    most 128 directions.
    """

    centre: FloatArray
    scale: FloatArray
    projection: FloatArray

    @classmethod
    def fit(cls, texts: Sequence[str], seed: int) -> Self:
        """Learn what is usual in `texts`."""
        shapes = np.array([_shape(text) for text in texts], np.float32)
        spread = shapes.std(0)
        scale = _SHAPE_WEIGHT / np.where(spread > 0, spread, np.inf) / np.sqrt(shapes.shape[1])
        return cls(shapes.mean(0), scale.astype(np.float32), _projection(texts, seed))

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """The features of `texts`, row by row."""
        found = np.empty((len(texts), self.centre.size + self.projection.shape[1] - 1), np.float32)
        for row, text in zip(found, texts, strict=True):
            row[: self.centre.size] = (_shape(text) - self.centre) * self.scale
            row[self.centre.size :] = _direction(text, self.projection)
        return found

    def beside(self, embeddings: FloatArray, texts: Sequence[str], weight: float) -> FloatArray:
        """Where `texts` lie when these features count `weight` times beside their `embeddings` [B, D]: unit vectors."""
        both = np.hstack([embeddings, np.float32(weight) * self(texts)])
        placed: FloatArray = both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), np.float32(1e-9))
        return placed

    def arrays(self) -> dict[str, AnyArray]:
        """For an artefact."""
        return {"text.centre": self.centre, "text.scale": self.scale, "text.projection": self.projection}

    @classmethod
    def restore(cls, artefact: Artefact) -> Self:
        """From an artefact."""
        shapes = len(_shape(""))
        return cls(
            artefact.array("text.centre", shapes),
            artefact.array("text.scale", shapes),
            artefact.array("text.projection", _BUCKETS, None),
        )


def _shape(text: str) -> list[float]:
    length, text = len(text), text[:_MOST_CHARS]
    words, numbers, chars = text.split(), _NUMBER.findall(text), max(1, len(text))
    raw = text.encode("utf-8", "surrogatepass")
    counted = [length, len(words), *(text.count(mark) for mark in "\n$\\?,.(={[_"), len(numbers)]
    return [
        *map(math.log1p, counted),
        sum(map(len, numbers)) / chars,
        max(map(len, numbers), default=0),
        (len(raw) - len(raw.translate(None, _CAPITALS))) / chars,
        sum(map(len, words)) / max(1, len(words)),
        len(set(words)) / max(1, len(words)),
        float(text.isascii()),
        float(_OPTION.search(text) is not None),
        float(_CODE.search(text) is not None),
    ]


def _buckets(text: str) -> dict[int, int]:
    """How often each bucket of hashed words and pairs of words occurs."""
    words = [word.encode("utf-8", "surrogatepass") for word in _WORD.findall(text[:_MOST_CHARS].lower())]
    hashes = [zlib.crc32(word) for word in words]
    pairs = [zlib.crc32(b" " + second, first) for first, second in zip(hashes, words[1:], strict=False)]
    return Counter([hashed % _BUCKETS for hashed in hashes + pairs])


def _weights(counts: Mapping[int, int]) -> FloatArray:
    return 1 + np.log(np.fromiter(counts.values(), np.float32, len(counts)))


def _direction(text: str, projection: FloatArray) -> FloatArray:
    """Of length at most 1: the text's tf-idf vector, made a unit vector, along each direction."""
    counts = _buckets(text)
    places = np.fromiter(counts, np.intp, len(counts))
    rows = projection.take(places, axis=0)
    weights = _weights(counts) * rows[:, 0]
    projected = cast("FloatArray", weights @ rows[:, 1:])
    return projected * _WORD_WEIGHT / (float(np.linalg.norm(weights)) or 1.0)


def _projection(texts: Sequence[str], seed: int) -> FloatArray:
    """[4096, 1 + D]: each bucket's inverse document frequency, then its place on the D directions."""
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    counts = [_buckets(text) for text in texts]
    rows = np.repeat(np.arange(len(texts)), [len(found) for found in counts])
    columns = np.concatenate([np.fromiter(found, np.intp, len(found)) for found in counts])
    weights = np.concatenate([_weights(found) for found in counts])
    known = np.bincount(columns, minlength=_BUCKETS)
    idf = np.log((1 + len(texts)) / (1 + known)).astype(np.float32)
    matrix = sparse.csr_matrix((weights * idf[columns], (rows, columns)), shape=(len(texts), _BUCKETS))
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
    unit = sparse.diags(1 / np.where(lengths > 0, lengths, 1)) @ matrix
    directions = min(_DIRECTIONS, len(texts) - 1)
    if directions < 1:
        return idf[:, None]
    vectors = randomized_svd(unit, directions, random_state=seed)[2]
    return np.hstack([idf[:, None], vectors.T]).astype(np.float32)
