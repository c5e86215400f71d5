"""What sentence embeddings do not keep of a text: its length, its shape, and its very words.

Whether a query is a proof, a program, a multiple choice or a table, how long it is and how large its numbers are says
much about which expert gets it right. The counts here are standardised over the train queries; words and pairs of words
are hashed, weighed by tf-idf and projected on the train table's first singular vectors (latent semantic analysis).
Words are cut and hashed for all texts of a batch at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import numpy as np
import numpy.typing as npt

from routers.artefact import AnyArray, Artefact
from routers.contracts import FloatArray

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.intp]
Hashes = npt.NDArray[np.uint32]

_MOST_CHARS = 2000  # read of a text, so that a decision stays far below a millisecond
_TEXTS_AT_ONCE = 1024
_BUCKETS = 4096  # a power of 2
_DIRECTIONS = 128
_FEW_DIRECTIONS = 64  # are summed for all texts at once, more text by text: what is the quicker
_SHAPE_WEIGHT, _WORD_WEIGHT = 0.5, 1.0  # beside an embedding of length 1

_OPTION = re.compile(r"\n\s*\(?[A-E][).:]")
_CODE = re.compile(r"\bdef |\breturn\b|\bimport |#include|=>|\bfunction\b")


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Turns texts into float32 [B, S + 128]: S counts, then words. Fitted on the train texts.

    `centre` and `scale` [S] standardise the counts; `projection` [4096, 1 + D] has the inverse document frequency of
    each bucket of hashed words, and its place on at most 128 directions.
    """

    centre: FloatArray
    scale: FloatArray
    projection: FloatArray

    @property
    def size(self) -> int:
        """How many features a text has."""
        return int(self.centre.size + self.projection.shape[1] - 1)

    @classmethod
    def fit(cls, texts: Sequence[str], seed: int) -> Self:
        """Learn what is usual in `texts`."""
        shapes = _shapes(texts)
        spread = shapes.std(0)
        scale = _SHAPE_WEIGHT / np.where(spread > 0, spread, np.inf) / np.sqrt(shapes.shape[1])
        return cls(shapes.mean(0), scale.astype(np.float32), _projection(texts, seed))

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """The features of `texts`, row by row."""
        shapes = self.centre.size
        found = np.zeros((len(texts), self.size), np.float32)
        found[:, :shapes] = (_shapes(texts) - self.centre) * self.scale
        for at, words in _word_counts(texts):
            weights = words.weights * self.projection[words.bucket, 0]
            length = np.sqrt(np.bincount(words.row, weights**2, words.texts))
            weights *= (_WORD_WEIGHT / np.where(length > 0, length, 1)).astype(np.float32)[words.row]
            found[at : at + words.texts, shapes:] = self._placed(words, weights)
        return found

    def words_through(self, weights: FloatArray) -> Self:
        """The same with its D directions of words taken to others by `weights` [D, P], which costs nothing later."""
        idf, directions = self.projection[:, :1], self.projection[:, 1:]
        return replace(self, projection=np.hstack([idf, directions @ weights]).astype(np.float32))

    def _placed(self, words: _Words, weights: FloatArray) -> FloatArray:
        """Sums of the buckets' places by `weights` [N], for each text: [B, D]."""
        first = np.searchsorted(words.row, np.arange(words.texts + 1))
        found = np.zeros((words.texts, self.projection.shape[1] - 1), np.float32)
        if found.shape[1] <= _FEW_DIRECTIONS:
            some = np.flatnonzero(np.diff(first))
            every = self.projection.take(words.bucket, axis=0)
            every *= weights[:, None]
            found[some] = np.add.reduceat(every, first[some])[:, 1:] if len(some) else 0
            return found
        for row, start, end in zip(found, first[:-1].tolist(), first[1:].tolist(), strict=True):
            row[:] = (weights[start:end] @ self.projection.take(words.bucket[start:end], axis=0))[1:]
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
        shapes = _shapes([""]).shape[1]
        return cls(
            artefact.known("text.centre", shapes),
            artefact.known("text.scale", shapes),
            artefact.known("text.projection", _BUCKETS, None),
        )


# Shapes


def _shapes(texts: Sequence[str]) -> FloatArray:
    """What is counted of each text, [B, S]."""
    length = np.array([len(text) for text in texts], np.float64)
    texts = [text[:_MOST_CHARS] for text in texts]
    chars = np.array([len(text) for text in texts], np.intp)
    row = np.repeat(np.arange(len(texts)), chars + 1)
    code = _looked_up("\n".join([*texts, ""]), _CODES, _code)
    some = np.flatnonzero(code != _OTHER)
    counts = np.bincount(row[some] * 16 + code[some], minlength=16 * len(texts)).reshape(-1, 16).astype(np.float64)
    counts[:, _NEWLINE] -= 1  # the one between texts
    begin, end = _runs(code == _DIGIT)
    numbers, longest = np.bincount(row[begin], minlength=len(texts)), np.zeros(len(texts), np.intp)
    np.maximum.at(longest, row[begin], end - begin)
    split = [(len(found), len(set(found))) for found in map(str.split, texts)]
    words, distinct = np.array(split, np.intp).reshape(-1, 2).T
    several = np.column_stack([length, words, counts[:, _NEWLINE:][:, : len(_MARKS)], numbers])
    letters = chars - counts[:, _SPACE] - counts[:, _NEWLINE]
    chars, words = np.maximum(chars, 1), np.maximum(words, 1)
    shares = [counts[:, _DIGIT] / chars, longest, counts[:, _CAPITAL] / chars, letters / words, distinct / words]
    signs = np.array([_signs(text) for text in texts], np.float64).reshape(-1, 3)
    return np.column_stack([np.log1p(several), *shares, signs]).astype(np.float32)


_MARKS = "\n$\\?,.(={[_"
_OTHER, _SPACE, _CAPITAL, _DIGIT, _NEWLINE = range(5)  # and the other marks after it


def _code(char: str) -> int:
    if char in _MARKS:
        return _NEWLINE + _MARKS.index(char)
    if "A" <= char <= "Z":
        return _CAPITAL
    return _SPACE if char.isspace() else _DIGIT if char.isdecimal() else _OTHER


def _signs(text: str) -> tuple[bool, bool, bool]:
    """Whether it is plain, multiple choice, code."""
    code = (
        ("def " in text or "return" in text or "import " in text or "function" in text)
        or "#include" in text
        or "=>" in text
    )  # quick to miss
    return text.isascii(), _OPTION.search(text) is not None, code and _CODE.search(text) is not None


def _looked_up(text: str, table: bytes, of: Callable[[str], int]) -> Bytes:
    """`of` of each character, which `table` has for ASCII."""
    looked_up = np.frombuffer(text.encode("ascii", "replace").translate(table), np.uint8)
    if text.isascii():
        return looked_up
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    strange = np.flatnonzero(points > 127)
    found, where = np.unique(points[strange], return_inverse=True)
    looked_up = looked_up.copy()
    looked_up[strange] = np.array([of(chr(point)) for point in found], np.uint8)[where]
    return looked_up


def _runs(inside: npt.NDArray[np.bool_]) -> tuple[Places, Places]:
    """Where runs begin and end."""
    inside = np.concatenate([[False], inside, [False]])
    change = np.flatnonzero(inside[1:] != inside[:-1])
    return change[::2], change[1::2]


_CODES = bytes(_code(chr(point)) for point in range(256))


# Words


@dataclass(frozen=True, slots=True)
class _Words:
    """Of a batch of `texts`: which `bucket` [N] of hashed words and pairs of words occurs in which `row` [N], rising.

    `weights` [N] are 1 + log of how often.
    """

    texts: int
    row: Places
    bucket: Places
    weights: FloatArray


def _word_counts(texts: Sequence[str]) -> Iterator[tuple[int, _Words]]:
    """Some texts at a time, so that memory is bounded: the place of the first, and their words."""
    for at in range(0, len(texts), _TEXTS_AT_ONCE):
        yield at, _count_words(texts[at : at + _TEXTS_AT_ONCE])


def _count_words(texts: Sequence[str]) -> _Words:
    row, hashes, pairs = _hashed(texts)
    same = row[1:] == row[:-1]
    rows = np.concatenate([row, row[1:][same]])
    buckets = np.concatenate([hashes, pairs[same]]) & np.uint32(_BUCKETS - 1)
    order = np.lexsort((buckets.astype(np.uint16), rows.astype(np.uint16)))  # of 16 bits: a radix sort
    first = np.flatnonzero(np.diff((rows * _BUCKETS + buckets)[order], prepend=-1))
    often, once = np.diff(first, append=len(order)).astype(np.float32), order[first]
    return _Words(len(texts), rows[once], buckets[once].astype(np.intp), 1 + np.log(often))


def _hashed(texts: Sequence[str]) -> tuple[Places, Hashes, Hashes]:
    r"""CRC-32 of each word, `\w+|[^\w\s]` of the lowered texts: its row [W], hash [W], and that of each pair [W - 1].

    A pair's hash goes on from its first word's, with a space and the second word.
    """
    encoded = [text[:_MOST_CHARS].lower().encode("utf-8", "surrogatepass") for text in texts]
    joined = b"\n".join([*encoded, b""])
    raw, kind = np.frombuffer(joined, np.uint8), np.frombuffer(joined.translate(_KINDS), np.uint8)
    first = (raw & 0xC0) != 0x80  # bytes of a character
    if not joined.isascii():
        strange = np.flatnonzero(raw > 127)
        sizes = np.diff(np.flatnonzero(first[strange]), append=len(strange))
        kind = kind.copy()
        kind[strange] = _looked_up(raw[strange].tobytes().decode("utf-8", "surrogatepass"), _KINDS, _kind).repeat(sizes)
    in_word = kind == _IN_WORD
    goes_on = in_word & np.concatenate([[False], in_word[:-1]])
    inside = np.flatnonzero(kind != _BETWEEN)
    begin = np.flatnonzero((first & ~goes_on)[inside])
    lengths = np.diff(begin, append=len(inside))
    ends = np.cumsum([len(text) + 1 for text in encoded])
    row = np.arange(len(texts)).repeat(np.diff(inside[begin].searchsorted(ends), prepend=0))
    if not len(begin):
        return row, np.zeros(0, np.uint32), np.zeros(0, np.uint32)
    table = _crc_table(int(lengths.max()).bit_length())
    # places in the table, by how many bytes of its word are behind each
    place = np.repeat((begin + lengths + 2) << 8, lengths)
    place -= np.arange(0, len(inside) << 8, 1 << 8)
    place += raw[inside]
    said = np.bitwise_xor.reduceat(table.take(place), begin)
    whole = np.uint32(0xFFFFFFFF)
    counts = np.arange(lengths.max() + 1)
    hashes = whole ^ said ^ _advanced(np.full(len(counts), whole), counts, table)[lengths]
    second = lengths[1:]
    pairs = whole ^ said[1:] ^ table[((second + 3) << 8) + ord(" ")] ^ _advanced(whole ^ hashes[:-1], second + 1, table)
    return row, hashes, pairs


_BETWEEN, _IN_WORD, _MARK = range(3)


def _kind(char: str) -> int:
    if char.isalnum() or char == "_":
        return _IN_WORD
    return _BETWEEN if char.isspace() else _MARK


_KINDS = bytes(_kind(chr(point)) for point in range(256))


@cache
def _crc_table(bits: int) -> Hashes:
    """What a byte with k bytes behind it does to a CRC-32, at (k + 3) * 256 + byte; words of less than 2 ** bits bytes.

    CRC-32 is linear: a word's is the exclusive or of what its bytes do. Rows of k < 0 are bytes still in the register.
    """
    byte = np.arange(256, dtype=np.uint32)
    once = byte
    for _ in range(8):
        once = np.where(once & 1, np.uint32(0xEDB88320), np.uint32(0)) ^ (once >> np.uint32(1))
    rows = [byte << np.uint32(16)]
    for _ in range((1 << bits) + 3):
        rows.append(once[rows[-1] & 0xFF] ^ (rows[-1] >> np.uint32(8)))
    return np.concatenate(rows)


def _advanced(state: Hashes, count: Places, table: Hashes) -> Hashes:
    """CRC registers `state` [W] after `count` [W] zero bytes."""
    found = np.zeros(len(state), np.uint32)
    for place in range(4):
        found ^= table.take(((count + 2 - place) << 8) + ((state >> np.uint32(8 * place)) & np.uint32(0xFF)))
    return found


def _projection(texts: Sequence[str], seed: int) -> FloatArray:
    """[4096, 1 + D]: each bucket's inverse document frequency, then its place on the D directions."""
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    counted = list(_word_counts(texts))
    rows = np.concatenate([words.row + at for at, words in counted])
    columns = np.concatenate([words.bucket for _, words in counted])
    weights = np.concatenate([words.weights for _, words in counted])
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
