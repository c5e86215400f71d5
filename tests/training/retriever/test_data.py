"""Collections, pairs and measures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.retriever.corpora import save_corpus, save_judged
from training.errors import CorpusError
from training.retriever.corpus import held_out_judgments, read_corpus, read_queries, sha256_of, train_judgments
from training.retriever.fit import AdapterConfig, contrastive_loss
from training.retriever.measures import BM25, ndcg, own_ndcg, recall, terms, top
from training.retriever.pairs import Pair, Pool, pairs_of, split_sentences


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
    corpus = read_corpus(save_judged(tmp_path / "air", {f"t{i}": (f"query {i}", [i]) for i in range(10)}))
    pairs = pairs_of(corpus)
    found = {(pair.query, pair.text) for pair in (*pairs.train, *pairs.held_out)}
    assert found == {(f"query {i}", corpus.texts[i]) for i in range(10)}


@pytest.mark.parametrize(
    ("query", "text", "complaint"),
    [
        ("q", "a query of its own", "training query 'q' is the judged test query 'q'"),
        ("t99", "The  Judged, query!", "training query 't99' is the judged test query 'q'"),
        ("t99", "only judged not relevant", "training query 't99' is the judged test query 'none'"),
    ],
)
def test_a_training_query_that_is_a_test_query_is_refused(
    tmp_path: Path, query: str, text: str, complaint: str
) -> None:
    folder = save_judged(tmp_path / "air", {"t1": ("query 1", [1]), query: (text, [2])})
    with (folder / "queries.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "none", "text": "only judged not relevant"}) + "\n")
    with (folder / "qrels.tsv").open("a") as file:
        file.write("none\t3\t0\n")
    with pytest.raises(CorpusError, match=complaint):
        pairs_of(read_corpus(folder))


def test_no_judged_query_is_trained_on_and_held_out(tmp_path: Path) -> None:
    """Whatever its documents: four each, which neighbours share, and every query twice under another id."""
    queries = {f"t{i}": (f"query {i % 12}", [i % 12 + k for k in range(4)]) for i in range(24)}
    pairs = pairs_of(read_corpus(save_judged(tmp_path / "air", queries)))
    held_out = {pair.query for pair in pairs.held_out}
    assert held_out
    assert held_out.isdisjoint(pair.query for pair in pairs.train)
    assert len(pairs.train) + len(pairs.held_out) == 24 * 4
    assert all(pair.relevant == set(range(i := int(pair.query[6:]), i + 4)) for pair in pairs.train)


def test_a_sentence_that_is_in_several_documents_is_on_one_side(tmp_path: Path) -> None:
    folder = save_corpus(tmp_path / "air", documents=0)
    rows = [{"_id": str(i), "text": f"Always the same beginning. Then w{i} x{i} y{i} z{i} more."} for i in range(30)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = pairs_of(read_corpus(folder))
    assert {pair.query for pair in pairs.train}.isdisjoint(pair.query for pair in pairs.held_out)
    same = [pair for pair in pairs.held_out if pair.query == "Always the same beginning."]
    assert all(pair.relevant == set(range(30)) for pair in same)


def pair(query: str, text: str, document: int, *relevant: int) -> Pair:
    return Pair(query, text, document, frozenset(relevant))


def test_a_pool_has_each_text_once_and_counts_no_other_answer() -> None:
    pool = Pool([pair("a", "A", 0, 0, 1), pair("a", "B", 1, 0, 1), pair("b", "A", 0, 0), pair("c", "C", 2, 2, 7)])
    assert pool.texts == ["A", "B", "C"]
    assert pool.own.tolist() == [0, 1, 0, 2]
    assert pool.counted([0, 1, 2, 3]).tolist() == [
        [True, False, True],
        [False, True, True],
        [True, True, True],
        [True, True, True],
    ]


@pytest.mark.parametrize("negatives", ["batch", "domain"])
def test_documents_judged_for_a_query_are_no_negatives(negatives: str) -> None:
    """What it is to find beside its own text takes no part in a query's loss, wherever the vector of it lies."""
    pool = Pool([pair("a", "A", 0, 0, 1), pair("a", "B", 1, 0, 1), pair("c", "C", 2, 2), pair("d", "D", 3, 3)])
    config = AdapterConfig.model_validate({"negatives": negatives, "temperature": 1.0})
    queries = torch.nn.functional.normalize(torch.randn(2, 4, generator=torch.manual_seed(0)), dim=-1)

    def loss(batch: list[int], *, moved: int | None = None) -> float:
        texts = torch.eye(4)
        if moved is not None:
            texts[moved] *= -1
        return float(contrastive_loss(queries[: len(batch)], texts, pool, batch, config))

    assert loss([0, 2]) != loss([0, 2], moved=2)
    assert (loss([0, 2]) != loss([0, 2], moved=3)) == (negatives == "domain")
    if negatives == "batch":
        assert loss([0, 1]) == 0  # either text answers both
    else:
        assert loss([0]) == loss([0], moved=1) > 0


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
    own, counted = np.array([0, 1]), np.ones((2, 3), bool)
    assert own_ndcg(pool[[1, 1]], pool, own, counted) == pytest.approx([1 / math.log2(3), 1])
    counted[0, 1] = False  # what is before its own text is an answer too
    assert own_ndcg(pool[[1, 1]], pool, own, counted) == [1, 1]
    assert top(np.array([[1, 3, 3, 2]], np.float32), 3).tolist() == [[1, 2, 3]]


def test_bm25_is_okapis() -> None:
    texts = ["flow of flows", "the wing", "wing flow"]
    assert terms("The flows of Glass") == ["flow", "glass"]
    scores = BM25(texts).scores("flow")
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    length = lambda n: 1.2 * (1 - 0.75 + 0.75 * n / (5 / 3))  # noqa: E731
    expected = [idf * 2 * 2.2 / (2 + length(2)), 0, idf * 2.2 / (1 + length(2))]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
