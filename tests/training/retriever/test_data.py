"""Collections, pairs and measures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.training.retriever.corpora import save_corpus
from training.errors import CorpusError
from training.retriever.corpus import held_out_judgments, read_corpus, read_queries, sha256_of, train_judgments
from training.retriever.measures import BM25, ndcg, own_ndcg, recall, terms, top
from training.retriever.pairs import pairs_of, split_sentences


def test_a_collection_is_read(tmp_path: Path) -> None:
    folder = save_corpus(tmp_path / "air")
    corpus = read_corpus(folder)
    assert (corpus.name, len(corpus.ids), len(corpus.texts)) == ("air", 24, 24)
    judged = held_out_judgments(folder)
    assert judged == {"q": {"3": 1}}
    assert read_queries(folder, judged) == {"q": "the judged query"}
    assert train_judgments(folder) == {}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("corpus.jsonl", '{"_id": 1, "text": "x"}\n', r"corpus\.jsonl:1: a document has the strings _id and text"),
        ("corpus.jsonl", "[]\n", r"corpus\.jsonl:1: a line holds a JSON object, not list"),
        ("corpus.jsonl", "{", "cannot be read as JSON lines"),
        ("corpus.jsonl", "", "has no documents"),
        ("corpus.jsonl", '{"_id": "1", "text": "x"}\n' * 2, "the same _id"),
    ],
)
def test_a_malformed_collection_is_refused(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    folder = save_corpus(tmp_path / "air")
    (folder / name).write_text(text)
    with pytest.raises(CorpusError, match=complaint):
        read_corpus(folder)


def test_malformed_judgments_are_refused(tmp_path: Path) -> None:
    folder = save_corpus(tmp_path / "air")
    (folder / "qrels.tsv").write_text("head\nq 3 1\n")
    with pytest.raises(CorpusError, match="query-id<tab>corpus-id<tab>score"):
        held_out_judgments(folder)
    with pytest.raises(CorpusError, match="'lost' is judged, but has no text"):
        read_queries(folder, {"lost": {"3": 1}})


def test_pairs_are_sentences_and_the_rest_of_their_document(tmp_path: Path) -> None:
    corpus = read_corpus(save_corpus(tmp_path / "air"))
    pairs = pairs_of(corpus)
    held_out = {pair.document for pair in pairs.held_out}
    assert held_out
    assert held_out.isdisjoint(pair.document for pair in pairs.train)
    for pair in (*pairs.train, *pairs.held_out):
        whole = split_sentences(corpus.texts[pair.document])
        assert pair.query in whole
        assert pair.text == " ".join(part for part in whole if part != pair.query)
    assert pairs_of(corpus, seed=1) != pairs_of(corpus) == pairs


def test_the_judged_test_queries_are_never_trained_on(tmp_path: Path) -> None:
    """Neither pairs nor what decides an adapter change when they change."""
    folder = save_corpus(tmp_path / "air")
    pairs, digest = pairs_of(read_corpus(folder)), sha256_of(folder)
    (folder / "queries.jsonl").write_text("this is not even JSON")
    (folder / "qrels.tsv").unlink()
    assert pairs_of(read_corpus(folder)) == pairs
    assert sha256_of(folder) == digest


def test_judged_training_queries_are_taken_where_there_are_any(tmp_path: Path) -> None:
    folder = save_corpus(tmp_path / "air")
    (folder / "qrels").mkdir()
    lines = "".join(f"t{i}\t{i}\t1\n" for i in range(10))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    rows = [{"_id": f"t{i}", "text": f"query {i}"} for i in range(10)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = read_corpus(folder)
    pairs = pairs_of(corpus)
    found = {(pair.query, pair.text) for pair in (*pairs.train, *pairs.held_out)}
    assert found == {(f"query {i}", corpus.texts[i]) for i in range(10)}


def test_sentences_without_punctuation_are_cut_to_pieces() -> None:
    words = [f"w{i}" for i in range(100)]
    parts = split_sentences(" ".join(words))
    assert " ".join(parts) == " ".join(words)
    assert {len(part.split()) for part in parts} <= {14, 15, 16}
    assert split_sentences("One two three. Four. Five six seven?") == ["One two three.", "Five six seven?"]


def test_measures_are_those_of_the_books() -> None:
    grades = {"a": 1, "b": 2}
    best = 2 + 1 / math.log2(3)
    assert ndcg(["b", "a", "x"], grades) == pytest.approx(1)
    assert ndcg(["x", "a", "b"], grades) == pytest.approx((1 / math.log2(3) + 2 / math.log2(4)) / best)
    assert ndcg(["x"] * 10 + ["b"], grades) == 0
    assert recall(["a", "x"], grades) == 0.5
    pool = np.eye(3, dtype=np.float32)
    assert own_ndcg(pool[[1, 1]], pool) == pytest.approx([1 / math.log2(3), 1])
    assert top(np.array([[1, 3, 3, 2]], np.float32), 3).tolist() == [[1, 2, 3]]


def test_bm25_is_okapis() -> None:
    texts = ["flow of flows", "the wing", "wing flow"]
    assert terms("The flows of Glass") == ["flow", "glass"]
    scores = BM25(texts).scores("flow")
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    length = lambda n: 1.2 * (1 - 0.75 + 0.75 * n / (5 / 3))  # noqa: E731
    expected = [idf * 2 * 2.2 / (2 + length(2)), 0, idf * 2.2 / (1 + length(2))]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
