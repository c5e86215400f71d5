"""Rankings and what they are worth: nDCG and recall per query, and BM25 as the word-matching baseline."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from routers.contracts import FloatArray

Ranking = npt.NDArray[np.intp]
"""The places of the best documents, best first."""

_WORD = re.compile(r"[a-z0-9]+")
_COMMON = """a about an and are as at be been but by can could do does for from had has have how i if in into is it its
may no not of on or other so such than that the their then there these they this to was we were what when where which
while who will with would you"""
_STOPWORDS = frozenset(_COMMON.split())


def top(scores: FloatArray, count: int) -> Ranking:
    """The places of the `count` best of each row of `scores` [B, N], best first; of equals the earlier: [B, count]."""
    if count < scores.shape[1]:
        places = np.sort(np.argpartition(-scores, count - 1, axis=1)[:, :count], axis=1)
    else:
        places = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    order = np.argsort(-np.take_along_axis(scores, places, 1), axis=1, kind="stable")
    return np.take_along_axis(places, order, 1)


def ndcg(ranking: Sequence[str], grades: Mapping[str, int], count: int = 10) -> float:
    """Normalised discounted cumulative gain at `count`, with linear gains (as trec_eval has it)."""
    gains = [grades.get(document, 0) for document in ranking[:count]]
    best = sorted(grades.values(), reverse=True)[:count]
    return _discounted(gains) / _discounted(best) if best else 0.0


def own_ndcg(
    vectors: FloatArray, pool: FloatArray, own: npt.NDArray[np.int64], counted: npt.NDArray[np.bool_]
) -> list[float]:
    """nDCG@10 of queries [B, D], of which the i-th is answered by the text `own[i]` of `pool` [N, D] alone.

    A text that is not `counted` [B, N] for a query is not in its ranking. No text is in the pool twice.
    """
    scores = np.where(counted, vectors @ pool.T, -np.inf).astype(np.float32)
    places = [np.flatnonzero(row == right) for row, right in zip(top(scores, 10), own, strict=True)]
    return [1 / math.log2(found[0] + 2) if len(found) else 0.0 for found in places]


def recall(ranking: Sequence[str], grades: Mapping[str, int], count: int = 100) -> float:
    """The share of the relevant documents that are among the first `count`."""
    return sum(document in grades for document in ranking[:count]) / len(grades) if grades else 0.0


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains))


def terms(text: str) -> list[str]:
    """Lower-case words without the commonest and without the plural's s."""
    words = (word for word in _WORD.findall(text.lower()) if word not in _STOPWORDS)
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]


class BM25:
    """Okapi BM25 (k1 1.2, b 0.75) with Lucene's idf."""

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(terms(text)) for text in texts]
        lengths = np.array([sum(count.values()) for count in counts], np.float32)
        self._documents = len(texts)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))
        postings: dict[str, list[tuple[int, int]]] = {}
        for place, count in enumerate(counts):
            for term, times in count.items():
                postings.setdefault(term, []).append((place, times))
        self._frequency = {term: len(found) for term, found in postings.items()}
        self._weights: dict[str, tuple[Ranking, FloatArray]] = {}
        for term, found in postings.items():
            places, times = np.array(found).T
            idf = math.log(1 + (len(texts) - len(found) + 0.5) / (len(found) + 0.5))
            self._weights[term] = (places, (idf * times * (k1 + 1) / (times + norm[places])).astype(np.float32))

    def scores(self, query: str) -> FloatArray:
        """Of every document: float32 [N]."""
        scores = np.zeros(self._documents, np.float32)
        for term in terms(query):
            if term in self._weights:
                places, weights = self._weights[term]
                scores[places] += weights
        return scores

    def commonest(self, count: int) -> list[str]:
        """The words that are in the most documents, in fewer than half of them where the documents are many."""
        most = max(2, self._documents // 2)
        found = [
            term for term in self._frequency if self._frequency[term] <= most and not term.isdigit() and len(term) > 2
        ]
        return sorted(found, key=lambda term: (-self._frequency[term], term))[:count]
