"""Observation tables: what is written is read back, and what is wrong is refused by file, line and field."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from experts.cards import ExpertCard
from routers.contracts import Observation
from routers.errors import ObservationError
from training.observations import Format, ObservedQuery, load_table, read_cards, read_rows, write_table

CARDS = [
    ExpertCard(name="small", description="fast", input_price=0.1, output_price=0.2, tags=frozenset({"open"})),
    ExpertCard(name="large@host", input_price=3, output_price=15),
]


def pair(expert: str, **fields: Any) -> Observation:
    return Observation(**{"query_id": "a", "expert": expert, "quality": 0.5, "cost_usd": 1e-4, **fields})


ROWS = [
    ObservedQuery(id="a", task="sums", query="1 + 1?\nÄ", split="train", experts=[pair("small", output_tokens=7)]),
    ObservedQuery(
        id="b",
        query="2 + 2?",
        split="test",
        experts=[pair("large@host", query_id="b", latency_s=0.25, observed_at=1.5e9), pair("small", query_id="b")],
    ),
]


def lines(folder: Path, *rows: object) -> Path:
    """A table of raw lines over the experts `a` and `b`."""
    (folder / "experts.json").write_text(json.dumps({"a": {"input_price": 1}, "b": {"size": "7B"}}))
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "observations.jsonl").write_text(text)
    return folder


def row(**fields: Any) -> dict[str, Any]:
    good = {"id": "1", "task": "t", "query": "q", "split": "train", "experts": {"a": {"quality": 1, "cost_usd": 0.1}}}
    return {**good, **fields}


def with_pair(**fields: Any) -> dict[str, Any]:
    return row(experts={"a": {"quality": 1, "cost_usd": 0.1, **fields}})


@pytest.mark.parametrize("kind", get_args(Format))
def test_what_is_written_is_read_back(tmp_path: Path, kind: Format) -> None:
    write_table(tmp_path, CARDS, ROWS, format=kind)
    assert list(read_rows(tmp_path)) == ROWS
    assert read_cards(tmp_path) == CARDS


def test_a_second_table_replaces_the_first_in_whatever_format(tmp_path: Path) -> None:
    write_table(tmp_path, CARDS, ROWS, format="parquet")
    write_table(tmp_path, CARDS, ROWS[:1], format="jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"experts.json", "observations.jsonl"}
    assert list(read_rows(tmp_path)) == ROWS[:1]


def test_a_failing_source_leaves_the_old_table(tmp_path: Path) -> None:
    def failing() -> Iterator[ObservedQuery]:
        yield ROWS[1]
        raise RuntimeError("the fleet is gone")

    write_table(tmp_path, CARDS, ROWS)
    with pytest.raises(RuntimeError, match="the fleet is gone"):
        write_table(tmp_path, CARDS, failing())
    assert list(read_rows(tmp_path)) == ROWS


def test_a_table_becomes_arrays_with_nan_where_nothing_was_observed(tmp_path: Path) -> None:
    write_table(tmp_path, CARDS, ROWS)
    table = load_table(tmp_path)
    assert (table.train.ids, table.test.ids) == (("a",), ("b",))
    assert table.train.texts == ("1 + 1?\nÄ",)
    np.testing.assert_array_equal(table.train.quality, np.array([[0.5, np.nan]], np.float32))
    np.testing.assert_array_equal(table.train.output_tokens, np.array([[7, np.nan]], np.float32))
    np.testing.assert_array_equal(table.test.latency_s, np.array([[np.nan, 0.25]], np.float32))


def test_a_split_may_be_empty(tmp_path: Path) -> None:
    write_table(tmp_path, CARDS, ROWS[:1])
    assert load_table(tmp_path).test.quality.shape == (0, 2)


def test_rows_stream_before_the_file_ends(tmp_path: Path) -> None:
    rows = read_rows(lines(tmp_path, row(), "this line is never reached"))
    assert next(rows).id == "1"
    with pytest.raises(ObservationError, match=r"jsonl:2: is not one JSON object"):
        next(rows)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (row(qualty=1), "'qualty': is unknown"),
        (with_pair(price=1), r"'experts\.a\.price': is unknown"),
        (row(experts={"c": {"quality": 1, "cost_usd": 0}}), r"'experts\.c': is no expert of experts\.json"),
        (row(experts={}), "'experts': must be an object that holds at least one expert"),
        (row(experts={"a": 1}), r"'experts\.a': must be an object"),
        (row(experts={"a": {"quality": 1}}), r"'experts\.a\.cost_usd': is missing"),
        (with_pair(quality=float("nan")), r"'experts\.a\.quality': must be a finite number, not nan"),
        (with_pair(quality=1.5), r"'experts\.a\.quality': must be a number in 0\.\.1, not 1\.5"),
        (with_pair(quality=None), r"'experts\.a\.quality': must be a finite number, not None"),
        (with_pair(quality="1"), r"'experts\.a\.quality': must be a finite number, not '1'"),
        (with_pair(quality=True), r"'experts\.a\.quality': must be a finite number, not True"),
        (with_pair(cost_usd=None), r"'experts\.a\.cost_usd': must be a finite number, not None"),
        (with_pair(cost_usd=-1), r"'experts\.a\.cost_usd': must not be negative"),
        (with_pair(output_tokens=1.5), r"'experts\.a\.output_tokens': must be a whole number"),
        (row(split="validation"), "'split': must be 'train' or 'test', not 'validation'"),
        (row(id=7), "'id': must be a string, not 7"),
        (row(id=""), "'id': must not be empty"),
        ({"id": "1", "split": "train", "experts": {}}, "'query': is missing|'experts': must"),
        ([1], "must be an object, not list"),
        ("{", "is not one JSON object"),
        (with_pair(cost_usd=1e300), r"'experts\.a\.cost_usd': must be below 1e\+30"),
        (with_pair(cost_usd=10**400), r"'experts\.a\.cost_usd': must be below 1e\+30"),
        ('{"id": "1", "id": "2"}', "field 'id' stands twice"),
        ("[" * 100_000, "is not one JSON object"),
    ],
)
def test_a_wrong_row_is_refused_by_file_line_and_field(tmp_path: Path, wrong: object, says: str) -> None:
    with pytest.raises(ObservationError, match=rf"observations\.jsonl:2: .*({says})"):
        load_table(lines(tmp_path, row(id="0"), wrong))


@pytest.mark.parametrize(("split", "how"), [("train", "twice"), ("test", "in both splits")])
def test_an_id_stands_once(tmp_path: Path, split: str, how: str) -> None:
    with pytest.raises(ObservationError, match=rf"jsonl:3: field 'id': '1' stands {how}, first in line 1"):
        load_table(lines(tmp_path, row(), row(id="2"), row(split=split)))


def test_wrong_parquet_rows_are_refused_too(tmp_path: Path) -> None:
    write_table(tmp_path, CARDS, [ROWS[0], ROWS[0]], format="parquet")
    with pytest.raises(ObservationError, match=r"observations\.parquet:2: field 'id': 'a' stands twice"):
        load_table(tmp_path)


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        (["a"], "must be a list of structs"),
        ([None], "must be a list of structs"),
        ([{"expert": None, "quality": 1.0, "cost_usd": 0.0}], "must be a list of structs"),
        ([{"expert": "a", "quality": q, "cost_usd": 0.0} for q in (1.0, 0.0)], "field 'a' stands twice"),
    ],
)
def test_parquet_of_another_shape_is_refused(tmp_path: Path, experts: list[Any], says: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_table(tmp_path, CARDS, ROWS[:1], format="parquet")
    one = {"id": "x", "task": "", "query": "?", "split": "train", "experts": experts}
    pq.write_table(pa.Table.from_pylist([one]), tmp_path / "observations.parquet")
    with pytest.raises(ObservationError, match=rf"observations\.parquet:1: field 'experts': .*{says}"):
        load_table(tmp_path)


@pytest.mark.parametrize(
    ("cards", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be an object"),
        ('{"a": 1}', "expert 'a' must be an object"),
        ('{"a": {"input_price": -1}}', "expert 'a', field 'input_price'"),
        ('{"a b": {}}', "expert 'a b', field 'name'"),
    ],
)
def test_wrong_cards_are_refused(tmp_path: Path, cards: str, says: str) -> None:
    lines(tmp_path, row())
    (tmp_path / "experts.json").write_text(cards)
    with pytest.raises(ObservationError, match=rf"experts\.json: {says}"):
        load_table(tmp_path)


def test_files_must_be_there_once_and_whole(tmp_path: Path) -> None:
    lines(tmp_path, row())
    whole = gzip.compress(b'{"id": "1"}')
    (tmp_path / "observations.jsonl.gz").write_bytes(whole[:-4])
    with pytest.raises(ObservationError, match="exactly one of"):
        load_table(tmp_path)
    (tmp_path / "observations.jsonl").unlink()
    with pytest.raises(ObservationError, match="cannot be read"):
        load_table(tmp_path)
    (tmp_path / "observations.jsonl.gz").rename(tmp_path / "observations.parquet")
    with pytest.raises(ObservationError, match="cannot be read as Parquet"):
        load_table(tmp_path)
