"""What an adapter is trained on: a query and a text that answers it.

From judged training queries where a corpus has them. Where it has none, from its documents alone: a sentence stands for
a query, the rest of its document for what is to be found (the inverse cloze task, arXiv 1906.00300). A document's first
sentence, often its title, is always taken, others by lot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from training.retriever.corpus import Corpus, read_queries, train_judgments

HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 120
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")
_FEWEST_WORDS, _MOST_WORDS, _WORDS_OF_A_PIECE, _FEWEST_WORDS_LEFT = 3, 40, 16, 5


@dataclass(frozen=True, slots=True)
class Pair:
    """`query` is answered by `text`, which is (a part of) the document at `document` in its corpus."""

    query: str
    text: str
    document: int


@dataclass(frozen=True, slots=True)
class Pairs:
    """A domain's pairs. No document of `held_out` is in `train`."""

    train: Sequence[Pair]
    held_out: Sequence[Pair]


def pairs_of(corpus: Corpus, *, seed: int = 0, most: int = 6000, sentences: int = 2) -> Pairs:
    """At most `most` pairs, held-out ones included; `sentences` a document where there are no judged queries."""
    rng = np.random.default_rng(seed)
    found = list(_judged_pairs(corpus)) or list(_sentence_pairs(corpus, rng, sentences))
    order = rng.permutation(len(found))[:most]
    chosen = [found[i] for i in order]
    documents = list(dict.fromkeys(pair.document for pair in chosen))
    held_out = set(documents[: max(1, min(MOST_HELD_OUT, round(HELD_OUT_SHARE * len(documents))))])
    return Pairs(
        train=[pair for pair in chosen if pair.document not in held_out],
        held_out=[pair for pair in chosen if pair.document in held_out],
    )


def _judged_pairs(corpus: Corpus) -> Iterator[Pair]:
    judged = train_judgments(corpus.folder)
    if not judged:
        return
    places = {document: place for place, document in enumerate(corpus.ids)}
    texts = read_queries(corpus.folder, judged)
    for query, documents in judged.items():
        for document in documents:
            if document in places:
                yield Pair(texts[query], corpus.texts[places[document]], places[document])


def _sentence_pairs(corpus: Corpus, rng: np.random.Generator, count: int) -> Iterator[Pair]:
    for document, text in enumerate(corpus.texts):
        parts = split_sentences(text)
        if len(parts) < 2:
            continue
        others = rng.permutation(np.arange(1, len(parts)))[: count - 1]
        for place in (0, *others.tolist()):
            rest = " ".join(part for part in parts if part != parts[place])
            if len(rest.split()) >= _FEWEST_WORDS_LEFT:
                yield Pair(parts[place], rest, document)


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
