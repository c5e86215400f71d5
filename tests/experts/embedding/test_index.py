"""The index of documents: search, replacement, deletion, what is left after a kill."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from experts.embedding.encoder import FloatArray
from experts.embedding.index import Document, DocumentIndex
from experts.errors import ExpertConfigError

D = 8


def unit(count: int, seed: int) -> FloatArray:
    rows = np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def documents(name: str, count: int) -> list[Document]:
    return [Document(f"{name}/{i}", f"text {i}", "title") for i in range(count)]


def opened(folder: Path) -> DocumentIndex:
    return DocumentIndex(folder, dimensions=D, encoder="e")


def test_search_is_exact_and_best_first(tmp_path: Path) -> None:
    index, vectors, queries = opened(tmp_path), unit(50, 0), unit(4, 1)
    index.add(documents("a", 50), vectors)
    scores = queries @ vectors.T
    for hits, row in zip(index.search(queries, 7), scores, strict=True):
        assert [hit.document.id for hit in hits] == [f"a/{i}" for i in np.argsort(-row)[:7]]
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row)[::-1][:7], atol=1e-6)
    assert index.search(queries, 1)[0][0].document.title == "title"


def test_it_persists_and_another_process_sees_changes(tmp_path: Path) -> None:
    writer, vectors = opened(tmp_path), unit(20, 0)
    writer.add(documents("a", 10), vectors[:10])
    reader = DocumentIndex(tmp_path)
    assert reader.search(vectors[3:4], 1)[0][0].document.id == "a/3"
    writer.add(documents("b", 10), vectors[10:])
    assert reader.search(vectors[13:14], 1)[0][0].document.id == "b/3"
    writer.delete(writer.ids("a/"))
    assert all(hit.document.id.startswith("b/") for hit in reader.search(vectors[3:4], 20)[0])
    assert len(reader) == 10


def test_a_known_id_is_replaced(tmp_path: Path) -> None:
    index, vectors = opened(tmp_path), unit(3, 0)
    index.add(documents("a", 2), vectors[:2])
    index.add([Document("a/1", "new")], vectors[2:])
    assert len(index) == 2
    best = index.search(vectors[2:], 1)[0][0]
    assert (best.document.text, best.document.id) == ("new", "a/1")
    assert index.missing(["a/0", "a/7"]) == ["a/7"]


def test_adding_and_deleting_a_collection_leaves_the_others_results_as_they_were(tmp_path: Path) -> None:
    index, vectors = opened(tmp_path), unit(30, 0)
    index.add(documents("a", 20), vectors[:20])
    before = index.search(vectors[:5], 10)
    index.add(documents("b", 10), vectors[20:])
    assert index.search(vectors[:5], 10) != before
    assert index.delete([*index.ids("b/"), "b/99"]) == 10
    assert index.search(vectors[:5], 10) == before


def test_a_change_that_fails_has_not_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = opened(tmp_path), unit(20, 0)
    index.add(documents("a", 10), vectors[:10])

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="full"):
        index.add(documents("b", 10), vectors[10:])
    monkeypatch.undo()
    again = DocumentIndex(tmp_path)
    assert len(again) == 10
    assert {hit.document.id[0] for hit in again.search(vectors[:1], 20)[0]} == {"a"}
    index.add(documents("b", 10), vectors[10:])
    assert len(again) == 20


def test_readers_never_fail_while_a_writer_changes_it(tmp_path: Path) -> None:
    writer, reader, vectors = opened(tmp_path), opened(tmp_path), unit(20, 0)
    writer.add(documents("a", 10), vectors[:10])

    def write() -> None:
        for _ in range(20):
            writer.add(documents("b", 10), vectors[10:])
            writer.delete(writer.ids("b/"))

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(write)
        while not done.done():
            assert reader.search(vectors[3:4], 1)[0][0].document.id == "a/3"
        done.result()


def test_a_search_is_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that are replaced between the look at the vectors and that at the texts are found as they were."""
    reader, writer, vectors = opened(tmp_path), opened(tmp_path), unit(20, 0)
    writer.add(documents("a", 10), vectors[:10])
    read = reader._vectors

    def then_another_writes(generation: int) -> object:
        index = read(generation)
        writer.add([Document(f"a/{i}", "new") for i in range(10)], vectors[10:])
        return index

    monkeypatch.setattr(reader, "_vectors", then_another_writes)
    hits = reader.search(vectors[3:4], 10)[0]
    assert len(hits) == 10
    assert (hits[0].document, hits[0].score) == (documents("a", 10)[3], pytest.approx(1, abs=1e-6))
    monkeypatch.undo()
    assert reader.search(vectors[13:14], 1)[0][0].document == Document("a/3", "new")


def test_vectors_that_are_replaced_before_they_are_read_are_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer, vectors = opened(tmp_path), opened(tmp_path), unit(20, 0)
    writer.add(documents("a", 10), vectors[:10])
    read, replaced = reader._vectors, []

    def another_was_faster(generation: int) -> object:
        if len(replaced) < 3:
            replaced.append(generation)
            writer.add(documents("b", 10), vectors[10:])
        return read(generation)

    monkeypatch.setattr(reader, "_vectors", another_was_faster)
    assert reader.search(vectors[13:14], 1)[0][0].document.id == "b/3"
    assert replaced == [1, 2, 3]


def test_a_search_does_not_wait_for_a_change_that_is_under_way(tmp_path: Path) -> None:
    index, vectors = opened(tmp_path), unit(10, 0)
    index.add(documents("a", 10), vectors)
    with index._change() as (db, _):
        db.execute("DELETE FROM documents")
        assert index.search(vectors[3:4], 1)[0][0].document.id == "a/3"
        assert DocumentIndex(tmp_path).search(vectors[3:4], 1)[0][0].document.id == "a/3"
        assert len(index) == 10
        db.execute("ROLLBACK")
        db.execute("BEGIN IMMEDIATE")
    assert len(index) == 10


def test_many_make_it_at_once_and_lose_nothing(tmp_path: Path) -> None:
    vectors = unit(8, 0)

    def make(round_: int, i: int) -> None:
        opened(tmp_path / str(round_)).add([Document(f"{i}", "text")], vectors[i : i + 1])

    with ThreadPoolExecutor(8) as pool:
        for round_ in range(5):
            list(pool.map(lambda i, round_=round_: make(round_, i), range(8)))
            assert sorted(opened(tmp_path / str(round_)).ids()) == [str(i) for i in range(8)]
            assert opened(tmp_path / str(round_)).generation == 8


def test_old_vectors_that_cannot_be_deleted_undo_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = opened(tmp_path), unit(20, 0)
    index.add(documents("a", 10), vectors[:10])

    def held(*_: object, **__: object) -> None:
        raise PermissionError("held")

    monkeypatch.setattr(Path, "unlink", held)
    index.add(documents("b", 10), vectors[10:])
    monkeypatch.undo()
    assert len(DocumentIndex(tmp_path)) == 20
    index.delete(["a/0"])
    assert [path.name for path in tmp_path.glob("vectors-*")] == ["vectors-3.faiss"]


def test_vectors_are_on_the_disk_before_they_are_spoken_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = opened(tmp_path), unit(20, 0)
    index.add(documents("a", 10), vectors[:10])

    def broken(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="gone"):
        index.add(documents("b", 10), vectors[10:])
    monkeypatch.undo()
    assert len(DocumentIndex(tmp_path)) == 10


def test_a_damaged_index_is_said_to_be_one(tmp_path: Path) -> None:
    index, vectors = opened(tmp_path), unit(10, 0)
    index.add(documents("a", 10), vectors)
    (tmp_path / "vectors-1.faiss").write_bytes(b"nothing")
    with pytest.raises(ExpertConfigError, match=r"vectors-1\.faiss cannot be read"):
        DocumentIndex(tmp_path).search(vectors[:1])
    with pytest.raises(ExpertConfigError, match=r"vectors-1\.faiss cannot be read"):
        DocumentIndex(tmp_path).delete(["a/1"])
    index._writer.execute("DELETE FROM facts WHERE name = 'encoder'")
    with pytest.raises(ExpertConfigError, match="holds no index"):
        DocumentIndex(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "documents.sqlite").write_text("this is no database, but long enough for one to be read" * 20)
    for arguments in ({}, {"dimensions": D, "encoder": "e"}):
        with pytest.raises(ExpertConfigError, match="cannot be used: file is not a database"):
            DocumentIndex(other, **arguments)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpertConfigError, match="holds no index"):
        DocumentIndex(tmp_path / "nothing")
    index = opened(tmp_path / "index")
    with pytest.raises(ExpertConfigError, match="another encoder"):
        DocumentIndex(tmp_path / "index", dimensions=D, encoder="other")
    with pytest.raises(ExpertConfigError, match="vectors have the shape"):
        index.add(documents("a", 2), unit(3, 0))
    with pytest.raises(ExpertConfigError, match="the same id"):
        index.add([Document("a", "x"), Document("a", "y")], unit(2, 0))
    with pytest.raises(ExpertConfigError, match="queries have the shape"):
        index.search(np.zeros((1, 3), np.float32))
    assert index.search(unit(2, 0)) == [[], []]
