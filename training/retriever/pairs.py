"""What an adapter is trained on: a query and a text that answers it.

From judged training queries where a corpus has them. Where it has none, from its documents alone: a sentence stands for
a query, the rest of its document for what is to be found (the inverse cloze task, arXiv 1906.00300). A document's first
sentence, often its title, is always taken, others by lot.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.errors import CorpusError
from training.retriever.corpus import Corpus, normalised, read_queries, test_queries, train_judgments

HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 120
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")
_FEWEST_WORDS, _MOST_WORDS, _WORDS_OF_A_PIECE, _FEWEST_WORDS_LEFT = 3, 40, 16, 5


@dataclass(frozen=True, slots=True)
class Pair:
    """`query` is answered by `text`, which is (a part of) the document at `document` in its corpus.

    `relevant` are all documents that answer the query, this one among them: none of them is a wrong answer.
    """

    query: str
    text: str
    document: int
    relevant: frozenset[int]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A domain's pairs. No query of `held_out` is in `train`; nor, where queries are sentences, is a document."""

    train: Sequence[Pair]
    held_out: Sequence[Pair]


def pairs_of(corpus: Corpus, *, seed: int = 0, most: int = 6000, sentences: int = 2) -> Pairs:
    """At most `most` pairs, held-out ones included; `sentences` a document where there are no judged queries.

    Raises `CorpusError` where a judged training query is a judged test query too.
    """
    rng = np.random.default_rng(seed)
    judged = list(_judged_pairs(corpus))
    found = judged or list(_sentence_pairs(corpus, rng, sentences))
    relevant: dict[str, set[int]] = {}
    for query, _, document in found:
        relevant.setdefault(normalised(query), set()).add(document)
    order = rng.permutation(len(found))[:most]
    chosen = [
        Pair(query, text, document, frozenset(relevant[normalised(query)]))
        for query, text, document in (found[i] for i in order)
    ]

    def unit(pair: Pair) -> Hashable:
        """What goes to one side as a whole: a judged query, or a document with its sentences."""
        return normalised(pair.query) if judged else pair.document

    units = list(dict.fromkeys(map(unit, chosen)))
    apart = set(units[: max(1, min(MOST_HELD_OUT, round(HELD_OUT_SHARE * len(units))))])
    held_out = [pair for pair in chosen if unit(pair) in apart]
    asked = {normalised(pair.query) for pair in held_out}
    return Pairs([pair for pair in chosen if unit(pair) not in apart and normalised(pair.query) not in asked], held_out)


class Pool:
    """The texts of pairs, each once, among which every pair's query is to find its own: `own[i]` is pair i's.

    `texts` are in the pairs' order. What else answers the query, another part of its document or another document that
    was judged relevant, is neither right nor wrong: `others(i)` are the places of those texts.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        places: dict[str, int] = {}
        self._of_document: dict[int, set[int]] = {}
        for pair in pairs:
            place = places.setdefault(pair.text, len(places))
            self._of_document.setdefault(pair.document, set()).add(place)
        self._relevant = [pair.relevant for pair in pairs]
        self.texts: Sequence[str] = list(places)
        self.own: npt.NDArray[np.int64] = np.array([places[pair.text] for pair in pairs], np.int64)

    def others(self, pair: int) -> list[int]:
        """The places of texts that answer the pair's query beside its own."""
        found: set[int] = set().union(*(self._of_document.get(one, ()) for one in self._relevant[pair]))
        return sorted(found - {int(self.own[pair])})

    def counted(self, pairs: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which texts are right or wrong for each of `pairs`: all but the `others` [len(pairs), len(texts)]."""
        counted = np.ones((len(pairs), len(self.texts)), bool)
        for row, pair in enumerate(pairs):
            counted[row, self.others(pair)] = False
        return counted


def _judged_pairs(corpus: Corpus) -> Iterator[tuple[str, str, int]]:
    judged = train_judgments(corpus.folder)
    if not judged:
        return
    places = {document: place for place, document in enumerate(corpus.ids)}
    texts = read_queries(corpus.folder, judged)
    _refuse_test_queries(corpus, texts)
    for query, documents in judged.items():
        for document in documents:
            if document in places:
                yield texts[query], corpus.texts[places[document]], places[document]


def _refuse_test_queries(corpus: Corpus, train: dict[str, str]) -> None:
    """Raise `CorpusError` where a training query has the id of a test query, or its words."""
    test = test_queries(corpus.folder)
    known = {normalised(text): query for query, text in test.items()}
    for query, text in train.items():
        if (other := query if query in test else known.get(normalised(text))) is not None:
            raise CorpusError(
                f"{corpus.folder}: training query {query!r} is the judged test query {other!r}, which must not be "
                "trained on: take it out of qrels/train.tsv"
            )


def _sentence_pairs(corpus: Corpus, rng: np.random.Generator, count: int) -> Iterator[tuple[str, str, int]]:
    for document, text in enumerate(corpus.texts):
        parts = split_sentences(text)
        if len(parts) < 2:
            continue
        others = rng.permutation(np.arange(1, len(parts)))[: count - 1]
        for place in (0, *others.tolist()):
            rest = " ".join(part for part in parts if part != parts[place])
            if len(rest.split()) >= _FEWEST_WORDS_LEFT:
                yield parts[place], rest, document


def split_sentences(text: str) -> list[str]:
    """Sentences, and pieces of what is too long to be one: some collections have no punctuation."""
    parts: list[str] = []
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        if len(words) > _MOST_WORDS:
            pieces = -(-len(words) // _WORDS_OF_A_PIECE)
            parts += [" ".join(piece) for piece in np.array_split(np.array(words, dtype=object), pieces)]
        elif len(words) >= _FEWEST_WORDS:
            parts.append(" ".join(words))
    return parts
