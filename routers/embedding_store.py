"""A file of embeddings keyed by content hash, shared by the processes of a machine.

SQLite in WAL mode: readers never wait, writers queue for milliseconds, and a process killed in mid-write loses its last
transaction and nothing else. It is a cache: deleting the file costs computing again.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from routers.contracts import FloatArray

_BATCH = 500
_BUSY_TIMEOUT_S = 30.0


class EmbeddingStore:
    """Vectors of `dimensions` float32 values under 32-byte keys, in the file `path`. Safe for threads and processes."""

    def __init__(self, path: Path, dimensions: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._bytes = 4 * dimensions
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")

    def get(self, keys: Sequence[bytes]) -> dict[bytes, FloatArray]:
        """The vectors of those `keys` that are stored."""
        found: dict[bytes, FloatArray] = {}
        for start in range(0, len(keys), _BATCH):
            some = list(keys[start : start + _BATCH])
            marks = ",".join("?" * len(some))
            with self._lock:
                rows = self._db.execute(f"SELECT key, vector FROM embeddings WHERE key IN ({marks})", some).fetchall()
            found.update((key, np.frombuffer(blob, np.float32)) for key, blob in rows if len(blob) == self._bytes)
        return found

    def put(self, vectors: Mapping[bytes, FloatArray]) -> None:
        """Store `vectors`; a key that is there keeps what it has."""
        rows = [(key, vector.tobytes()) for key, vector in vectors.items()]
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?)", rows)
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._db.close()
