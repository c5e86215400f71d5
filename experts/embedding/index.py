"""Documents and their vectors on disk: search by inner product, added to and deleted from while it is served.

FAISS's flat index under ids of our own: exact, and a deletion is a deletion. The documents lie in SQLite. A change
writes the vectors into a file of a new generation and then commits documents and generation together, so that a change
that is killed has not happened, and whoever serves the index takes the new one up at the next search.

    INDEX/documents.sqlite     documents, the generation, and what vectors are of
    INDEX/vectors-N.faiss      the vectors of generation N

Vectors are those of one frozen encoder, whose fingerprint the index knows; experts with adapters on the query side of
that encoder search it as it is.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experts.embedding.encoder import FloatArray
from experts.errors import ExpertConfigError

_BUSY_TIMEOUT_S = 30.0
_BATCH = 500
_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, text TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Document:
    """What is found. `id` is the caller's own."""

    id: str
    text: str
    title: str = ""

    @property
    def whole(self) -> str:
        """What is embedded: title before text."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True, slots=True)
class Hit:
    """A document found, with its cosine to the query."""

    document: Document
    score: float


class DocumentIndex:
    """An index in `folder`, which must exist unless `dimensions` and `encoder` are given. Thread safe.

    `encoder` is a digest of all that decides a document's vector (`EncoderFiles.fingerprint`, in hex).
    Raises `ExpertConfigError` for a folder that holds no index, or one of another encoder.
    """

    def __init__(self, folder: Path, *, dimensions: int | None = None, encoder: str | None = None) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._generation = -1
        self._index: Any = None
        path = folder / "documents.sqlite"
        if dimensions is None and not path.is_file():
            raise ExpertConfigError(f"{folder} holds no index: make one with `router-service index add`")
        folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.executescript(_SCHEMA)
        facts = self._facts()
        if not facts and dimensions is not None and encoder is not None:
            self._set({"dimensions": dimensions, "encoder": encoder, "generation": 0})
        elif encoder is not None and facts["encoder"] != encoder:
            raise ExpertConfigError(f"{folder} holds vectors of another encoder (model, cut length or pooling)")
        self.dimensions = int(self._facts()["dimensions"])
        self.encoder = self._facts()["encoder"]

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM documents").fetchone()[0])

    @property
    def generation(self) -> int:
        """Counts the changes so far."""
        return int(self._facts()["generation"])

    def add(self, documents: Sequence[Document], vectors: FloatArray) -> None:
        """Add documents with their vectors, float32 [N, D]; those whose id is there already are replaced."""
        if vectors.shape != (len(documents), self.dimensions):
            raise ExpertConfigError(f"vectors have the shape {vectors.shape}, not {(len(documents), self.dimensions)}")
        if len({document.id for document in documents}) < len(documents):
            raise ExpertConfigError("two documents have the same id")
        with self._lock, self._change() as index:
            replaced = self._numbers([document.id for document in documents])
            _remove(index, replaced.values())
            self._forget(replaced.values())
            numbers = [
                self._db.execute(
                    "INSERT INTO documents (id, title, text) VALUES (?, ?, ?)",
                    (document.id, document.title, document.text),
                ).lastrowid
                for document in documents
            ]
            index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.array(numbers, np.int64))

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents by id; returns how many of them there were."""
        with self._lock, self._change() as index:
            found = self._numbers(ids)
            _remove(index, found.values())
            self._forget(found.values())
        return len(found)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` that are not in the index."""
        with self._lock:
            known = self._numbers(ids)
        return [one for one in ids if one not in known]

    def ids(self, prefix: str = "") -> list[str]:
        """The ids that begin with `prefix`, in the order of their addition."""
        with self._lock:
            rows = self._db.execute(
                "SELECT id FROM documents WHERE substr(id, 1, ?) = ? ORDER BY number", (len(prefix), prefix)
            )
            return [row[0] for row in rows]

    def search(self, queries: FloatArray, count: int = 10) -> list[list[Hit]]:
        """The `count` documents nearest to each of `queries`, float32 [B, D] of length 1, best first."""
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise ExpertConfigError(f"queries have the shape {queries.shape}, the index {self.dimensions} dimensions")
        with self._lock:
            index = self._loaded()
            if not index.ntotal:
                return [[] for _ in queries]
            scores, numbers = index.search(np.ascontiguousarray(queries, np.float32), min(count, index.ntotal))
            documents = self._documents({int(number) for row in numbers for number in row if number >= 0})
        return [
            [Hit(documents[int(n)], float(score)) for n, score in zip(*row, strict=True) if int(n) in documents]
            for row in zip(numbers, scores, strict=True)
        ]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # Inside

    def _change(self) -> _Change:
        return _Change(self)

    def _facts(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT name, value FROM facts").fetchall())

    def _set(self, facts: Mapping[str, object]) -> None:
        rows = [(name, str(value)) for name, value in facts.items()]
        self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    def _file(self, generation: int) -> Path:
        return self.folder / f"vectors-{generation}.faiss"

    def _loaded(self) -> Any:
        """The vectors of the newest generation."""
        import faiss

        for _ in range(3):
            generation = int(self._facts()["generation"])
            if generation == self._generation:
                return self._index
            if generation == 0:
                self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(self.dimensions))
                self._generation = 0
                return self._index
            try:
                index = faiss.read_index(str(self._file(generation)))
            except RuntimeError as error:
                if int(self._facts()["generation"]) != generation:
                    continue  # it was replaced while it was about to be read
                raise ExpertConfigError(f"{self._file(generation)} cannot be read: {error}") from error
            self._index, self._generation = index, generation
        return self._index

    def _numbers(self, ids: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for start in range(0, len(ids), _BATCH):
            some = list(ids[start : start + _BATCH])
            marks = ",".join("?" * len(some))
            found |= dict(self._db.execute(f"SELECT id, number FROM documents WHERE id IN ({marks})", some).fetchall())
        return found

    def _documents(self, numbers: Iterable[int]) -> dict[int, Document]:
        wanted = list(numbers)
        found: dict[int, Document] = {}
        for start in range(0, len(wanted), _BATCH):
            some = wanted[start : start + _BATCH]
            rows = self._db.execute(
                f"SELECT number, id, text, title FROM documents WHERE number IN ({','.join('?' * len(some))})", some
            )
            found |= {number: Document(*rest) for number, *rest in rows}
        return found

    def _forget(self, numbers: Iterable[int]) -> None:
        self._db.executemany("DELETE FROM documents WHERE number = ?", [(number,) for number in numbers])


class _Change:
    """A transaction over both files: the vectors as a new generation first, then the documents' commit."""

    def __init__(self, index: DocumentIndex) -> None:
        self._owner = index

    def __enter__(self) -> Any:
        import faiss

        self._owner._db.execute("BEGIN IMMEDIATE")  # one writer at a time, in whatever process
        try:
            self._vectors = faiss.clone_index(self._owner._loaded())
        except BaseException:
            self._owner._db.execute("ROLLBACK")
            raise
        return self._vectors

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._owner._db.execute("ROLLBACK")
            return
        try:
            self._commit()
        except BaseException:
            self._owner._db.execute("ROLLBACK")
            raise

    def _commit(self) -> None:
        import faiss

        owner, old = self._owner, self._owner._generation
        part = owner.folder / f"vectors-{old + 1}.part"
        faiss.write_index(self._vectors, str(part))
        part.replace(owner._file(old + 1))
        owner._set({"generation": old + 1})
        owner._db.execute("COMMIT")
        owner._index, owner._generation = self._vectors, old + 1
        owner._file(old).unlink(missing_ok=True)


def _remove(index: Any, numbers: Iterable[int]) -> None:
    gone = np.array(list(numbers), np.int64)
    if len(gone):
        index.remove_ids(gone)
