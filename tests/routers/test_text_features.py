"""Text features: words are cut and hashed for a whole batch as they would be one by one, in every script."""

from __future__ import annotations

import re
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.text_features import TextFeatures, _count_words, _shapes

TEXTS = [
    "What is 12 + 30?",
    "",
    "  \n ",
    "Name the capital.\nA. Rome\n(B) Paris",
    "def f(x):\n    return x == 'a_b'",
    "héé Ünï straße 日本語 x\u200b😀 ١٢٣ İstanbul\u2028again",
    "\ud800 alone",
    "x" * 2500,
    "a " * 3,
]


def buckets(text: str) -> dict[int, int]:
    """As the module's documentation has it, word by word."""
    words = [word.encode("utf-8", "surrogatepass") for word in re.findall(r"\w+|[^\w\s]", text[:2000].lower())]
    hashes = [zlib.crc32(word) for word in words]
    pairs = [zlib.crc32(b" " + second, first) for first, second in zip(hashes, words[1:], strict=False)]
    return Counter(hashed % 4096 for hashed in hashes + pairs)


def counted(texts: list[str]) -> list[dict[int, int]]:
    found = _count_words(texts)
    often = np.rint(np.exp(found.weights - 1)).astype(int)
    return [
        dict(zip(found.bucket[found.row == row].tolist(), often[found.row == row].tolist(), strict=True))
        for row in range(len(texts))
    ]


@given(st.lists(st.text(st.characters(), max_size=40), max_size=6))
def test_words_of_a_batch_are_those_of_each_text(texts: list[str]) -> None:
    assert counted(texts) == [buckets(text) for text in texts]


def test_words_of_every_kind() -> None:
    assert counted(TEXTS) == [buckets(text) for text in TEXTS]


@pytest.mark.parametrize("text", TEXTS)
def test_shapes_are_what_they_are_called(text: str) -> None:
    (found,) = _shapes([text])
    length, text = len(text), text[:2000]
    words, numbers, chars = text.split(), re.findall(r"\d+", text), max(1, len(text))
    counts = [length, len(words), *(text.count(mark) for mark in "\n$\\?,.(={[_"), len(numbers)]
    shares = [
        sum(map(len, numbers)) / chars,
        max(map(len, numbers), default=0),
        len(re.findall("[A-Z]", text)) / chars,
        sum(map(len, words)) / max(1, len(words)),
        len(set(words)) / max(1, len(words)),
    ]
    np.testing.assert_allclose(found[:-3], [*np.log1p(counts), *shares], rtol=1e-6)
    assert found[-3] == text.isascii()


def test_signs_of_choice_and_code() -> None:
    found = _shapes([TEXTS[0], TEXTS[3], TEXTS[4], "a => b", "undef x"])
    assert found[:, -2].tolist() == [0, 1, 0, 0, 0]
    assert found[:, -1].tolist() == [0, 0, 1, 1, 0]


def test_a_text_has_the_same_features_alone_and_in_a_batch() -> None:
    features = TextFeatures.fit(TEXTS * 3, seed=0)
    batch = features(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(features([text])[0], batch[row], atol=1e-6)
    assert features([]).shape == (0, batch.shape[1])


@pytest.mark.parametrize("width", [3, 100])
def test_words_go_through_weights_at_once(width: int) -> None:
    features = TextFeatures.fit(TEXTS * 3, seed=0)
    shapes, directions = features.centre.size, features.projection.shape[1] - 1
    weights = np.random.default_rng(0).normal(size=(directions, width)).astype(np.float32)
    whole, found = features(TEXTS), features.words_through(weights)(TEXTS)
    np.testing.assert_array_equal(found[:, :shapes], whole[:, :shapes])
    np.testing.assert_allclose(found[:, shapes:], whole[:, shapes:] @ weights, atol=1e-5)
