"""Retrieval collections in BEIR's layout.

    DIR/corpus.jsonl[.gz]           {"_id", "title", "text"}
    DIR/queries.jsonl[.gz]          {"_id", "text"}
    DIR/qrels/train.tsv             judged training queries, where there are any
    DIR/qrels/test.tsv, DIR/qrels.tsv   judged test queries: measured on, never trained on

A line of judgments is `query-id <tab> corpus-id <tab> score`, after a header.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training.errors import CorpusError

_TRAIN = "train.tsv"
_WORD = re.compile(r"\w+")

Judged = Mapping[str, Mapping[str, int]]
"""Query id -> document id -> grade; documents that are not relevant are left out."""


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain, which is named as its folder is: the i-th has id, title and body at i."""

    folder: Path
    ids: Sequence[str]
    titles: Sequence[str]
    bodies: Sequence[str]

    @cached_property
    def texts(self) -> Sequence[str]:
        """What is embedded and searched: title before body."""
        return [f"{title} {body}".strip() for title, body in zip(self.titles, self.bodies, strict=True)]

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.folder.name


def read_corpus(folder: Path) -> Corpus:
    """The documents of a collection. Raises `CorpusError`, which names file and line."""
    ids, titles, bodies = [], [], []
    for path, number, row in _rows(_found(folder, "corpus.jsonl")):
        title, text = row.get("title") or "", row.get("text")
        if not isinstance(row.get("_id"), str) or not isinstance(text, str) or not isinstance(title, str):
            raise CorpusError(f"{path}:{number}: a document has the strings _id and text, and may have a title")
        ids.append(row["_id"])
        titles.append(title)
        bodies.append(text)
    if not ids:
        raise CorpusError(f"{folder} has no documents")
    if len(set(ids)) < len(ids):
        raise CorpusError(f"{folder}: two documents have the same _id")
    return Corpus(folder.resolve(), ids, titles, bodies)


def read_queries(folder: Path, judged: Judged) -> dict[str, str]:
    """The texts of the queries that `judged` knows, by id."""
    texts: dict[str, str] = {}
    for path, number, row in _rows(_found(folder, "queries.jsonl")):
        if not isinstance(row.get("_id"), str) or not isinstance(row.get("text"), str):
            raise CorpusError(f"{path}:{number}: a query has the strings _id and text")
        texts[row["_id"]] = row["text"]
    if lost := sorted(set(judged) - set(texts)):
        raise CorpusError(f"{folder}: query {lost[0]!r} is judged, but has no text")
    return {query: texts[query] for query in judged}


def train_judgments(folder: Path) -> dict[str, dict[str, int]]:
    """The judged training queries; empty where there are none."""
    path = folder / "qrels" / _TRAIN
    return _judgments(path) if path.is_file() else {}


def held_out_judgments(folder: Path) -> dict[str, dict[str, int]]:
    """The judged test queries. Raises `CorpusError` where there are none."""
    for path in (folder / "qrels" / "test.tsv", folder / "qrels.tsv"):
        if path.is_file():
            return _judgments(path)
    raise CorpusError(f"{folder} has neither qrels/test.tsv nor qrels.tsv")


def test_queries(folder: Path) -> dict[str, str]:
    """The texts of all queries that are judged to be measured on, by id: those of every file but `train.tsv`."""
    paths = [*sorted((folder / "qrels").glob("*.tsv")), folder / "qrels.tsv"]
    ids = {query for path in paths if path.name != _TRAIN and path.is_file() for query, _, _ in _lines(path)}
    return read_queries(folder, {query: {} for query in sorted(ids)}) if ids else {}


def normalised(text: str) -> str:
    """A query's words, by which two are the same query: lower case, without marks and blanks."""
    return " ".join(_WORD.findall(text.casefold())) or text.strip()


def sha256_of(folder: Path) -> str:
    """A hash of all that is trained on."""
    digest = hashlib.sha256()
    names = ("corpus.jsonl", "corpus.jsonl.gz", "queries.jsonl", "queries.jsonl.gz", f"qrels/{_TRAIN}")
    judged = (folder / "qrels" / _TRAIN).is_file()
    for name in names if judged else names[:2]:
        if (path := folder / name).is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _found(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise CorpusError(f"{folder} has neither {name} nor {name}.gz")


def _rows(path: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise CorpusError(f"{path}:{number}: a line holds a JSON object, not {type(row).__name__}")
                yield path, number, row
    except (OSError, EOFError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read as JSON lines: {error}") from error


def _judgments(path: Path) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    for query, document, grade in _lines(path):
        if grade > 0:
            judged.setdefault(query, {})[document] = grade
    return judged


def _lines(path: Path) -> list[tuple[str, str, int]]:
    """Query, document and grade of each line."""
    try:
        lines = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:]]
        return [(query, document, int(grade)) for query, document, grade in lines]
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path}: lines are `query-id<tab>corpus-id<tab>score` after a header: {error}") from error
