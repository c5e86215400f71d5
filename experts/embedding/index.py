"""Documents and their vectors on disk: search by inner product, added to and deleted from while it is served.

FAISS's flat index under ids of our own: exact, and a deletion is a deletion. The documents lie in SQLite. A change
writes the vectors into a file of a new generation and then commits documents and generation together, so that a change
that is killed has not happened, and whoever serves the index takes the new one up at the next search.

    INDEX/documents.sqlite     documents, the generation, and what vectors are of
    INDEX/vectors-N.faiss      the vectors of generation N

A search reads generation, vectors and documents in one read transaction, so that all are of one moment. It does not
wait for a change that is under way, in this process or in another: readers and writers have connections of their own,
and SQLite's write-ahead log keeps for a reader what it began with. The first search after a change reads the new file
of vectors.

Vectors are those of one frozen encoder, whose fingerprint the index knows; experts with adapters on the query side of
that encoder search it as it is.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experts.embedding.encoder import FloatArray
from experts.errors import ExpertConfigError

_BUSY_TIMEOUT_S = 30.0
_BATCH = 500
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS documents (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, "
    "title TEXT NOT NULL, text TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
)


@dataclass(frozen=True, slots=True)
class Document:
    """What is found. `id` is the caller's own."""

    id: str
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Hit:
    """A document found, with its cosine to the query."""

    document: Document
    score: float


class DocumentIndex:
    """An index in `folder`, which must exist unless `dimensions` and `encoder` are given. Thread safe.

    `encoder` is a digest of all that decides a document's vector (`EncoderFiles.fingerprint`, in hex).
    Raises `ExpertConfigError` for a folder that holds no index, or one of another encoder, or one that is damaged.
    """

    def __init__(self, folder: Path, *, dimensions: int | None = None, encoder: str | None = None) -> None:
        self.folder = folder
        self._path = folder / "documents.sqlite"
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._cached: tuple[int, Any] = (-1, None)
        with self._explained():
            if dimensions is not None and encoder is not None:
                self._create(dimensions, encoder)
            elif not self._path.is_file():
                raise self._no_index()
            self._reader, self._writer = self._connect(), self._connect()
            facts = _facts(self._reader)
        try:
            self.dimensions, self.encoder, _ = int(facts["dimensions"]), facts["encoder"], int(facts["generation"])
        except (KeyError, ValueError) as error:
            raise self._no_index() from error
        if encoder not in (None, self.encoder):
            raise ExpertConfigError(f"{folder} holds vectors of another encoder (model, cut length or pooling)")

    def __len__(self) -> int:
        with self._read() as db:
            return int(db.execute("SELECT count(*) FROM documents").fetchone()[0])

    @property
    def generation(self) -> int:
        """Counts the changes so far."""
        with self._read() as db:
            return _generation(db)

    def add(self, documents: Sequence[Document], vectors: FloatArray) -> None:
        """Add documents with their vectors, float32 [N, D]; those whose id is there already are replaced."""
        if vectors.shape != (len(documents), self.dimensions):
            raise ExpertConfigError(f"vectors have the shape {vectors.shape}, not {(len(documents), self.dimensions)}")
        if len({document.id for document in documents}) < len(documents):
            raise ExpertConfigError("two documents have the same id")
        with self._change() as (db, index):
            replaced = _numbers(db, [document.id for document in documents])
            _remove(db, index, replaced.values())
            numbers = [
                db.execute(
                    "INSERT INTO documents (id, title, text) VALUES (?, ?, ?)",
                    (document.id, document.title, document.text),
                ).lastrowid
                for document in documents
            ]
            index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.array(numbers, np.int64))

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents by id; returns how many of them there were."""
        with self._change() as (db, index):
            found = _numbers(db, ids)
            _remove(db, index, found.values())
        return len(found)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` that are not in the index."""
        with self._read() as db:
            known = _numbers(db, ids)
        return [one for one in ids if one not in known]

    def ids(self, prefix: str = "") -> list[str]:
        """The ids that begin with `prefix`, in the order of their addition."""
        with self._read() as db:
            rows = db.execute(
                "SELECT id FROM documents WHERE substr(id, 1, ?) = ? ORDER BY number", (len(prefix), prefix)
            )
            return [row[0] for row in rows]

    def search(self, queries: FloatArray, count: int = 10) -> list[list[Hit]]:
        """The `count` documents nearest to each of `queries`, float32 [B, D] of length 1, best first."""
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise ExpertConfigError(f"queries have the shape {queries.shape}, the index {self.dimensions} dimensions")
        gone = -1
        while True:
            with self._read() as db:
                generation = _generation(db)
                try:
                    index = self._vectors(generation)
                except RuntimeError as error:
                    if generation == gone:
                        raise ExpertConfigError(f"{self._file(generation)} cannot be read: {error}") from error
                    gone = generation  # replaced, perhaps, since the transaction began: another sees what came after
                    continue
                try:
                    return _search(db, index, np.ascontiguousarray(queries, np.float32), count)
                except KeyError as error:
                    raise ExpertConfigError(f"{self._file(generation)} is of other documents: {error}") from error

    def close(self) -> None:
        """Close the files."""
        with self._reading, self._writing:
            self._reader.close()
            self._writer.close()

    # Inside

    def _create(self, dimensions: int, encoder: str) -> None:
        """Make the tables and facts that are not there yet, whoever else does so at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # SQLite does not wait where two switch to the write-ahead log at once
            db = self._connect()
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    db.execute(statement)
                facts = {"dimensions": dimensions, "encoder": encoder, "generation": 0}
                rows = [(name, str(value)) for name, value in facts.items()]
                db.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", rows)
                db.execute("COMMIT")
            finally:
                db.close()
        finally:
            os.close(lock)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None)

    def _no_index(self) -> ExpertConfigError:
        return ExpertConfigError(f"{self.folder} holds no index: make one with `router-service index add`")

    @contextmanager
    def _explained(self) -> Generator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.Error as error:
            raise ExpertConfigError(f"the index {self._path} cannot be used: {error}") from error

    @contextmanager
    def _read(self) -> Generator[sqlite3.Connection]:
        """A transaction that sees the index as it is at one moment."""
        with self._explained(), self._reading:
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                self._reader.execute("ROLLBACK")

    @contextmanager
    def _change(self) -> Generator[tuple[sqlite3.Connection, Any]]:
        """A transaction over both files: the vectors as a new generation first, then the documents' commit."""
        import faiss

        with self._explained(), self._writing:
            db = self._writer
            db.execute("BEGIN IMMEDIATE")  # one writer at a time, in whatever process
            try:
                old = _generation(db)
                try:
                    vectors = faiss.clone_index(self._vectors(old))
                except RuntimeError as error:
                    raise ExpertConfigError(f"{self._file(old)} cannot be read: {error}") from error
                yield db, vectors
                self._write(old + 1, vectors)
                db.execute("UPDATE facts SET value = ? WHERE name = 'generation'", (str(old + 1),))
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            self._cached = (old + 1, vectors)
            self._sweep(old + 1)

    def _write(self, generation: int, vectors: Any) -> None:
        """Write vectors into their file, so that it is on the disk as a whole before the commit that speaks of it."""
        import faiss

        part = self.folder / f"vectors-{generation}.part"
        faiss.write_index(vectors, str(part))
        _sync(part)
        part.replace(self._file(generation))
        _sync(self.folder)

    def _sweep(self, generation: int) -> None:
        """Delete the vectors of older generations. What cannot be deleted now is after the next change."""
        for path in self.folder.glob("vectors-*.faiss"):
            with suppress(OSError, ValueError):
                if int(path.stem.partition("-")[2]) < generation:  # a newer one is of whoever changes it now
                    path.unlink()

    def _file(self, generation: int) -> Path:
        return self.folder / f"vectors-{generation}.faiss"

    def _vectors(self, generation: int) -> Any:
        """The vectors of a generation. Raises FAISS's `RuntimeError` where their file cannot be read."""
        import faiss

        cached, index = self._cached
        if cached == generation:
            return index
        if generation == 0:
            index = faiss.IndexIDMap2(faiss.IndexFlatIP(self.dimensions))
        else:
            index = faiss.read_index(str(self._file(generation)))
        self._cached = (generation, index)
        return index


def _facts(db: sqlite3.Connection) -> dict[str, str]:
    return dict(db.execute("SELECT name, value FROM facts").fetchall())


def _generation(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT value FROM facts WHERE name = 'generation'").fetchone()[0])


def _search(db: sqlite3.Connection, index: Any, queries: FloatArray, count: int) -> list[list[Hit]]:
    if not index.ntotal:
        return [[] for _ in queries]
    scores, numbers = index.search(queries, min(count, index.ntotal))
    documents = _documents(db, {int(number) for row in numbers for number in row if number >= 0})
    return [
        [Hit(documents[int(n)], float(score)) for n, score in zip(*row, strict=True) if n >= 0]
        for row in zip(numbers, scores, strict=True)
    ]


def _numbers(db: sqlite3.Connection, ids: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for start in range(0, len(ids), _BATCH):
        some = list(ids[start : start + _BATCH])
        marks = ",".join("?" * len(some))
        found |= dict(db.execute(f"SELECT id, number FROM documents WHERE id IN ({marks})", some).fetchall())
    return found


def _documents(db: sqlite3.Connection, numbers: Iterable[int]) -> dict[int, Document]:
    wanted = list(numbers)
    found: dict[int, Document] = {}
    for start in range(0, len(wanted), _BATCH):
        some = wanted[start : start + _BATCH]
        rows = db.execute(
            f"SELECT number, id, text, title FROM documents WHERE number IN ({','.join('?' * len(some))})", some
        )
        found |= {number: Document(*rest) for number, *rest in rows}
    return found


def _remove(db: sqlite3.Connection, index: Any, numbers: Iterable[int]) -> None:
    """Take documents out of both."""
    gone = list(numbers)
    if gone:
        db.executemany("DELETE FROM documents WHERE number = ?", [(number,) for number in gone])
        index.remove_ids(np.array(gone, np.int64))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
