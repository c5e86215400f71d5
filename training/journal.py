"""The journal of a collection: every paid call, written down before it is made and again when it has ended.

An append-only file of JSON lines, each fsynced before anything else happens, so that a run that is killed loses no
answer it has paid for and forgets no money that it may have spent:

    {"call": 7, "key": "9f..", "expert": "gpt", "prompt": "q-3", "reserved_usd": 0.004}
    {"call": 7, "cost_usd": 0.0011, "reply": {"text": "42", "input_tokens": 31, ...}}      or "error": "timed out"

A call is known by what was asked of whom (`key`), so asking again, also with other graders, costs nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from training.errors import CollectError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an expert answered. Latency is seconds from sending to the last byte, `at` seconds since the epoch.

    `confidence` is the geometric mean probability of its tokens, where it told them.
    """

    text: str
    input_tokens: int
    output_tokens: int
    latency_s: float
    cost_usd: float
    at: float
    confidence: float | None = None


def call_key(expert: str, messages: Sequence[Mapping[str, str]], max_tokens: int, temperature: float) -> str:
    """Names a call by its content."""
    asked = json.dumps([expert, list(messages), max_tokens, temperature], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()


class Journal:
    """A context manager over the file: replies by key, and `spent_usd`, which counts unended calls at their bound."""

    def __init__(self, path: Path) -> None:
        self.replies: dict[str, Reply] = {}
        self._path = path
        self._open_calls: dict[int, tuple[str, float]] = {}
        self._ended_usd = 0.0
        self._next_call = 0
        self._file = -1

    @property
    def spent_usd(self) -> float:
        """The most that all calls so far can have cost."""
        return self._ended_usd + sum(usd for _, usd in self._open_calls.values())

    def begin(self, key: str, expert: str, prompt: str, reserved_usd: float) -> int:
        """Write down that a call is about to be made, which may cost up to `reserved_usd`; returns its number."""
        call = self._next_call
        self._append({"call": call, "key": key, "expert": expert, "prompt": prompt, "reserved_usd": reserved_usd})
        return call

    def end(self, call: int, reply: Reply) -> None:
        """Write down what came of a call."""
        self._append({"call": call, "cost_usd": reply.cost_usd, "reply": asdict(reply)})

    def fail(self, call: int, error: str, cost_usd: float) -> None:
        """Write down that a call failed, and the most that it can have cost all the same."""
        self._append({"call": call, "cost_usd": cost_usd, "error": error})

    def _append(self, entry: dict[str, Any]) -> None:
        # On the event loop, on purpose: no cancellation can come between a call and its line.
        line = json.dumps(entry).encode() + b"\n"  # in ASCII: a reply may hold half a surrogate pair
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self._path}: the disk took a part of a line only")
        os.fsync(self._file)
        self._apply(entry)

    def _apply(self, entry: dict[str, Any]) -> None:
        call = entry["call"]
        if "reserved_usd" in entry:
            self._open_calls[call] = (entry["key"], entry["reserved_usd"])
            self._next_call = call + 1
            return
        key, _ = self._open_calls.pop(call)
        self._ended_usd += entry["cost_usd"]
        if "reply" in entry:
            self.replies[key] = Reply(**entry["reply"])

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise CollectError(f"another collection is writing to {self._path}") from error
        self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def _read(self) -> None:
        """Replay the file. A last line without its end was being written when the run was killed: it is cut off."""
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise CollectError(f"{self._path}:{number}: not a line of a collection's journal") from error
