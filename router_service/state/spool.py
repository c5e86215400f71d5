"""The spool: entries that Redis has not taken yet, in an append-only file that is on disk before `append` returns.

One file for each writer, locked while its writer lives. A file whose lock is free belongs to a writer that has died:
another may send its entries in the dead one's name (`orphans`), which the dead one's mark in Redis makes exact.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson


@dataclass(frozen=True, slots=True)
class Charge:
    """A change of one counter once an entry is in Redis: used minus reserved."""

    key: str
    kind: str
    change: float
    ttl_s: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream. `number` counts its writer's entries from 1, without a gap."""

    number: int
    stream: str
    payload: bytes
    charges: tuple[Charge, ...] = ()

    def line(self) -> bytes:
        """The entry as a line of the spool."""
        charges = [[c.key, c.kind, c.change, c.ttl_s] for c in self.charges]
        return orjson.dumps([self.number, self.stream, self.payload.decode(), charges]) + b"\n"


class Spool:
    """One writer's file. Not thread safe: the writer uses it from one task. Raises `OSError` where the disk does."""

    def __init__(self, folder: Path, writer: str) -> None:
        self._folder = folder
        self.path = folder / f"{writer}.jsonl"
        self._file: int | None = None
        self.depth = 0
        """Entries in the file."""

    def append(self, entries: Sequence[Entry]) -> None:
        """Write and sync `entries`: when this returns, they survive a crash of the machine. All or none."""
        if self._file is None:
            self._file = self._create()
        size = os.lseek(self._file, 0, os.SEEK_END)
        try:
            _write(self._file, b"".join(entry.line() for entry in entries))
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise
        self.depth += len(entries)

    def read(self) -> list[Entry]:
        """All entries, in order."""
        return read_entries(self.path) if self.depth else []

    def clear(self) -> None:
        """Forget all entries: Redis has them."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
        self.depth = 0

    def close(self) -> None:
        """Give the lock back; an empty file is removed."""
        if self._file is None:
            return
        if not self.depth:
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def _create(self) -> int:
        """A new locked file. It gets its name only once it is locked, so that nobody takes it for a dead writer's."""
        self._folder.mkdir(parents=True, exist_ok=True)
        unnamed = self.path.with_suffix(".new")
        file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        unnamed.rename(self.path)
        _sync_folder(self._folder)
        return file


def orphans(folder: Path) -> Generator[tuple[str, list[Entry]]]:
    """Writer and entries of each dead writer's file, which is removed once the caller asks for the next one."""
    for path in sorted(folder.glob("*.jsonl")):
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        try:
            yield path.stem, read_entries(path)
            path.unlink(missing_ok=True)
        finally:
            os.close(file)


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file. A last line that was cut short was never acknowledged and is left out."""
    whole, newline, _ = path.read_bytes().rpartition(b"\n")
    return [_parse(orjson.loads(line)) for line in whole.split(b"\n")] if newline else []


def _parse(values: list[Any]) -> Entry:
    number, stream, payload, charges = values
    return Entry(number, stream, payload.encode(), tuple(Charge(*charge) for charge in charges))


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
