"""Observation tables: what experts did with queries, read, checked and written.

A table is a folder with two files. `experts.json` maps each expert's name to its card's fields (`description`,
`input_price` and `output_price` in USD per million tokens; fields that are no card's, such as `size`, are passed over).
The observations are in one of

- `observations.jsonl` or `observations.jsonl.gz`: one JSON object per query,
  `{"id", "task", "query", "split": "train" | "test", "experts": {name: {"quality", "cost_usd", "input_tokens",
  "output_tokens", "latency_s", "observed_at", "confidence"}}}`, of which `task` and all after `cost_usd` may be left
  out;
- `observations.parquet`: the same as columns `id`, `task`, `query`, `split` (strings) and `experts`, a list of structs
  with `expert` (string) and the fields above (doubles; tokens are 64-bit integers), null where not measured.

A query may hold any subset of the experts, but at least one. Quality is in 0..1, cost in USD, latency in seconds,
`observed_at` in seconds since 1970; `confidence`, in 0..1, is the geometric mean probability of the answer's tokens.
Rows are streamed: a table larger than memory can be read row by row.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

import numpy as np
from pydantic import ValidationError

from experts.cards import ExpertCard
from routers.contracts import FloatArray, Observation, Observations
from routers.errors import ObservationError

Split = Literal["train", "test"]
Format = Literal["jsonl", "jsonl.gz", "parquet"]

_SPLITS = get_args(Split)
_ROW_FIELDS = {"id", "task", "query", "split", "experts"}
_TOKENS = ("input_tokens", "output_tokens")
_MEASURED = ("quality", "cost_usd", *_TOKENS, "latency_s", "observed_at", "confidence")
_SHARES = ("quality", "confidence")
_REQUIRED = {"quality", "cost_usd"}
_ROWS_PER_GROUP = 1024
_LARGEST = 1e30  # tables hold float32, in which sums of such numbers are finite still


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedQuery:
    """One row of a table: a query and what each expert that was asked did with it."""

    id: str
    query: str
    split: Split
    experts: Sequence[Observation]
    task: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A whole table in memory: both splits over the same experts."""

    cards: Sequence[ExpertCard]
    train: Observations
    test: Observations


def load_table(folder: Path) -> Table:
    """Read and check a whole table. Raises `ObservationError`, which names file, line and field."""
    cards = read_cards(folder)
    columns = {split: _Columns(cards) for split in _SPLITS}
    for row in read_rows(folder, cards):
        columns[row.split].add(row)
    return Table(cards=cards, train=columns["train"].table(), test=columns["test"].table())


def read_cards(folder: Path) -> list[ExpertCard]:
    """The cards of `experts.json`, in its order. Raises `ObservationError`."""
    path = folder / "experts.json"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ObservationError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ObservationError(f"{path}: must be an object that maps at least one expert's name to its card")
    return [_card(path, name, fields) for name, fields in found.items()]


def _card(path: Path, name: str, fields: object) -> ExpertCard:
    if not isinstance(fields, dict):
        raise ObservationError(f"{path}: expert {name!r} must be an object, not {fields!r}")
    known = {key: value for key, value in fields.items() if key in ExpertCard.model_fields}
    try:
        return ExpertCard.model_validate({**known, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ObservationError(f"{path}: expert {name!r}, field {field!r}: {first['msg']}") from error


def read_rows(folder: Path, cards: Sequence[ExpertCard] | None = None) -> Iterator[ObservedQuery]:
    """Stream the rows of a table, each checked. Raises `ObservationError`, which names file, line and field.

    Ids are checked across rows: they, with their lines and splits, are all that stays in memory.
    """
    path = observations_file(folder)
    names = {card.name for card in (read_cards(folder) if cards is None else cards)}
    seen: dict[str, tuple[int, Split]] = {}
    for line, fields in _raw_rows(path):
        row = _Checker(path, line, names).row(fields)
        if row.id in seen:
            first, split = seen[row.id]
            how = "twice" if split == row.split else "in both splits"
            raise ObservationError(f"{path}:{line}: field 'id': {row.id!r} stands {how}, first in line {first}")
        seen[row.id] = line, row.split
        yield row


def observations_file(folder: Path) -> Path:
    """The one file of observations in `folder`. Raises `ObservationError` where there is none, or more than one."""
    found = [path for suffix in get_args(Format) if (path := folder / f"observations.{suffix}").is_file()]
    if len(found) != 1:
        names = ", ".join(f"observations.{suffix}" for suffix in get_args(Format))
        raise ObservationError(f"{folder}: needs exactly one of {names}, has {[path.name for path in found] or 'none'}")
    return found[0]


def _raw_rows(path: Path) -> Iterator[tuple[int, object]]:
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield line, _json(path, line, text)
    except (OSError, EOFError, zlib.error) as error:
        raise ObservationError(f"{path}:{line + 1}: cannot be read: {error}") from error


def _json(path: Path, line: int, text: bytes) -> object:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ObservationError(f"{path}:{line}: is not one JSON object: {error}") from error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object's fields. Raises `ValueError` where one stands twice: the last would win unseen."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = next(name for name, _ in pairs if [key for key, _ in pairs].count(name) > 1)
        raise ValueError(f"field {twice!r} stands twice")
    return fields


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(_ROWS_PER_GROUP) for row in batch.to_pylist())
            for line, row in enumerate(rows, start=1):
                yield line, _without_nulls(path, line, row)
    except (OSError, pa.ArrowException) as error:
        raise ObservationError(f"{path}: cannot be read as Parquet: {error}") from error


def _without_nulls(path: Path, line: int, row: dict[str, Any]) -> dict[str, Any]:
    """A Parquet row in the shape of a JSON row."""
    given = {key: value for key, value in row.items() if value is not None}
    pairs = given.get("experts")
    if not isinstance(pairs, list):
        return given
    if not all(isinstance(pair, dict) and isinstance(pair.get("expert"), str) for pair in pairs):
        raise ObservationError(f"{path}:{line}: field 'experts': must be a list of structs, each with its 'expert'")
    try:
        given["experts"] = _once([(pair["expert"], _measured_fields(pair)) for pair in pairs])
    except ValueError as error:
        raise ObservationError(f"{path}:{line}: field 'experts': {error}") from error
    return given


def _measured_fields(pair: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in pair.items() if key != "expert" and value is not None}


@dataclass(frozen=True, slots=True)
class _Checker:
    """Turns one raw row into an `ObservedQuery`, or says which field is wrong."""

    path: Path
    line: int
    experts: set[str]

    def row(self, raw: object) -> ObservedQuery:
        if not isinstance(raw, dict):
            raise ObservationError(f"{self.path}:{self.line}: must be an object, not {type(raw).__name__}")
        self._only(raw, _ROW_FIELDS, "")
        row_id, split, experts = self._text(raw, "id"), raw.get("split"), raw.get("experts")
        if split not in _SPLITS:
            self._wrong("split", f"must be 'train' or 'test', not {split!r}")
        if not row_id:
            self._wrong("id", "must not be empty")
        if not isinstance(experts, dict) or not experts:
            self._wrong("experts", "must be an object that holds at least one expert")
        return ObservedQuery(
            id=row_id,
            task=self._text(raw, "task", ""),
            query=self._text(raw, "query"),
            split=cast("Split", split),
            experts=[self._pair(row_id, name, fields) for name, fields in experts.items()],
        )

    def _pair(self, row_id: str, name: str, fields: object) -> Observation:
        at = f"experts.{name}"
        if name not in self.experts:
            self._wrong(at, "is no expert of experts.json")
        if not isinstance(fields, dict):
            self._wrong(at, f"must be an object, not {fields!r}")
        self._only(fields, set(_MEASURED), f"{at}.")
        if missing := _REQUIRED - fields.keys():
            self._wrong(f"{at}.{min(missing)}", "is missing")
        given = {key: value for key, value in fields.items() if value is not None or key in _REQUIRED}
        measured = {key: self._number(f"{at}.{key}", key, value) for key, value in given.items()}
        for key in _SHARES:
            if measured.get(key, 0) > 1:
                self._wrong(f"{at}.{key}", f"must be a number in 0..1, not {fields[key]!r}")
        return Observation(query_id=row_id, expert=name, **measured)

    def _number(self, at: str, key: str, value: object) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            self._wrong(at, f"must be a finite number, not {value!r}")
        if value > _LARGEST:
            self._wrong(at, f"must be below {_LARGEST:.0e}")
        if value < 0:
            self._wrong(at, f"must not be negative, as {value!r} is")
        if key not in _TOKENS:
            return float(value)
        if value != int(value):
            self._wrong(at, f"must be a whole number, not {value!r}")
        return int(value)

    def _text(self, raw: Mapping[str, object], key: str, default: str | None = None) -> str:
        value = raw.get(key, default)
        if not isinstance(value, str):
            self._wrong(key, "is missing" if key not in raw else f"must be a string, not {value!r}")
        return value

    def _only(self, raw: Mapping[str, object], allowed: set[str], prefix: str) -> None:
        if unknown := raw.keys() - allowed:
            self._wrong(f"{prefix}{min(unknown)}", f"is unknown; known are {', '.join(sorted(allowed))}")

    def _wrong(self, field: str, what: str) -> NoReturn:
        raise ObservationError(f"{self.path}:{self.line}: field {field!r}: {what}")


class _Columns:
    """Collects rows into the arrays of `Observations`."""

    _ARRAYS = ("quality", "cost_usd", *_TOKENS, "latency_s", "confidence")

    def __init__(self, cards: Sequence[ExpertCard]) -> None:
        self._cards = cards
        self._place = {card.name: place for place, card in enumerate(cards)}
        self._head: list[tuple[str, str, str]] = []
        self._values: list[FloatArray] = []

    def add(self, row: ObservedQuery) -> None:
        values = np.full((len(self._ARRAYS), len(self._cards)), np.nan, np.float32)
        for pair in row.experts:
            measured = [getattr(pair, name) for name in self._ARRAYS]
            values[:, self._place[pair.expert]] = [math.nan if value is None else value for value in measured]
        self._head.append((row.id, row.query, row.task))
        self._values.append(values)

    def table(self) -> Observations:
        shape = (0, len(self._ARRAYS), len(self._cards))
        values = np.stack(self._values) if self._values else np.zeros(shape, np.float32)
        ids, texts, tasks = zip(*self._head, strict=True) if self._head else ((), (), ())
        arrays = {name: np.ascontiguousarray(values[:, place]) for place, name in enumerate(self._ARRAYS)}
        told = arrays.pop("confidence")
        confidence = told if np.isfinite(told).any() else None
        return Observations(ids=ids, texts=texts, tasks=tasks, cards=self._cards, confidence=confidence, **arrays)


def write_table(
    folder: Path, cards: Sequence[ExpertCard], rows: Iterable[ObservedQuery], *, format: Format = "jsonl.gz"
) -> None:
    """Write a table, streaming `rows`. An older table in `folder` is replaced, once the new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"observations.{format}"
    part = target.with_name(target.name + ".part")
    if format == "parquet":
        _write_parquet(part, rows)
    else:
        _write_json_lines(part, rows, compress=format == "jsonl.gz")
    _sync(part)
    write_cards(folder, cards)
    part.replace(target)
    for suffix in get_args(Format):
        if suffix != format:
            (folder / f"observations.{suffix}").unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_cards(folder: Path, cards: Sequence[ExpertCard]) -> None:
    """Write `experts.json`."""
    fields = {card.name: card.model_dump(mode="json", exclude={"name"}, exclude_defaults=True) for card in cards}
    part = folder / "experts.json.part"
    part.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(part)
    part.replace(folder / "experts.json")


def row_to_json(row: ObservedQuery) -> str:
    """One line of `observations.jsonl`, without its end. What was not measured is left out."""
    experts = {pair.expert: _measured(pair) for pair in row.experts}
    fields = {"id": row.id, "task": row.task, "query": row.query, "split": row.split, "experts": experts}
    return json.dumps(fields, ensure_ascii=False, allow_nan=False)


def _measured(pair: Observation) -> dict[str, float]:
    return {name: value for name in _MEASURED if (value := getattr(pair, name)) is not None}


def _write_json_lines(path: Path, rows: Iterable[ObservedQuery], *, compress: bool) -> None:
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if compress else raw as file:
        file.writelines(row_to_json(row).encode() + b"\n" for row in rows)


def _write_parquet(path: Path, rows: Iterable[ObservedQuery]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pair = pa.struct([("expert", pa.string())] + [(name, _parquet_type(name)) for name in _MEASURED])
    strings = [(name, pa.string()) for name in ("id", "task", "query", "split")]
    schema = pa.schema([*strings, ("experts", pa.list_(pair))])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in _groups(rows):
            writer.write_batch(pa.RecordBatch.from_pylist([_parquet_row(row) for row in group], schema=schema))


def _parquet_type(name: str) -> Any:
    import pyarrow as pa

    return pa.int64() if name in _TOKENS else pa.float64()


def _parquet_row(row: ObservedQuery) -> dict[str, Any]:
    pairs = [{"expert": pair.expert, **_measured(pair)} for pair in row.experts]
    return {"id": row.id, "task": row.task, "query": row.query, "split": row.split, "experts": pairs}


def _groups(rows: Iterable[ObservedQuery]) -> Iterator[list[ObservedQuery]]:
    group: list[ObservedQuery] = []
    for row in rows:
        group.append(row)
        if len(group) == _ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group
